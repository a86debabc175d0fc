"""Candidates of a recommendation: their times and errors, predicted from calibration and pilots."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mlem.grids import TimeGrid
from mlem.multilevel.ahead import FORECASTS, Ahead
from mlem.multilevel.alone import error_alone
from mlem.multilevel.calibration import COMMAND, Calibration
from mlem.multilevel.candidate import WIDE, Candidate, Recommendation
from mlem.multilevel.correction import PILOTS, REUSES
from mlem.multilevel.identity import found_plan, seen_reusing
from mlem.multilevel.plan import Plan
from mlem.multilevel.predict import Predictor
from mlem.multilevel.spec import PlanSpec
from mlem.multilevel.timing import timed_here
from mlem.networks import Reuse
from mlem.reusing import whole_calls
from mlem.solvers import SOLVERS, GridPoint, Solver, make_solver

if TYPE_CHECKING:
    from mlem.family import Family

__all__ = ["Choosing", "Way"]


@dataclass(frozen=True)
class Way:
    """How the largest level runs, and the family and calibration for planning then; reuse: None, whole."""

    family: Family
    calibration: Calibration
    reuse: Reuse | None = None


@dataclass
class Choosing:
    """A family, a request, and the candidates found."""

    family: Family
    target: float
    kind: str
    batch_size: int
    found: list[Candidate] = field(default_factory=list[Candidate])

    def __post_init__(self) -> None:
        family = self.family
        self.calibration = timed_here(family, family.fitted.calibration_for(family), self.batch_size)
        family.fitted = replace(family.fitted, calibration=self.calibration)
        self.ways = [*self._reusing(), Way(family, self.calibration)]
        self._seconds = {name: self.seconds({name: 1.0}, 0) for name in family.names}
        self.outside = self.seconds({}, 1)
        self._predictors: dict[tuple[object, ...], Predictor] = {}
        if next(self.methods(), None) is None:
            raise ValueError(f"no error of an {self.kind.upper()} solver was measured for this family: {COMMAND}")

    def _reusing(self) -> Iterator[Way]:
        """The measured ways to reuse deep features of the largest level."""
        for reuse in REUSES:
            with suppress(ValueError):
                seen = seen_reusing(self.family, reuse)
                yield Way(seen, seen.fitted.calibration_for(seen), reuse)

    def methods(self) -> Iterator[tuple[Solver, str]]:
        """Solvers of the kind, and the grids on which they were measured."""
        for key in self.calibration.discretisation:
            name, _, grid = key.rpartition("/")
            if name in SOLVERS and SOLVERS[name].stochastic == (self.kind == "sde"):
                yield make_solver(name), grid

    def piloted(self) -> Iterator[tuple[Solver, str]]:
        """Solvers and grids with pilots."""
        known = {(name, grid) for name, grid, *_ in PILOTS}
        return ((solver, grid) for solver, grid in self.methods() if (solver.name, grid) in known)

    def seconds(
        self, calls: Mapping[str, float], steps: int, reuse: Reuse | None = None, whole: int | None = None
    ) -> float:
        """Wall-clock seconds per image; whole: calls that reuse no features, by default every Nth."""
        return self.calibration.predicted_seconds(calls, steps, self.kind, self.batch_size, reuse, whole)

    def step_seconds(self, level: str) -> float:
        """Wall-clock seconds per image of a step of this level alone."""
        return self._seconds[level] + self.outside

    def grid(self, solver: Solver, grid: str, steps: int) -> TimeGrid:
        return solver.grid(self.family.schedule, steps, grid)

    def predictor(self, solver: Solver, grid: str, steps: int, way: Way | None = None) -> Predictor:
        """Made once. way: the last, the whole network, by default."""
        way, schedule = way or self.ways[-1], self.family.schedule
        key = (solver.name, grid, steps, way.reuse)
        if key not in self._predictors:
            self._predictors[key] = Predictor(way.calibration, schedule, solver, self.grid(solver, grid, steps))
        return self._predictors[key]

    def measured(self, solver: Solver, grid: str) -> Sequence[int]:
        return sorted(self.calibration.discretisation[f"{solver.name}/{grid}"])

    def alone(self, solver: Solver, grid: str, steps: int) -> Candidate:
        """The largest level, whole at every step."""
        by, level = self.predictor(solver, grid, steps), self.family.names[-1]
        errors = by.discretisation or 0.0, by.discretisation_spread
        return self.add(solver, grid, steps, errors, self.seconds({level: by.rows}, steps), level=level)

    def sparing(self) -> None:
        """The largest level alone, reusing features or forecast."""
        level = self.family.names[-1]
        for (solver, grid), way in itertools.product(self.piloted(), self.ways):
            for steps, by, errors in self._measured(solver, grid, way.reuse):
                whole = None if way.reuse is None else whole_calls(way.reuse, by.evaluations)
                seconds = self.seconds({level: float(steps)}, steps, way.reuse, whole)
                self.add(solver, grid, steps, errors, seconds, level=level, reuse=way.reuse)
        for (solver, grid), ahead in itertools.product(self.piloted(), FORECASTS):
            for steps, _, errors in self._measured(solver, grid, ahead):
                plan = ahead.plan(level, steps)
                self.add(solver, grid, steps, errors, self.seconds({level: plan.calls.item()}, steps), plan=plan)

    def _measured(
        self, solver: Solver, grid: str, how: Reuse | Ahead | None
    ) -> Iterator[tuple[int, Predictor, tuple[float, float]]]:
        """The measured numbers of steps, between which errors jump, a predictor for each, and the error as in `add`."""
        key = f"{solver.name}/{grid}/{how}"
        for steps in self.calibration.discretisation.get(key, {}):
            by, found = self.predictor(solver, grid, steps), error_alone(self.calibration, key, steps)
            assert found is not None
            # on a few images its error may seem smaller than that of the whole network at every step
            yield steps, by, (max(found.error, by.discretisation or 0.0), max(found.spread, by.discretisation_spread))

    def planned(self, solver: Solver, grid: str, steps: int, spec: PlanSpec, way: Way) -> Candidate | None:
        """A plan; None if no plan is that cheap."""
        points = GridPoint.of(self.family.schedule, self.grid(solver, grid, steps))
        try:
            plan = found_plan(spec, way.family, solver, points)
        except ValueError:
            return None
        by, names = self.predictor(solver, grid, steps, way), plan.levels or self.family.names
        calls: dict[str, float] = dict(zip(names, plan.expected_calls.tolist(), strict=True))
        reuse = way.reuse if calls.get(self.family.names[-1], 0.0) > 1 else None
        alone = len(names) == 1 and reuse is None  # which needs no plan
        how: dict[str, Any] = {"level": names[0]} if alone else {"plan": plan, "reuse": reuse}
        whole = None if reuse is None else whole_calls(reuse, by.evaluations, plan)
        seconds = self.seconds(calls, steps, reuse, whole)
        return self.add(solver, grid, steps, (by.total(plan), by.spread(plan)), seconds, **how)

    def add(
        self,
        solver: Solver,
        grid: str,
        steps: int,
        errors: tuple[float, float],
        seconds: float,
        level: str | None = None,
        plan: Plan | None = None,
        reuse: Reuse | None = None,
    ) -> Candidate:
        """A candidate; errors: predicted, and the standard error of its logarithm."""
        error, spread = errors
        interval = (error * math.exp(-WIDE * spread), error * math.exp(WIDE * spread))
        measured = self.measured(solver, grid)
        beyond = not measured[0] <= steps <= measured[-1]
        one = Candidate(solver.name, steps, grid, level, plan, error, interval, seconds, beyond, reuse)
        self.found.append(one)
        return one

    def spec(
        self, estimator: str, seconds: float, steps: int, way: Way, levels: tuple[str, ...] | None = None
    ) -> PlanSpec | None:
        """A plan of these seconds per image and these steps; None if that is not a share of the largest level."""
        top = {self.family.names[-1]: 1.0}
        budget = seconds / (steps * way.calibration.predicted_seconds(top, 1, self.kind, self.batch_size))
        if not 0 < budget <= 1:
            return None
        return PlanSpec(budget=budget, estimator=estimator, batch_size=self.batch_size, levels=levels)

    def recommendation(self, order: list[Candidate], met: str, missed: str) -> Recommendation:
        """The first of these, with the others of other kinds as alternatives."""
        best, others, kinds = order[0], list[Candidate](), set[tuple[object, ...]]()
        for one in order:
            key = (one.solver, one.level, one.reuse is None, None if one.plan is None else one.plan.estimator)
            if key not in kinds and one is not best:
                others.append(one)
            kinds.add(key)
        return Recommendation(
            **{name: getattr(best, name) for name in Candidate.__dataclass_fields__},
            alternatives=tuple(others[:8]),
            why=self._why(best, order, met, missed),
        )

    def _why(self, best: Candidate, order: list[Candidate], met: str, missed: str) -> str:
        top = self.family.names[-1]
        plain = next((one for one in order if one.level == top and one.reuse is None), None)
        ratio = self._seconds[top] / self._seconds[self.family.names[0]]
        levels = f"a call of {top} takes {ratio:.3g} times as long as one of {self.family.names[0]}"
        if best.plan is None and best.level == top and best.reuse is None:
            return f"{top} alone {met}: {levels}, and no plan found is better"
        if plain is None:
            return f"{missed}: {levels}"
        if best.predicted_seconds < 0.99 * plain.predicted_seconds:
            gain = f"{plain.predicted_seconds / best.predicted_seconds:.2g} times as fast as"
        else:
            gain = f"{plain.predicted_mse / best.predicted_mse:.2g} times less error than"
        gain = f"{gain} {top} alone in {plain.steps} steps of {plain.solver}"
        runs = (best.level,) if best.plan is None else best.plan.levels
        return gain if runs == (top,) else f"{gain}: {levels}"
