"""What a plan was made for, to notice other uses: solver, grid, schedule and weights.

Stored in the `about` of a plan. A plan without identity, such as a handmade one, fits any run with as many rows.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mlem.multilevel.coefficients import COMMAND
from mlem.multilevel.plan import Plan
from mlem.multilevel.planner import make_plan
from mlem.multilevel.spec import PlanSpec
from mlem.networks import Reuse
from mlem.solvers import GridPoints, Solver

if TYPE_CHECKING:
    from mlem.family import Family

__all__ = ["found_plan", "identity", "plan_for_use", "seen_reusing"]

_WORDS = {
    "solver": "the solver {}",
    "settings": "other options of the solver",
    "grid": "the grid {}",
    "steps": "{} steps",
    "times": "other times of the grid",
    "schedule": "another noise schedule",
    "weights": "other weights or guidance",
}
"""Part of the identity -> its wording in an error."""


def identity(family: Family, solver: Solver, points: GridPoints) -> dict[str, Any]:
    """The identity of plans for these; plain data."""
    own: dict[str, Any] = {"solver": solver.name, "steps": points.steps, "grid": points.grid.name}
    own |= {"settings": _hashed(_plain(vars(solver))), "times": _hashed([f"{t:.9f}" for t in points.grid.times])}
    return own | {"schedule": points.schedule.fingerprint, "weights": family.weights_hash}


def seen_reusing(family: Family, reuse: Reuse) -> Family:
    """The family as planning sees it when its largest level reuses its deep features.

    Raises: ValueError where the family is not calibrated, or that was not measured.
    """
    seen = copy.copy(family)
    seen.fitted = replace(family.fitted, calibration=family.fitted.calibration_for(family).reusing(reuse))
    return seen


def plan_for_use(
    plan: Plan | PlanSpec, family: Family, solver: Solver, points: GridPoints, reuse: Reuse | None = None
) -> Plan:
    """The plan, or the one that a specification asks for, with the identity in its `about`.

    Args:
        reuse: of the deep features of the largest level. Where that was measured, plans are made for it; a budget
            remains a share of what the whole network takes.

    Raises: ValueError where a plan says that it was made for something else, and as `make_plan` does.
    """
    if isinstance(plan, PlanSpec) and reuse is not None:
        plan, family = _reusing(plan, family, reuse, "sde" if solver.stochastic else "ode")
    if isinstance(plan, PlanSpec):
        if plan.probabilities == "learned":
            _warn_of_other_coefficients(family, identity(family, solver, points))
        made = found_plan(plan, family, solver, points)
        if plan.chooses_levels and made.levels and made.levels[-1] != family.names[-1]:
            _warn_of_missing_level(made, plan, family)
        return made
    if plan.about.keys() & _WORDS.keys():
        _refuse_other_use(plan, identity(family, solver, points))
    return plan


def found_plan(spec: PlanSpec, family: Family, solver: Solver, points: GridPoints) -> Plan:
    """The plan for a specification, with the identity in its `about`, from the cache if possible.

    Raises: ValueError like `make_plan`.
    """
    own, fitted = identity(family, solver, points), family.fitted
    parts = {"calibration": fitted.calibration, "coefficients": fitted.coefficients}
    asked: dict[str, Any] = {name: part and part.fingerprint for name, part in parts.items()}
    asked |= own | {"spec": asdict(spec)}
    slow = spec.searched or spec.mse is not None
    made = family.kept.plan(asked, lambda: make_plan(spec, family, solver, points.grid), on_disk=slow)
    return replace(made, about=made.about | own)


def _reusing(spec: PlanSpec, family: Family, reuse: Reuse, kind: str) -> tuple[PlanSpec, Family]:
    """What to plan, and for which family; both as they are where the reuse was not measured."""
    try:
        seen = seen_reusing(family, reuse)
    except ValueError:
        return spec, family
    if spec.budget is None or spec.cost != "seconds":
        return spec, seen
    whole, reused = (
        one.fitted.calibration_for(one).predicted_seconds({family.names[-1]: 1.0}, 1, kind, spec.batch_size)
        for one in (family, seen)
    )
    return replace(spec, budget=min(1.0, spec.budget * whole / reused)), seen


def _refuse_other_use(plan: Plan, own: Mapping[str, Any]) -> None:
    for part, words in _WORDS.items():
        if part in plan.about and plan.about[part] != own[part]:
            raise ValueError(
                f"the plan was made for {words.format(plan.about[part])}, but is used with {_described(own)}; "
                "use it as intended, or draw it again: family.plan(...) fits any"
            )


def _warn_of_other_coefficients(family: Family, own: Mapping[str, Any]) -> None:
    """Warn: coefficients work on every grid, but are best on their own."""
    about = family.fitted.coefficients_for(family).about
    if any(part in about and about[part] != own[part] for part in ("solver", "grid")):
        was = f"{about.get('solver')} on the {about.get('grid')} grid"
        warnings.warn(
            f"the coefficients were learned for {was}, but are used with {_described(own)}; for these: {COMMAND}",
            stacklevel=6,
        )


def _warn_of_missing_level(plan: Plan, spec: PlanSpec, family: Family) -> None:
    """Warn if the budget is so small that the largest level never runs."""
    error = plan.about["predicted_mse_of_plan"]
    warnings.warn(
        f"budget={spec.budget} is less than any plan with level {family.names[-1]} costs; with {'+'.join(plan.levels)} "
        f"alone the mean squared error to level {family.names[-1]} is predicted to be {error:.2g}",
        stacklevel=6,
    )


def _described(own: Mapping[str, Any]) -> str:
    return f"{own['solver']} in {own['steps']} steps on the {own['grid']} grid"


def _plain(value: Any, depth: int = 4) -> Any:
    """Options of a solver as JSON; objects become their class and, down to a depth, their fields."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, depth) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, depth) for inner in value]
    if isinstance(value, type) or not hasattr(value, "__dict__") or depth == 0:
        return type(value).__name__
    return {type(value).__name__: _plain(vars(value), depth - 1)}


def _hashed(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
