"""Seconds at equal error: what is recommended, against everything else that a user could do. Writes figures and JSON.

    python train.py experiment=dead_leaves16_xl
    python benchmarks/fastest.py runs/dead_leaves16_xl/family --kind ode
    python benchmarks/fastest.py runs/dead_leaves16_xl/family --kind sde
    python benchmarks/fastest.py four-levels --out FILE

All samplers run in one process on the same noise (SDEs: along the same Brownian paths), in batches of 64 images and in
rounds; each row has the mean seconds of its rounds. Error is to a many-step run of the largest level. Rows are kept as
they come: a run that was cut off goes on where it was. Time it on an idle machine.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from multilevel_runs import write_rows
from synthetic import HIERARCHIES, synthetic

from mlem import Family, Plan, Reuse
from mlem.comparison.equal_error import Setting, cost_ratio
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.pilot import pilot
from mlem.provenance import machine
from mlem.sampling import Result, Sampler, solver_of
from mlem.solvers import Solver

BATCH = 64
REFERENCE = {"ode": ("dpm_solver_pp", 300), "sde": ("ddpm", 500)}
TARGETS = {"ode": (2e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4), "sde": (5e-2, 3e-2, 1e-2, 5e-3, 3e-3, 2e-3)}
"""Mean squared errors at which seconds are compared."""
PLAIN: dict[str, list[tuple[str, str | None, dict[str, Any], tuple[int, ...]]]] = {
    "ode": [
        ("unipc", "uniform", {}, (4, 5, 6, 7, 8, 10, 12, 16, 20, 24)),
        ("unipc_3", "log_snr", {}, (16, 24, 32)),
        ("dpm_solver_pp", "uniform", {}, (6, 8, 12, 16, 24)),
        ("diffusers:DPMSolverMultistepScheduler", None, {"solver_order": 3}, (6, 8, 12, 16, 24)),
    ],
    "sde": [
        ("ddpm", "uniform", {}, (12, 16, 24, 32, 48, 64, 96)),
        ("dpm_solver_pp_sde", "uniform", {}, (12, 16, 24, 32, 48, 64)),
        ("dpm_solver_pp_sde", "log_snr", {}, (24, 32, 48, 64)),
    ],
}
"""Solver, grid, options and steps of the largest level alone."""
STITCHED = {"ode": ("unipc", "uniform", (8, 10, 12, 16)), "sde": ("ddpm", "uniform", (24, 32, 48, 64))}
"""Solver, grid and steps of plans that switch by hand."""
SHARES = (0.25, 0.5)
"""Of T-Stitch, in which a small level runs first; and of the steps in the middle, from this share of them on."""
REUSED: dict[str, tuple[tuple[str, str, tuple[int, ...]], ...]] = {
    "ode": (("unipc", "uniform", (6, 7, 8, 10, 12, 16, 20, 24)), ("unipc_3", "log_snr", (20, 24, 32, 40))),
    "sde": (
        ("ddpm", "uniform", (16, 20, 24, 28, 32, 40, 48, 64, 96)),
        ("dpm_solver_pp_sde", "uniform", (16, 20, 24, 28, 32, 40, 48, 64, 96)),
    ),
}
"""Of DeepCache, on the largest level alone."""
REUSES: dict[str, tuple[tuple[int, int], ...]] = {
    "ode": ((2, 1), (3, 1), (5, 1), (5, 2), (10, 1)),
    "sde": ((2, 1), (3, 1), (5, 1), (10, 1)),
}
"""Whole evaluations one in so many, and the branch."""
BESIDE = ((3, 1), (5, 1), (10, 1))
"""Of DeepCache under a plan, which is made for it."""
FORECAST = {"ode": ("unipc", "uniform", (12, 16, 24)), "sde": ("ddpm", "uniform", (32, 64))}
FORECASTS = ((2, 0), (2, 1), (2, 2))
"""Of outputs of the largest level, which runs at one row in so many: and the order."""
PLANNED: dict[str, tuple[tuple[str, str, tuple[int, ...]], ...]] = {
    "ode": (("unipc", "uniform", (10, 12, 16, 20, 24, 30, 36)), ("unipc_3", "log_snr", (24, 32, 40))),
    "sde": (("ddpm", "uniform", (32, 48, 64, 96, 128)),),
}
BUDGETS = {"ode": (0.1, 0.16, 0.25, 0.4, 0.6), "sde": (0.07, 0.11, 0.18, 0.3)}
"""Of plans: shares of the largest level's seconds in as many steps."""
KEPT_BUDGETS = {"ode": (0.13, 0.2, 0.25, 0.3, 0.4), "sde": (0.07, 0.1, 0.13, 0.16, 0.2)}
"""Of those on kept features."""

CHOSEN = {"recommended": 0, "recommended, checked": 64}
"""What is recommended, and the images on which that is measured before."""

Job = tuple[list[Any], Callable[[], Sampler]]


class Rows:
    """Measured rows of one family and kind, kept in a file."""

    def __init__(self, family: Family, kind: str, images: int, out: Path) -> None:
        self.family, self.kind, self.images, self.out = family, kind, images, out
        self.about = {"family": self.family.data, "weights": self.family.weights_hash, "kind": kind, "images": images}
        self.about |= {"machine": machine(), "reference": REFERENCE[kind]}
        found = json.loads(out.read_text()) if out.exists() else {"rows": []}
        self.rows: list[dict[str, Any]] = found["rows"]

    @cached_property
    def truth(self) -> torch.Tensor:
        """The many-step run of the largest level."""
        solver, steps = REFERENCE[self.kind]
        path = self.out.with_name(f"{self.out.stem}_{self.images}_{self.about['weights']}.pt")
        if not path.exists():
            print(f"reference: {solver}, {steps} steps", flush=True)
            found = self._run(Sampler(self.family.level(), solver=solver, steps=steps))
            torch.save(torch.cat([result.x for result in found]), path)
        return torch.load(path, weights_only=True)

    def measure(self, key: list[Any], make: Callable[[], Sampler], round: int) -> None:
        """A round of a sampler, unless it is there."""
        row = next((one for one in self.rows if one["key"] == key), None)
        if row is not None and len(row["seconds"]) > round:
            return
        try:
            sampler = make()
        except ValueError as error:
            print(f"left out: {key}: {error}", flush=True)
            return
        results = self._run(sampler)
        errors = (torch.cat([result.x for result in results]) - self.truth).square().flatten(1).mean(1)
        wall, inside = (
            sum(getattr(one.ledger, name) for one in results) for name in ("wall_seconds", "network_seconds")
        )
        about = {} if sampler.plan is None else sampler.plan.about
        if row is None:
            row = {"key": key, "seconds": list[float]()}
            self.rows.append(row)
        row["seconds"].append(wall / self.images)
        row |= {
            "outside": 1 - inside / wall,
            "calls": {name: cost.calls / BATCH for name, cost in results[0].ledger.levels.items()},
            "mse": errors.mean().item(),
            "image_mse": [float(f"{error:.4g}") for error in errors.tolist()],
            "predicted": [about.get("predicted_mse"), about.get("predicted_seconds")],
        }
        if isinstance(make, _Recommended):
            row |= make.said
        self.save()
        print(f"{key!s:80s} {1e3 * row['seconds'][-1]:8.3f} ms/image  MSE {row['mse']:.3e}", flush=True)

    def _run(self, sampler: Sampler) -> list[Result]:
        return [sampler.run(range(start, start + BATCH)) for start in range(0, self.images, BATCH)]

    def save(self, **more: Any) -> None:
        """Write what there is."""
        write_rows(self.out, {"about": self.about, "rows": self.rows, **more})


def jobs(family: Family, kind: str, targets: Sequence[float]) -> Iterator[Job]:
    """All samplers: what they are, group first, and what makes them."""
    top = family.names[-1]

    def alone(solver: str | Solver, grid: str | None, steps: int, **how: Any) -> Callable[[], Sampler]:
        return lambda: Sampler(family, solver=solver, steps=steps, grid=grid, **how)

    for name, grid, options, several in PLAIN[kind]:
        group = "fewer steps" if not name.startswith("diffusers:") else "fewer steps, diffusers"
        for steps in several:
            yield [group, name, grid, steps], alone(solver_of(name, **options), grid, steps, level=top)
    solver, grid, several = STITCHED[kind]
    for steps in several:
        for share, small in itertools.product(SHARES, family.names[:-1:2]):
            some = round(float(share) * steps)
            early = Plan.switching([0] * some + [1] * (steps - some), [small, top])
            yield ["T-Stitch", solver, grid, steps, small, share], alone(solver, grid, steps, plan=early)
            head = (steps - some) // 2
            inner = Plan.switching([1] * head + [0] * some + [1] * (steps - some - head), [small, top])
            yield ["large-small-large", solver, grid, steps, small, share], alone(solver, grid, steps, plan=inner)
    for (solver, grid, several), (every, branch) in itertools.product(REUSED[kind], REUSES[kind]):
        for steps in several:
            how = {"level": top, "reuse": Reuse(every=every, branch=branch)}
            yield ["DeepCache", solver, grid, steps, every, branch], alone(solver, grid, steps, **how)
    solver, grid, several = FORECAST[kind]
    for steps in several:
        for every, order in FORECASTS:
            ahead = Plan.forecast([row % every == 0 for row in range(steps)], top, order=order)
            yield ["forecast", solver, grid, steps, every, order], alone(solver, grid, steps, plan=ahead)
    for estimator, (solver, grid, several) in itertools.product(("hindsight", "switch"), PLANNED[kind]):
        for steps, budget in itertools.product(several, BUDGETS[kind]):
            spec = family.plan(budget=budget, estimator=estimator)
            yield [estimator, solver, grid, steps, budget], alone(solver, grid, steps, plan=spec)
    for (solver, grid, several), (every, branch) in itertools.product(PLANNED[kind], BESIDE):
        for steps, budget in itertools.product(several, KEPT_BUDGETS[kind]):
            how = {"plan": family.plan(budget=budget), "reuse": Reuse(every=every, branch=branch)}
            key = ["hindsight, DeepCache", solver, grid, steps, budget, every, branch]
            yield key, alone(solver, grid, steps, **how)
    for target, (name, check) in itertools.product(targets, CHOSEN.items()):
        yield [name, target], _Recommended(family, target, kind, check)


class _Recommended:
    """The sampler that is recommended for an error; called, it knows what was said of it."""

    said: dict[str, Any]

    def __init__(self, family: Family, target: float, kind: str, check: int) -> None:
        self._family, self._asked = family, {"mse": target, "kind": kind, "check": check}

    def __call__(self) -> Sampler:
        choice = self._family.recommend(**self._asked)
        self.said = {"predicted": [choice.predicted_mse, choice.predicted_seconds], "interval": choice.interval}
        if choice.check is not None:
            self.said["interval"] = choice.check.interval
        self.said |= {"what": str(choice)}
        return Sampler(self._family, **choice.options)


GROUPS = {
    "recommended": ("recommended",),
    "hindsight": ("hindsight",),
    "hindsight, DeepCache": ("hindsight", "hindsight, DeepCache"),
    "switch": ("switch",),
    "multilevel": ("hindsight", "hindsight, DeepCache", *CHOSEN),
}
"""What is compared with all others; of the recommended rows those that run several levels."""
OTHERS = ("fewer steps", "fewer steps, diffusers", "T-Stitch", "large-small-large", "forecast", "DeepCache")


def settings(rows: list[dict[str, Any]], groups: tuple[str, ...]) -> list[Setting]:
    """Curves of these groups, in wall seconds an image."""
    chosen = [row for row in rows if row["key"][0] in groups and (row["key"][0] not in CHOSEN or len(row["calls"]) > 1)]
    return [Setting(np.array([np.mean(row["seconds"])]), np.array([row["image_mse"]])) for row in chosen]


def summary(rows: Rows, targets: Sequence[float]) -> list[dict[str, Any]]:
    """Seconds of all others over ours at equal error, and how the recommendation did; printed."""
    table = []
    for target, (name, groups) in itertools.product(targets, GROUPS.items()):
        if name == "recommended":
            continue
        for rivals in (OTHERS, (*OTHERS, "switch")):
            if name == "switch" and "switch" in rivals:
                continue
            theirs, ours = settings(rows.rows, rivals), settings(rows.rows, groups)
            found = cost_ratio(theirs, ours, target, np.random.default_rng(0), draws=400)
            table.append({"ours": name, "rivals": list(rivals), **found.to_dict()})
            if not math.isnan(found.ratio):
                against = "all others" if rivals == OTHERS else "all others and searched switches"
                print(
                    f"error {target:7.0e}: {name:20s} {found.ratio:5.2f} times as fast as {against} "
                    f"({found.low:.2f} to {found.high:.2f}), {1e3 * found.cost:.2f} ms/image"
                )
    for row in rows.rows:
        if row["key"][0] in CHOSEN:
            name, target = row["key"]
            reaching = [one for one in rows.rows if one["mse"] <= target and one["key"][0] not in CHOSEN]
            best = min((float(np.mean(one["seconds"])) for one in reaching), default=None)
            taken = float(np.mean(row["seconds"]))
            low, high = row["interval"]
            found = {name: target, "mse": row["mse"], "seconds": taken, "best other": best}
            table.append(found | {"covered": low <= row["mse"] <= high})
            against = "and no other reaches it" if best is None else f"{taken / best:.2f} of the best other that does"
            within = f"{'within' if low <= row['mse'] <= high else 'outside'} {low:.1e} to {high:.1e}"
            print(f"{name} for {target:.0e}: {row['mse']:.2e} ({within}), {1e3 * taken:.2f} ms/image, {against}")
            print(f"    {row['what']}")
    return table


def family_of(name: str, levels: list[str] | None) -> Family:
    """The family, or some levels of it; calibrated where it is not a folder's."""
    family = synthetic(name, working=True) if name in HIERARCHIES else Family.load(name)
    if levels is None and name not in HIERARCHIES:
        return family
    if levels is not None:
        family = Family([family.level(level) for level in levels])
    images = 128 if name in HIERARCHIES else 24
    found = pilot(family, calibrate(family, images=images), images=images, progress=print)
    family.fitted = Fitted(found)
    return family


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help=f"a folder, pretrained:NAME, or in closed form: {', '.join(HIERARCHIES)}")
    parser.add_argument("--levels", nargs="+", help="of them, the largest of which is the reference; calibrated anew")
    parser.add_argument("--kind", choices=("ode", "sde"), default="ode")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", type=int, default=64, help="a multiple of 64")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/fastest_KIND.json")
    parser.add_argument("--targets", type=float, nargs="+", help="mean squared errors at which seconds are compared")
    options = parser.parse_args()
    if options.images < BATCH or options.images % BATCH:
        parser.error(f"--images must be a multiple of {BATCH}, got {options.images}")
    targets = options.targets or TARGETS[options.kind]
    out = options.out or Path(__file__).with_name(f"fastest_{options.kind}.json")
    rows = Rows(family_of(options.family, options.levels), options.kind, options.images, out)
    for round in range(options.rounds):
        for key, make in jobs(rows.family, options.kind, targets):
            rows.measure(key, make, round)
    rows.save(summary=summary(rows, targets))


if __name__ == "__main__":
    main()
