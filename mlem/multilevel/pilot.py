"""Pilot runs: what linear response leaves out of a calibration is measured on a few plans, and so is discretisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mlem.arguments import MOST_STEPS, check_whole
from mlem.conditions import ConditionSource
from mlem.family import Family
from mlem.multilevel.calibration import Calibration
from mlem.multilevel.correction import PILOTS
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.plan import Plan
from mlem.multilevel.planner import make_plan
from mlem.multilevel.predict import Predictor, pilot_key
from mlem.multilevel.probes import plan_samples
from mlem.multilevel.spec import PlanSpec
from mlem.networks import evaluating
from mlem.noise import reserved_indices
from mlem.solvers import SOLVERS, GridPoint, GridPoints, Solver, make_solver
from mlem.trajectory import samples

__all__ = ["ESTIMATORS", "SPENT", "STEPS", "discretisations", "pilot"]

STEPS: dict[str, tuple[int, ...]] = {"ode": (4, 6, 8, 12, 16, 24, 32, 48, 64), "sde": (8, 16, 32, 64, 128)}
"""At these step counts."""
SPENT = (6.0, 12.0, 24.0)
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
        images: samples, which neither calibration nor a user sees.
        reference_steps: steps of the run that they are compared with.
        device: where the family's networks are moved, and stay.
        conditions: of the samples; by default classes take turns.
        progress: told what is being measured.
    """
    check_whole("reference_steps", reference_steps, most=MOST_STEPS)
    networks = torch.nn.ModuleList(level.network for level in family.levels).to(device)
    family = Family(family.levels, Fitted(calibration))
    with torch.inference_mode(), evaluating(networks):
        runs = _Runs(family, reserved_indices("pilots", images, device), reference_steps, seed, conditions)
        errors, stderr = {}, {}
        for name, grid in discretisations():
            progress(f"discretisation error of {name} on the {grid} grid")
            kind = "sde" if make_solver(name).stochastic else "ode"
            found = {steps: runs.errors(make_solver(name), grid, steps) for steps in STEPS[kind]}
            # the reference itself is no measurement of its error
            found = {steps: each for steps, each in found.items() if each.mean() > 0}
            errors[f"{name}/{grid}"] = {steps: each.mean().item() for steps, each in found.items()}
            stderr[f"{name}/{grid}"] = {steps: _stderr(each) for steps, each in found.items()}
        calibration = replace(calibration, discretisation=errors, stderr=stderr)
        family.fitted = Fitted(calibration)
        pilots: dict[str, list[list[float]]] = {}
        for name, grid, counts, order in PILOTS:
            for number, (estimator, coins, draws) in enumerate(ESTIMATORS):
                progress(f"pilot plans: {name}, {estimator} {coins or ''}")
                spec = PlanSpec(budget=1.0, estimator=estimator, coins=coins, order=order, cost="flops")
                found = pilots.setdefault(pilot_key(make_solver(name), estimator, coins), [])
                for steps in counts if number < 2 else counts[-1:]:
                    found += _pilots(runs, spec, make_solver(name), grid, steps, draws)
                found.sort()
    about = calibration.about | {"pilot_images": images, "reference_steps": reference_steps}
    return replace(calibration, pilots=pilots, about=about)


def discretisations() -> list[tuple[str, str]]:
    """Solvers and grids whose error on the largest level is measured, SDE solvers first: what each says of itself."""
    solvers = sorted(SOLVERS.items(), key=lambda item: not item[1].stochastic)
    return [(name, grid) for name, solver in solvers for grid in solver.measured_grids]


class _Runs:
    """Runs on fixed samples, against references that are run once."""

    def __init__(
        self, family: Family, index: Tensor, reference_steps: int, seed: int, conditions: ConditionSource | None
    ) -> None:
        self.family, self._index, self._reference_steps, self._seed = family, index, reference_steps, seed
        self._conditions = conditions
        self._made: dict[tuple[str, str | None, int], Tensor] = {}

    def errors(self, solver: Solver, grid: str, steps: int) -> Tensor:
        """Mean squared errors of the images by the largest level, to the many-step run: (B,)."""
        truth = self._alone(make_solver(solver.reference), None, self._reference_steps)
        return (self._alone(solver, grid, steps) - truth).square().flatten(1).mean(1)

    def added(self, solver: Solver, grid: str, steps: int, plan: Plan) -> Tensor:
        """What a plan adds to that, mean squared difference to the largest level in as many steps: (B,)."""
        points = self._points(solver, grid, steps)
        x = plan_samples(self.family, plan, solver, points, self._index, self._seed, self._conditions)
        return (x - self._alone(solver, grid, steps)).square().flatten(1).mean(1)

    def _alone(self, solver: Solver, grid: str | None, steps: int) -> Tensor:
        """The samples of the largest level, made once."""
        key = (solver.name, grid, steps)
        if key not in self._made:
            denoiser = self.family.level().denoiser_for(self._index, self._conditions)
            points = self._points(solver, grid, steps)
            self._made[key] = samples(denoiser, solver, points, self.family.shape, self._index, self._seed)
        return self._made[key]

    def _points(self, solver: Solver, grid: str | None, steps: int) -> GridPoints:
        return GridPoint.of(self.family.schedule, solver.grid(self.family.schedule, steps, grid))


def _stderr(errors: Tensor) -> float:
    """Standard error of the mean of these, (B,)."""
    return (errors.std() / math.sqrt(len(errors))).item()


def _pilots(runs: _Runs, spec: PlanSpec, solver: Solver, grid: str, steps: int, draws: int) -> list[list[float]]:
    """At each cost that a plan can have, rising: what it adds as predicted by linear response, and as measured.

    Then the standard error of what was measured, and the steps.
    """
    family = runs.family
    times = solver.grid(family.schedule, steps, grid)
    predictor = Predictor(family.fitted.calibration_for(family), family.schedule, solver, times)
    found: list[list[float]] = []
    for spent in SPENT:
        if spent >= steps:
            continue
        predicted, measured = 0.0, torch.zeros(())
        try:
            for seed in range(draws):
                plan = make_plan(replace(spec, budget=spent / steps, seed=seed), family, solver, times)
                predicted += predictor.response_error(plan) / draws
                measured = measured + runs.added(solver, grid, steps, plan) / draws
        except ValueError:  # a family whose cheapest level costs more than that
            continue
        if predicted > 0:  # a plan that runs all there is adds nothing
            found.append([predicted, measured.mean().item(), _stderr(measured), float(steps)])
    return found
