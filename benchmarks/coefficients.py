"""What coefficients are worth: the calibrated law as near as a sigmoid comes, the laws predicted best, learned ones.

    python benchmarks/coefficients.py FAMILY ... [--budgets 0.2 0.35 0.5] [--images 64] [--updates 10] [--out FILE]

Of calibrated families, that begin at equal expected cost by FLOPs: the objective, which is the mean squared error to
many steps of the largest level plus lambda times the cost, of samples that nothing was fitted to, with coins of their
own, from the same uniform numbers for every law. The learned laws begin at the predicted best with knots and are
updated on trajectories with Bernoulli coins, as by `python train.py model=coefficients`, from several seeds, and go
back to the start where that is not clearly better on samples of their own. All are for the levels that are predicted
best; beside them the best law of all levels, and the free allocation of the calibration, which is no sigmoid.

Intervals are 95 percent of the difference, over images (each with its own draws) and, of learned laws, over seeds: the
half widths of both, that of the seeds by Student's t, are added as squares. Rows that the file has are not run again.
"""

from __future__ import annotations

import mlem as mlem  # before torch, whose threads shall not spin

# isort: split
import argparse
import json
import logging
import math
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from scipy.stats import t as student
from torch import Tensor

from mlem.family import Family
from mlem.files import read_object, write_json
from mlem.multilevel.learning import Objective, first_coefficients, interval, nearest_coefficients, objective_for
from mlem.multilevel.planner import make_plan
from mlem.multilevel.spec import PlanSpec
from mlem.noise import reserved_indices
from mlem.provenance import processor
from mlem.solvers import make_solver
from mlem.training.coefficients import CoefficientsModule, Fit

CASES = (("ddpm", "log_snr"), ("ddim", "log_snr"))
COINS = ("bernoulli", "systematic")
STEPS, PLANS, BATCH, KNOTS = 32, 4, 64, 8
BEFORE, START = "nearest", "knots"
"""The laws that learned ones are compared with: the fit of the calibrated one, and where learning begins."""
ALL = "all levels"
COMPARED = (
    *((name, BEFORE) for name in ("sigmoid", START, "free", "learned")),
    *((name, START) for name in ("updated", "learned", "free")),
    (START, ALL),
)
"""Pairs whose difference is reported."""


class Learned(NamedTuple):
    """theta after the updates of a seed, and whether they are better than none."""

    updated: Tensor
    kept: bool


class FreeLaw(Objective):
    """An objective whose probabilities are a table, whatever theta is."""

    table: Tensor

    def probabilities(self, theta: Tensor) -> Tensor:
        return self.table


class Judge:
    """The held-out images of a family and solver with their references, and the learning on others."""

    def __init__(self, family: Family, solver: str, grid: str, options: argparse.Namespace) -> None:
        self._family, self._options = family, options
        self._solver = make_solver(solver)
        self._grid = self._solver.grid(family.schedule, STEPS, grid)
        self._of = partial(objective_for, family, self._solver, self._grid)
        self._index = reserved_indices("judging", options.images)
        with torch.no_grad():
            largest, parts = self._of(family.names), self._index.split(BATCH)
            self._truth = torch.cat([largest.reference(part, options.reference) for part in parts])

    def laws(self, budget: float) -> tuple[tuple[str, ...], dict[str, tuple[Objective, Tensor]]]:
        """The levels predicted best, and the laws that no network is evaluated for, by name."""
        family, asked = self._family, (self._family, self._solver, self._grid, budget)
        levels, bent = first_coefficients(*asked, KNOTS)
        plain = self._of(levels)
        nearest = nearest_coefficients(*asked, levels=levels)
        for _ in range(100):  # at the same cost: all betas alike
            nearest[-1] += (budget - plain.cost(nearest)) / plain.cost_gradient(nearest)[-1].sum()
        spec = PlanSpec(budget=budget, estimator="jump", coins="bernoulli", cost="flops")
        plan = make_plan(spec, family, self._solver, self._grid)
        free = FreeLaw.__new__(FreeLaw)
        vars(free).update(vars(self._of(plan.levels or family.names)))
        free.table = plan.probabilities
        return levels, {
            BEFORE: (plain, nearest),
            "sigmoid": (plain, first_coefficients(*asked, levels=levels)[1]),
            START: (self._of(levels, knots=KNOTS), bent),
            ALL: (self._of(family.names, knots=KNOTS), first_coefficients(*asked, KNOTS, family.names)[1]),
            "free": (free, bent),
        }

    def learn(self, levels: Sequence[str], start: Tensor, nearest: Tensor) -> tuple[float, list[Learned]]:
        """lambda, measured as the command does, and what is learned from each seed."""
        options, weight, found = self._options, None, list[Learned]()
        for seed in range(options.seeds):
            problem = self._of(levels, seed=seed, knots=KNOTS)
            fit = Fit(
                images=options.learned_from,
                batch_size=options.batch,
                draws=4,
                updates=options.updates,
                learning_rate=options.rate,
                tangents="reverse",
                held_out=options.images,
                reference_steps=options.reference,
                weight=weight,
            )
            module = CoefficientsModule(problem, start, nearest, fit, list(levels))
            trainer = pl.Trainer(
                max_steps=options.updates,
                max_epochs=-1,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module)
            weight, updated = module.weight.item(), module.theta
            found.append(Learned(updated, module.settle()["kept"]))
        assert weight is not None
        return weight, found

    def errors(self, law: Objective, theta: Tensor, coins: str) -> Tensor:
        """Of the held-out images: (N,)."""
        parts = zip(self._index.split(BATCH), self._truth.split(BATCH), strict=True)
        found = [law.held_out(theta, coins, some, due, self._options.plans) for some, due in parts]
        return torch.cat(found)


def rows_of(judge: Judge, about: dict[str, Any], budget: float) -> list[dict[str, Any]]:
    """A row for each kind of coins."""
    levels, laws = judge.laws(budget)
    bent, start = laws[START]
    weight, learned = judge.learn(levels, start, laws[BEFORE][1])
    rows: list[dict[str, Any]] = []
    for coins in COINS:
        errors = {name: judge.errors(law, theta, coins)[None] for name, (law, theta) in laws.items()}
        costs = {name: law.cost(theta)[None] for name, (law, theta) in laws.items()}
        errors["updated"] = torch.stack([judge.errors(bent, one.updated, coins) for one in learned])
        costs["updated"] = torch.stack([bent.cost(one.updated) for one in learned])
        kept = torch.tensor([one.kept for one in learned])[:, None]
        errors["learned"] = torch.where(kept, errors["updated"], errors[START])
        costs["learned"] = torch.where(kept[:, 0], costs["updated"], costs[START])
        worth = {name: found + weight * costs[name][:, None] for name, found in errors.items()}
        row = about | {"budget": budget, "coins": coins, "for": list(levels), "lambda": float(f"{weight:.4g}")}
        row |= {"kept": kept[:, 0].tolist()}
        row |= {f"mse of {name}": float(f"{found.mean():.4g}") for name, found in errors.items()}
        row |= {f"objective of {name}": float(f"{found.mean():.4g}") for name, found in worth.items()}
        for name, since in COMPARED:
            row |= changed(f"{name} - {since}", worth[name] - worth[since])
        row["cost"] = {name: [round(one, 4) for one in found.tolist()] for name, found in costs.items()}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def changed(name: str, differences: Tensor) -> dict[str, Any]:
    """The mean of differences (seeds, images), and half of its 95 percent interval."""
    mean, half = interval(differences.mean(0))
    seeds = len(differences)
    if seeds > 1:
        spread = student.ppf(0.975, seeds - 1) * differences.mean(1).std().item() / math.sqrt(seeds)
        half = math.hypot(half, spread)
    return {name: float(f"{mean:.3g}"), f"{name}, half width": float(f"{half:.2g}")}


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+", type=Path, help="calibrated families: folders, or pretrained:NAME")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.35, 0.5])
    parser.add_argument("--images", type=int, default=64, help="held-out ones")
    parser.add_argument("--plans", type=int, default=PLANS, help="draws of the coins for each")
    parser.add_argument("--reference", type=int, default=500, help="steps")
    parser.add_argument("--learned-from", type=int, default=256, help="images, in turn")
    parser.add_argument("--batch", type=int, default=64, help="images in an update, with four draws each")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser.parse_args()


def main() -> None:
    options = options_of()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    rows: list[dict[str, Any]] = read_object(options.out)["rows"] if options.out.exists() else []
    kept = ("images", "plans", "reference", "learned_from", "batch", "updates", "rate", "seeds")
    settings = {name.replace("_", " "): getattr(options, name) for name in kept}
    for folder in options.families:
        family = Family.load(folder)
        for solver, grid in CASES:
            about = {"family": family.data, "levels": len(family.levels), "solver": solver} | settings
            judge: Judge | None = None
            for budget in options.budgets:
                asked = about | {"budget": budget}
                if any(row.items() >= asked.items() for row in rows):
                    continue
                judge = judge or Judge(family, solver, grid, options)
                rows += rows_of(judge, about, budget)
                write_json(options.out, {"machine": processor(), "steps": STEPS, "knots": KNOTS, "rows": rows})


if __name__ == "__main__":
    main()
