"""Pilot runs: what linear response leaves out of a calibration is measured on a few plans, and so is discretisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mlem.arguments import MOST_STEPS, check_whole
from mlem.conditions import ConditionSource
from mlem.family import Family
from mlem.multilevel.calibration import Calibration
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.plan import Plan
from mlem.multilevel.planner import make_plan
from mlem.multilevel.predict import Predictor, pilot_key
from mlem.multilevel.probes import plan_samples
from mlem.multilevel.spec import PlanSpec
from mlem.networks import evaluating
from mlem.noise import reserved_indices
from mlem.solvers import SOLVERS, GridPoint, Solver, make_solver
from mlem.trajectory import samples

__all__ = ["ESTIMATORS", "PILOTS", "SPENT", "STEPS", "discretisations", "pilot"]

STEPS = (8, 16, 32, 64)
"""At these step counts."""
PILOTS = (("ddpm", "uniform", 128, 0), ("dpm_solver_pp", "log_snr", 48, 1))
"""Solver, grid, steps and order of held corrections of the pilot plans."""
SPENT = (6.0, 12.0, 24.0)
"""Their costs, in evaluations of the largest level by FLOPs."""
ESTIMATORS = (("hindsight", None, 1), ("held", None, 1), ("jump", "systematic", 3), ("jump", "bernoulli", 3))
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
        errors = {}
        for name, grid in discretisations():
            progress(f"discretisation error of {name} on the {grid} grid")
            found = {steps: runs.error(make_solver(name), grid, steps) for steps in STEPS}
            # the reference itself is no measurement of its error
            errors[f"{name}/{grid}"] = {steps: error for steps, error in found.items() if error > 0}
        calibration = replace(calibration, discretisation=errors)
        family.fitted = Fitted(calibration)
        pilots = {}
        for name, grid, steps, order in PILOTS:
            for estimator, coins, draws in ESTIMATORS:
                progress(f"pilot plans: {name}, {estimator} {coins or ''}")
                spec = PlanSpec(budget=1.0, estimator=estimator, coins=coins, order=order, cost="flops")
                found = _pilots(runs, spec, make_solver(name), grid, steps, draws)
                pilots[pilot_key(make_solver(name), estimator, coins)] = found
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
        self._references: dict[str, Tensor] = {}

    def error(self, solver: Solver, grid: str | None, steps: int, plan: Plan | None = None) -> float:
        """Mean squared error of the largest level, or of a plan."""
        truth = self._reference(solver.reference)
        return (self._samples(solver, grid, steps, plan) - truth).square().mean().item()

    def _reference(self, name: str) -> Tensor:
        if name not in self._references:
            self._references[name] = self._samples(make_solver(name), None, self._reference_steps)
        return self._references[name]

    def _samples(self, solver: Solver, grid: str | None, steps: int, plan: Plan | None = None) -> Tensor:
        family = self.family
        points = GridPoint.of(family.schedule, solver.grid(family.schedule, steps, grid))
        if plan is not None:
            return plan_samples(family, plan, solver, points, self._index, self._seed, self._conditions)
        denoiser = family.level().denoiser_for(self._index, self._conditions)
        return samples(denoiser, solver, points, family.shape, self._index, self._seed)


def _pilots(runs: _Runs, spec: PlanSpec, solver: Solver, grid: str, steps: int, draws: int) -> list[list[float]]:
    """[predicted by linear response, measured less discretisation] at each cost that a plan can have, rising."""
    family = runs.family
    times = solver.grid(family.schedule, steps, grid)
    predictor = Predictor(family.fitted.calibration_for(family), family.schedule, solver, times)
    found: list[list[float]] = []
    for spent in SPENT:
        predicted, measured = 0.0, 0.0
        try:
            for seed in range(draws):
                plan = make_plan(replace(spec, budget=spent / steps, seed=seed), family, solver, times)
                predicted += predictor.response_error(plan) / draws
                measured += runs.error(solver, grid, steps, plan) / draws
        except ValueError:  # a family whose cheapest level costs more than that
            continue
        alone = predictor.discretisation or 0.0
        found.append([predicted, max(measured - alone, 0.1 * measured)])
    return sorted(found)
