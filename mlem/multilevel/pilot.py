"""Pilot runs measure, on a few plans, what linear response neglects, and discretisation errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mlem.arguments import MOST_STEPS, check_whole
from mlem.conditions import ConditionSource
from mlem.family import Family
from mlem.multilevel.ahead import FORECASTS, Ahead
from mlem.multilevel.calibration import Calibration
from mlem.multilevel.correction import PILOTS, RECOMMENDED, REUSES
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.plan import Plan
from mlem.multilevel.planner import make_plan
from mlem.multilevel.predict import Predictor, pilot_keys
from mlem.multilevel.probes import plan_samples, start_caches
from mlem.multilevel.spec import PlanSpec
from mlem.networks import Reuse, evaluating
from mlem.noise import reserved_indices
from mlem.reusing import can_reuse
from mlem.solvers import SOLVERS, GridPoint, GridPoints, Solver, make_solver
from mlem.trajectory import samples

__all__ = ["ESTIMATORS", "SPENT", "STEPS", "discretisations", "pilot"]

STEPS: dict[str, tuple[int, ...]] = {"ode": (4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64), "sde": (8, 16, 32, 64, 128)}
"""Step counts of discretisation errors."""
SPENT = (3.0, 6.0, 12.0, 24.0)
"""Their costs, in evaluations of the largest level by FLOPs."""
ESTIMATORS = (
    ("hindsight", None, 1),
    ("switch", None, 1),
    ("held", None, 1),
    ("jump", "systematic", 3),
    ("jump", "bernoulli", 3),
)
"""Estimator, coins and number of draws of the pilot plans."""
PAYS = 0.3
"""Share of the measured numbers of steps at which reuse must err less than the whole network in the same time."""

How: TypeAlias = Reuse | Ahead | None
"""How the largest level runs alone: reusing deep features, forecast, or whole at every step."""


def pilot(
    family: Family,
    calibration: Calibration,
    *,
    images: int = 16,
    reference_steps: int = 500,
    seed: int = 0,
    device: str | torch.device = "cpu",
    conditions: ConditionSource | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """The calibration with `discretisation` and `pilots`.

    Args:
        images: number of samples, used neither in calibration nor by users.
        reference_steps: steps of the reference.
        device: where the family's networks are moved, and stay.
        conditions: of the samples; by default classes take turns.
        progress: called with a description of each measurement.
    """
    check_whole("reference_steps", reference_steps, most=MOST_STEPS)
    networks = torch.nn.ModuleList(level.network for level in family.levels).to(device)
    family = Family(family.levels, Fitted(calibration))
    with torch.inference_mode(), evaluating(networks):
        runs = _Runs(family, reserved_indices("pilots", images, device), reference_steps, seed, conditions)
        found = _alone(runs, calibration, progress)
        errors, stderr, trimmed = (
            {key: {steps: of(each) for steps, each in curve.items()} for key, curve in found.items()}
            for of in (_mean, _stderr, _trimmed)
        )
        calibration = replace(calibration, discretisation=errors, stderr=stderr, trimmed=trimmed)
        family.fitted = Fitted(calibration)
        pilots: dict[str, list[list[float]]] = {}
        for name, grid, counts, order in PILOTS:
            for estimator, coins, draws in ESTIMATORS:
                progress(f"pilot plans: {name}, {estimator} {coins or ''}")
                spec = PlanSpec(budget=1.0, estimator=estimator, coins=coins, order=order, cost="flops")
                recommended = estimator in RECOMMENDED
                reuses = [*runs.families] if recommended else [None]
                # few pilots of one solver are less informative than those of all
                keys = pilot_keys(make_solver(name), estimator, coins)[0 if recommended else 1 :]
                for steps in counts if recommended else counts[-1:]:
                    for reuse, rows in _pilots(runs, spec, make_solver(name), grid, steps, draws, reuses).items():
                        for key in keys:
                            pilots.setdefault(key + _words(reuse), []).extend(rows)
    pilots = {name: sorted(rows) for name, rows in pilots.items()}
    about = calibration.about | {"pilot_images": images, "reference_steps": reference_steps}
    return replace(calibration, pilots=pilots, about=about)


def _kind(solver: str) -> str:
    return "sde" if SOLVERS[solver].stochastic else "ode"


def _words(how: How) -> str:
    """Suffix of the names of measurements."""
    return "" if how is None else f"/{how}"


def _alone(runs: _Runs, calibration: Calibration, progress: Callable[[str], None]) -> dict[str, dict[int, Tensor]]:
    """Errors of the largest level alone: of each solver, grid and way to run it, in so many steps, per image (B,).

    Reuse is tried with the solvers of the pilots, ever rarer whole calls, and kept by `runs` as long as it pays.
    """
    found: dict[str, dict[int, Tensor]] = {}

    def measure(name: str, grid: str, how: How) -> None:
        progress(f"discretisation error of {name} on the {grid} grid{'' if how is None else f', {how}'}")
        each = {steps: runs.errors(make_solver(name), grid, steps, how) for steps in STEPS[_kind(name)]}
        # the reference itself does not measure its error
        found[f"{name}/{grid}" + _words(how)] = {steps: one for steps, one in each.items() if one.mean() > 0}

    for name, grid in discretisations():
        measure(name, grid, None)
    for ahead in FORECASTS:
        measure("unipc", "uniform", ahead)
    whole = next(iter(calibration.seconds.values()))[-1]
    for reuse in REUSES:
        if not can_reuse(runs.family.level(), reuse):
            break
        runs.families[reuse] = runs.family.reusing(reuse)
        shallow = next(iter(calibration.shallow.values()))[reuse.branch]
        share = (1 + (reuse.every - 1) * shallow / whole) / reuse.every
        for name, grid, *_ in PILOTS:
            measure(name, grid, reuse)
        kept = ((found.get(f"{name}/{grid}"), found[f"{name}/{grid}/{reuse}"]) for name, grid, *_ in PILOTS)
        if not any(plain is None or _pays(each, plain, share) for plain, each in kept):
            del runs.families[reuse]
            break
    return found


def _pays(kept: dict[int, Tensor], plain: dict[int, Tensor], share: float) -> bool:
    """Whether reuse often errs less than the whole network in the same time.

    Args:
        kept, plain: errors in so many steps, with reuse and without.
        share: time of a step with reuse, as a share of one without.
    """
    counts = sorted(plain)
    errors = [math.log(_mean(plain[count])) for count in counts]
    less = [
        math.log(_mean(each)) < np.interp(math.log(share * steps), np.log(counts), errors)
        for steps, each in kept.items()
    ]
    return sum(less) >= PAYS * len(less)


def discretisations() -> list[tuple[str, str]]:
    """Solvers and grids whose error on the largest level is measured, as declared by each solver, SDE solvers first."""
    solvers = sorted(SOLVERS.items(), key=lambda item: not item[1].stochastic)
    return [(name, grid) for name, solver in solvers for grid in solver.measured_grids]


class _Runs:
    """Runs on fixed samples, against references that are run once."""

    def __init__(
        self, family: Family, index: Tensor, reference_steps: int, seed: int, conditions: ConditionSource | None
    ) -> None:
        self.family, self._index, self._reference_steps, self._seed = family, index, reference_steps, seed
        self._conditions = conditions
        self.families: dict[Reuse | None, Family] = {None: family}
        """The family, and with each reuse of features by its largest level that is tried."""
        self._made: dict[tuple[str, str | None, int, How], Tensor] = {}

    def errors(self, solver: Solver, grid: str, steps: int, how: How = None) -> Tensor:
        """Mean squared errors per image of the largest level, to the reference: (B,)."""
        truth = self._alone(make_solver(solver.reference), None, self._reference_steps)
        return (self._alone(solver, grid, steps, how) - truth).square().flatten(1).mean(1)

    def added(self, solver: Solver, grid: str, steps: int, plan: Plan, reuse: Reuse | None = None) -> Tensor:
        """The error added by a plan, mean squared difference to the largest level in as many steps: (B,)."""
        x = self._planned(self.families[reuse], plan, solver, self._points(solver, grid, steps))
        return (x - self._alone(solver, grid, steps)).square().flatten(1).mean(1)

    def _alone(self, solver: Solver, grid: str | None, steps: int, how: How = None) -> Tensor:
        """The samples of the largest level, made once."""
        key = (solver.name, grid, steps, how)
        if key not in self._made:
            points = self._points(solver, grid, steps)
            if isinstance(how, Ahead):
                plan = how.plan(self.family.names[-1], steps)
                self._made[key] = self._planned(self.family, plan, solver, points)
            else:
                family = self.families[how]
                start_caches(family)
                denoiser = family.level().denoiser_for(self._index, self._conditions)
                self._made[key] = samples(denoiser, solver, points, family.shape, self._index, self._seed)
        return self._made[key]

    def _planned(self, family: Family, plan: Plan, solver: Solver, points: GridPoints) -> Tensor:
        return plan_samples(family, plan, solver, points, self._index, self._seed, self._conditions)

    def _points(self, solver: Solver, grid: str | None, steps: int) -> GridPoints:
        return GridPoint.of(self.family.schedule, solver.grid(self.family.schedule, steps, grid))


def _mean(errors: Tensor) -> float:
    return errors.mean().item()


def _stderr(errors: Tensor) -> float:
    """Standard error of the mean of these, (B,)."""
    return (errors.std() / math.sqrt(len(errors))).item()


def _trimmed(errors: Tensor) -> float:
    """Mean of these, (B,), without the worst twentieth, at least one."""
    return errors.sort().values[: -math.ceil(len(errors) / 20)].mean().item()


def _pilots(
    runs: _Runs, spec: PlanSpec, solver: Solver, grid: str, steps: int, draws: int, reuses: Sequence[Reuse | None]
) -> dict[Reuse | None, list[list[float]]]:
    """At each possible cost, rising: the added error as predicted by linear response, and as measured.

    Then the standard error of the measured one, the steps, and its trimmed mean; with each of these kinds of reuse.
    """
    family = runs.family
    times = solver.grid(family.schedule, steps, grid)
    predictor = Predictor(family.fitted.calibration_for(family), family.schedule, solver, times)
    found: dict[Reuse | None, list[list[float]]] = {reuse: [] for reuse in reuses}
    for spent in SPENT:
        if spent >= steps:
            continue
        try:
            plans = [
                make_plan(replace(spec, budget=spent / steps, seed=seed), family, solver, times)
                for seed in range(draws)
            ]
        except ValueError:  # the cheapest level of this family costs more than that
            continue
        predicted = sum(map(predictor.response_error, plans)) / draws
        if predicted <= 0:  # a plan that runs everything adds nothing
            continue
        for reuse in reuses:
            measured = torch.stack([runs.added(solver, grid, steps, plan, reuse) for plan in plans]).mean(0)
            mean = measured.mean().item()
            found[reuse].append([predicted, mean, _stderr(measured), float(steps), _trimmed(measured)])
    return found
