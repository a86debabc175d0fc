"""The gain by coefficients: the sigmoid closest to the calibrated law, against the laws predicted to be best.

    python benchmarks/coefficients.py FAMILY ... [--budgets 0.2 0.35 0.5] [--images 64] [--out FILE]

For calibrated families, at equal expected cost in FLOPs: the mean squared error to 500 steps of the largest level, on
samples not used for fitting, each with its own coins, from the same uniform numbers for every law. Also the free
allocation of the calibration, which is not a sigmoid. Intervals are over images: 95 percent of the difference.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlem.conditions import conditions_of
from mlem.family import Family
from mlem.files import write_json
from mlem.multilevel.learning import Objective, first_coefficients, frozen, interval, nearest_coefficients
from mlem.multilevel.planner import make_plan
from mlem.multilevel.spec import PlanSpec
from mlem.noise import reserved_indices
from mlem.provenance import processor
from mlem.solvers import make_solver

CASES = (("ddpm", "log_snr"), ("ddim", "log_snr"))
COINS = ("bernoulli", "systematic")
STEPS, REFERENCE, PLANS, BATCH, KNOTS = 32, 500, 4, 16, 4


def objective_of(family: Family, solver: str, grid: str, knots: int = 0) -> Objective:
    """J of the family with this solver."""
    method = make_solver(solver)
    flops = torch.tensor([level.flops for level in family.levels], dtype=torch.float64)
    return Objective(
        frozen(family),
        family.schedule,
        family.shape,
        method,
        method.grid(family.schedule, STEPS, grid),
        flops / flops[-1],
        conditions=lambda indices: conditions_of(family.levels, None, indices),
        knots=knots,
    )


class FreeLaw(Objective):
    """An objective whose probabilities are a fixed table, independent of theta."""

    table: Tensor

    def probabilities(self, theta: Tensor) -> Tensor:
        return self.table


def rows_of(family: Family, solver: str, grid: str, budgets: list[float], images: int) -> list[dict[str, Any]]:
    """One row per budget and kind of coins."""
    problem, bent = (objective_of(family, solver, grid, knots) for knots in (0, KNOTS))
    index = reserved_indices("judging", images)
    with torch.no_grad():
        truth = torch.cat([problem.reference(part, REFERENCE) for part in index.split(BATCH)])
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        best, best_bent = (
            first_coefficients(family, problem.solver, problem.grid, budget, knots) for knots in (0, KNOTS)
        )
        nearest = nearest_coefficients(family, problem.solver, problem.grid, budget)
        for _ in range(100):  # at the same cost: all betas alike
            nearest[-1] += (budget - problem.cost(nearest)) / problem.cost_gradient(nearest)[-1].sum()
        free = FreeLaw.__new__(FreeLaw)
        vars(free).update(vars(problem))
        spec = PlanSpec(budget=budget, estimator="jump", coins="bernoulli", cost="flops", levels=tuple(family.names))
        free.table = make_plan(spec, family, problem.solver, problem.grid).probabilities
        laws = {"nearest": (problem, nearest), "sigmoid": (problem, best), "knots": (bent, best_bent)}
        laws["free"] = (free, best)
        for coins in COINS:
            errors = {name: held_out(law, theta, coins, index, truth) for name, (law, theta) in laws.items()}
            row: dict[str, Any] = {"family": family.data, "solver": solver, "budget": budget, "coins": coins}
            row |= {f"mse of {name}": float(f"{found.mean():.4g}") for name, found in errors.items()}
            for name in ("sigmoid", "knots"):
                change, half = interval(errors[name] - errors["nearest"])
                row |= {f"change of {name}": float(f"{change:.3g}"), f"half width of {name}": float(f"{half:.2g}")}
            row["cost"] = {name: round(law.cost(theta).item(), 4) for name, (law, theta) in laws.items()}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def held_out(law: Objective, theta: Tensor, coins: str, index: Tensor, truth: Tensor) -> Tensor:
    """Errors (N,)."""
    parts = zip(index.split(BATCH), truth.split(BATCH), strict=True)
    return torch.cat([law.held_out(theta, coins, some, due, PLANS) for some, due in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+", type=Path, help="folders of calibrated families")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.35, 0.5])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("coefficients.json"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for folder in options.families:
        family = Family.load(folder)
        for solver, grid in CASES:
            rows += rows_of(family, solver, grid, options.budgets, options.images)
    about = {"machine": processor(), "images": options.images, "steps": STEPS, "plans": PLANS, "knots": KNOTS}
    write_json(options.out, about | {"reference steps": REFERENCE, "rows": rows})


if __name__ == "__main__":
    main()
