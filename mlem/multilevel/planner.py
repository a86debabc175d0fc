"""From a specification to a plan, for one family, solver and time grid.

Here are the choice of levels, the probabilities of each law, and the budget that reaches an error. `predict.py`
predicts the error of a plan; `search.py` searches for the evaluations that measure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from mlem.grids import TimeGrid
from mlem.multilevel.choices import COINS, ESTIMATORS
from mlem.multilevel.plan import Plan
from mlem.multilevel.predict import Predictor
from mlem.multilevel.search import search
from mlem.multilevel.spec import PlanSpec
from mlem.multilevel.switching import switches
from mlem.solvers import GridPoint, GridPoints, Solver, quadrature_weights

if TYPE_CHECKING:
    from mlem.family import Family

__all__ = ["check_estimator", "check_spec", "make_plan", "refuse_levels"]


def make_plan(spec: PlanSpec, family: Family, solver: Solver, grid: TimeGrid) -> Plan:
    """The plan for `spec`, with predictions in `about`.

    Raises:
        ValueError: the family lacks a fit, no plan has so small a cost or error, or the solver cannot follow it.
    """
    check_estimator(solver, GridPoint.of(family.schedule, grid), spec.estimator)
    return _Planner(spec, family, solver, grid).plan()


def check_spec(spec: PlanSpec, family: Family, solver: Solver, grid: TimeGrid) -> None:
    """Raise ValueError for a specification that cannot fit these levels, whatever their calibration."""
    levels = tuple(spec.levels or family.names)
    refuse_levels(levels, family)
    if not isinstance(spec.probabilities, str):
        _refuse_count(spec.probabilities, levels)
    if spec.budget is None or spec.cost != "flops" or spec.probabilities == "learned":
        return
    rows = solver.evaluations(GridPoint.of(family.schedule, grid))
    subsets = _subsets(spec, levels) + _without_largest(spec, levels)
    least = min(_least_share(spec, names, family, rows) for names in subsets)
    if spec.budget < least:
        raise ValueError(
            f"budget={spec.budget} is too small for {grid.steps} steps of {', '.join(levels)}: no plan costs less "
            f"than {math.ceil(1000 * least) / 1000:g} of the largest level by FLOPs; raise it, or use more steps"
        )


def check_estimator(solver: Solver, points: GridPoints, estimator: str) -> None:
    """Raise ValueError if this solver cannot follow a plan, or not with this estimator."""
    if not solver.sequential:
        raise ValueError(f"{solver.name} evaluates many times at once, but a plan once per row; leave out plan=")
    if not ESTIMATORS[estimator].moves_state:
        return
    if not solver.revisable or solver.evaluations(points) != points.steps:
        raise ValueError(
            f"{estimator} needs an mlem solver with one evaluation per step, not {solver.name}; use estimator=held"
        )


def refuse_levels(levels: Sequence[str], family: Family) -> None:
    """Raise ValueError unless these are levels of the family, cheapest first."""
    places = [family.names.index(family.level(name).name) for name in levels]
    if places != sorted(set(places)):
        raise ValueError(
            f"levels must be distinct and cheapest first, as in {', '.join(family.names)}; got {', '.join(levels)}"
        )


def _refuse_count(probabilities: Sequence[float], levels: Sequence[str]) -> None:
    """Raise ValueError unless there is one number per level."""
    if len(probabilities) != len(levels):
        raise ValueError(
            f"probabilities= must be {len(levels)} numbers, for {', '.join(levels)}, got {len(probabilities)}"
        )


def _subsets(spec: PlanSpec, levels: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The subsets of these levels that a plan may use, all with the largest."""
    if spec.levels is not None or not isinstance(spec.probabilities, str):
        return [levels]
    return [(*part, levels[-1]) for part in _parts(levels[:-1])]


def _without_largest(spec: PlanSpec, levels: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The subsets that a plan may use if none with the largest level fits the budget."""
    return _parts(levels[:-1])[1:] if spec.chooses_levels else []


def _parts(levels: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All subsets, smallest first, starting with the empty one."""
    return [part for size in range(len(levels) + 1) for part in itertools.combinations(levels, size)]


def _least_share(spec: PlanSpec, levels: tuple[str, ...], family: Family, rows: int) -> float:
    """The smallest cost of a plan on these levels, as a share of the largest level's, by FLOPs."""
    costs = torch.tensor([family.level(name).flops / family.level().flops for name in levels], dtype=torch.float64)
    if not spec.searched:  # the first level runs at every row, the others perhaps never
        first = 1.0 if isinstance(spec.probabilities, str) else spec.probabilities[0]
        return costs[0].item() * first
    measured = torch.zeros(rows, len(levels), dtype=torch.bool)
    measured[0] = measured[:, 0] = True
    return Plan.given(measured, estimator=spec.estimator, levels=levels).cost(costs) / rows


class _Planner:
    """A specification together with its family, solver and grid."""

    def __init__(self, spec: PlanSpec, family: Family, solver: Solver, grid: TimeGrid) -> None:
        self._spec, self._family, self._solver, self._grid = spec, family, solver, grid
        # the corrections of an SDE are rough: extrapolating them makes it worse
        self._order = (0 if solver.stochastic else 1) if spec.order is None else spec.order
        refuse_levels(spec.levels or (), family)
        self._kind = "sde" if solver.stochastic else "ode"
        self._predictor: Predictor | None = None
        self._laws: dict[tuple[str, ...], Tensor] = {}
        if family.fitted.has("calibration") or spec.probabilities == "calibrated" or spec.mse is not None:
            calibration = family.fitted.calibration_for(family)
            self._predictor = Predictor(calibration, family.schedule, solver, grid)
            self._costs, self._unit = calibration.costs(spec.cost, spec.batch_size), spec.cost
            self._points = self._predictor.evaluations
            self._outside = grid.steps * calibration.outside_cost(self._kind, spec.cost, spec.batch_size)
        else:
            flops = torch.tensor([level.flops for level in family.levels], dtype=torch.float64)
            self._costs, self._unit = flops / flops[-1], "flops"  # seconds are known only for calibrated families
            _, self._points = quadrature_weights(solver, family.schedule, GridPoint.of(family.schedule, grid))
            self._outside = 0.0
        self._rows = len(self._points)

    def plan(self) -> Plan:
        """The plan, with predictions in `about`."""
        if self._spec.mse is not None:
            plan = self._for_error(self._spec.mse)
        elif self._spec.budget is not None:
            # a share of the largest level's time at every step, some of it outside the networks
            plan = self._for_budget(self._spec.budget * (self._rows + self._outside) - self._outside)
        else:
            plan = self._draw(self._levels()[-1], 1.0)
        return replace(plan, about=self._about(plan))

    def _about(self, plan: Plan) -> dict[str, object]:
        costs = self._costs_of(plan.levels)
        about: dict[str, object] = {"solver": self._solver.name, "steps": self._grid.steps, "grid": self._grid.name}
        about |= {"cost": plan.cost(costs), "expected_cost": plan.expected_cost(costs), "cost_unit": self._unit}
        about["outside_cost"] = self._outside
        if self._predictor is not None:
            names, calls = plan.levels or self._family.names, cast("list[float]", plan.expected_calls.tolist())
            about["predicted_seconds"] = self._predictor.calibration.predicted_seconds(
                dict(zip(names, calls, strict=True)), self._grid.steps, self._kind, self._spec.batch_size
            )
        if self._predictor is not None and bool((plan.probabilities[:, 0] == 1).all()):
            about["predicted_mse_of_plan"] = self._predictor.error(plan)
            if self._predictor.discretisation is not None:
                about["predicted_mse"] = self._predictor.total(plan)
        return about

    def _costs_of(self, levels: Sequence[str]) -> Tensor:
        return self._costs[[self._family.names.index(name) for name in levels]]

    def _levels(self) -> list[tuple[str, ...]]:
        """The subsets of levels to choose from: only the given one, or all with the largest level."""
        spec, names = self._spec, tuple(self._family.names)
        if spec.levels is not None:
            return [tuple(spec.levels)]
        if spec.probabilities == "learned":
            return [self._family.fitted.coefficients_for(self._family).levels or names]
        if self._predictor is None or not isinstance(spec.probabilities, str):
            return [names]
        return _subsets(spec, names)

    def _for_budget(self, budget: float) -> Plan:
        """The best plan that spends at most `budget`, in evaluations of the largest level."""
        plan = self._best(self._levels(), budget)
        if plan is None and self._predictor is not None:
            plan = self._best(_without_largest(self._spec, tuple(self._family.names)), budget)
        if plan is None:
            share = self._spec.budget or 1.0
            outside = f", but {self._outside:.3g} are spent outside the networks" if budget < 0 else ""
            raise ValueError(
                f"budget={self._spec.budget} of {self._rows} evaluations is {share * self._rows:.3g} evaluations of "
                f"the largest level{outside}: no plan is that cheap; raise it, or use fewer steps"
            )
        return plan

    def _best(self, subsets: list[tuple[str, ...]], budget: float) -> Plan | None:
        """The best plan on these sets of levels, or None if no plan is that cheap."""
        predictor, spec = self._predictor, self._spec
        if spec.searched:
            assert predictor is not None
            if not ESTIMATORS[spec.estimator].holds:
                return switches(predictor, subsets, self._costs, budget)
            return search(predictor, subsets, self._costs, self._order, spec.estimator, budget)
        plans = [plan for levels in subsets if (plan := self._spending(levels, budget)) is not None]
        if predictor is None or len(plans) < 2:
            return plans[-1] if plans else None
        return min(plans, key=predictor.choice)

    def _spending(self, levels: tuple[str, ...], budget: float) -> Plan | None:
        """The plan with coins on these levels that spends `budget`; None if none is that cheap.

        Coins can be arbitrarily rare: if levels may be left out, a plan runs its largest at least once per sample on
        average.
        """
        costs, tossed = self._costs_of(levels), ESTIMATORS[self._spec.estimator].searched

        def spent(factor: float) -> float:
            return self._draw(levels, factor, tossed).expected_cost(costs)

        low, high = 1e-9, 1e9
        if spent(low) > budget:
            return None
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if spent(middle) <= budget else (low, middle)
        plan = self._draw(levels, low)
        never = self._spec.chooses_levels and plan.probabilities[:, -1].sum() < 1
        return None if never else plan

    def _draw(self, levels: tuple[str, ...], factor: float, tossed: bool = True) -> Plan:
        """tossed: whether coins are tossed, which the expected cost needs only where they choose the rows."""
        spec = self._spec
        return Plan.draw(
            self._probabilities(levels, factor),
            spec.coins or COINS[0],
            spec.seed,
            estimator=spec.estimator,
            order=self._order,
            levels=levels,
            per_sample=spec.per_sample or not tossed,
        )

    def _probabilities(self, levels: tuple[str, ...], factor: float) -> Tensor:
        """p_k: (R, K). factor: scales all but the first level's; for learned coefficients it is e^delta."""
        spec = self._spec
        if spec.probabilities == "learned":
            return self._learned(levels, spec.delta if spec.delta is not None else math.log(factor))
        if levels not in self._laws:
            self._laws[levels] = self._law(levels)
        table, numbers = self._laws[levels], not isinstance(spec.probabilities, str)
        p = (table * factor).clamp(1e-9, 1.0)
        p[:, 0] = table[:, 0].clamp(max=1.0) if numbers else 1.0
        return p

    def _law(self, levels: tuple[str, ...]) -> Tensor:
        """The probabilities before they are scaled: (R, K)."""
        law = self._spec.probabilities
        if law == "calibrated":
            assert self._predictor is not None
            return self._predictor.allocation(levels, self._costs)
        if law == "theory":
            costs = self._costs_of(levels)
            return ((costs / costs[0]) ** -(0.5 + 1 / self._spec.gamma)).expand(self._rows, -1)
        assert not isinstance(law, str)
        _refuse_count(law, levels)
        return torch.tensor(law, dtype=torch.float64).expand(self._rows, -1)

    def _learned(self, levels: tuple[str, ...], delta: float) -> Tensor:
        learned = self._family.fitted.coefficients_for(self._family)
        own = learned.levels or tuple(self._family.names)
        if levels != own:
            raise ValueError(f"learned coefficients are for {', '.join(own)}, got levels={', '.join(levels)}")
        return learned.probabilities(self._family.schedule, [point.t for point in self._points], delta)

    def _for_error(self, mse: float) -> Plan:
        """The plan of the smallest budget, to a hundredth, whose predicted error is at most `mse`."""
        predictor = self._predictor
        assert predictor is not None
        discretisation = predictor.discretisation
        if discretisation is None or discretisation >= mse:
            found = "was not measured" if discretisation is None else f"is {discretisation:.2g}"
            raise ValueError(
                f"mse={mse:g}: the error of {self._solver.name} in {self._grid.steps} steps on the {self._grid.name} "
                f"grid alone {found}; use more steps, or another solver"
            )
        best = self._for_budget(float(self._rows))
        if (error := predictor.total(best)) > mse:  # levels= without the largest
            names = ", ".join(self._levels()[-1])
            raise ValueError(
                f"mse={mse:g}: the levels {names} reach {error:.2g} at best; add a larger level to "
                "levels=, or leave it out"
            )
        low, high = self._costs[0].item(), float(self._rows)
        for _ in range(12):
            if high < 1.01 * low:
                break
            middle = math.sqrt(low * high)
            plan = self._best(self._levels(), middle)
            if plan is None or predictor.total(plan) > mse:
                low = middle
            else:
                # it may cost less than its budget
                best, high = plan, min(middle, plan.cost(self._costs_of(plan.levels)))
        return best
