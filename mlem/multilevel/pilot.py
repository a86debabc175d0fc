"""Pilot runs measure, on a few plans, what linear response neglects, and discretisation errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mlem.arguments import MOST_STEPS, check_whole
from mlem.conditions import ConditionSource
from mlem.family import Family
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
        errors, stderr, trimmed = (dict[str, dict[int, float]]() for _ in range(3))
        for name, grid, reuse in _alone(runs.families):
            key = f"{name}/{grid}" + _words(reuse)
            progress(f"discretisation error of {name} on the {grid} grid{'' if reuse is None else f', reuse {reuse}'}")
            found = {steps: runs.errors(make_solver(name), grid, steps, reuse) for steps in STEPS[_kind(name)]}
            # the reference itself does not measure its error
            found = {steps: each for steps, each in found.items() if each.mean() > 0}
            errors[key] = {steps: each.mean().item() for steps, each in found.items()}
            stderr[key] = {steps: _stderr(each) for steps, each in found.items()}
            trimmed[key] = {steps: _trimmed(each) for steps, each in found.items()}
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


def _words(reuse: Reuse | None) -> str:
    """Suffix of the names of measurements."""
    return "" if reuse is None else f"/{reuse}"


def _alone(reuses: Iterable[Reuse | None]) -> Iterator[tuple[str, str, Reuse | None]]:
    """Solvers and grids for the largest level alone; with reuse, those of the pilots."""
    for name, grid in discretisations():
        yield name, grid, None
    for reuse in filter(None, reuses):
        for name, grid, *_ in PILOTS:
            yield name, grid, reuse


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
        """The family, and with each supported reuse of features by its largest level."""
        self.families |= {reuse: family.reusing(reuse) for reuse in REUSES if can_reuse(family.level(), reuse)}
        self._made: dict[tuple[str, str | None, int, Reuse | None], Tensor] = {}

    def errors(self, solver: Solver, grid: str, steps: int, reuse: Reuse | None = None) -> Tensor:
        """Mean squared errors per image of the largest level, to the reference: (B,)."""
        truth = self._alone(make_solver(solver.reference), None, self._reference_steps)
        return (self._alone(solver, grid, steps, reuse) - truth).square().flatten(1).mean(1)

    def added(self, solver: Solver, grid: str, steps: int, plan: Plan, reuse: Reuse | None = None) -> Tensor:
        """The error added by a plan, mean squared difference to the largest level in as many steps: (B,)."""
        points = self._points(solver, grid, steps)
        x = plan_samples(self.families[reuse], plan, solver, points, self._index, self._seed, self._conditions)
        return (x - self._alone(solver, grid, steps)).square().flatten(1).mean(1)

    def _alone(self, solver: Solver, grid: str | None, steps: int, reuse: Reuse | None = None) -> Tensor:
        """The samples of the largest level, made once."""
        key = (solver.name, grid, steps, reuse)
        if key not in self._made:
            family = self.families[reuse]
            start_caches(family)
            denoiser = family.level().denoiser_for(self._index, self._conditions)
            points = self._points(solver, grid, steps)
            self._made[key] = samples(denoiser, solver, points, self.family.shape, self._index, self._seed)
        return self._made[key]

    def _points(self, solver: Solver, grid: str | None, steps: int) -> GridPoints:
        return GridPoint.of(self.family.schedule, solver.grid(self.family.schedule, steps, grid))


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
