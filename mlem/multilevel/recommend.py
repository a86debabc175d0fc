"""What to run: the fastest way to an error, or the least error in a time.

Candidates are every solver and grid whose error was measured, in as many steps or more: the largest level alone, and,
on those that pilots were run on, plans on every subset of levels, each with the deep features of the largest level
reused or not. Errors are those of the calibration, and the upper end of their interval is what counts; seconds are
those of a call of each level as the loop makes it, and of a step outside. A plan is searched for only where it may be
faster than the best that is known.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mlem.grids import TimeGrid
from mlem.multilevel.calibration import COMMAND, KINDS, Calibration
from mlem.multilevel.candidate import SURE, WIDE, Candidate, Recommendation
from mlem.multilevel.choices import check_choice
from mlem.multilevel.correction import PILOTS, RECOMMENDED, REUSES
from mlem.multilevel.identity import found_plan, seen_reusing
from mlem.multilevel.plan import Plan
from mlem.multilevel.predict import Predictor
from mlem.multilevel.spec import PlanSpec
from mlem.multilevel.timing import timed_here
from mlem.networks import Reuse
from mlem.solvers import SOLVERS, GridPoint, Solver, make_solver

if TYPE_CHECKING:
    from mlem.family import Family

__all__ = ["recommend"]

MOST_STEPS = 1000
"""Of a candidate."""
SHARES = (0.2, 0.4, 0.6, 0.8)
"""Shares of the error that may be the solver's own; the rest is the plan's."""
LONGER = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""How many times as many steps as the largest level alone could take a plan is tried with."""
WORTH = 1.03
"""Times as long as it takes for which a plan of several levels counts: to gain less it is not worth the trouble."""
NEAR = 1.25
"""Plans are searched for on solvers and grids that need so many times the steps of the best at most."""
HALVINGS = 5
"""Of the interval in which the budget of a plan is looked for."""


def recommend(
    family: Family,
    *,
    mse: float | None = None,
    seconds: float | None = None,
    kind: str = "ode",
    batch_size: int = 64,
) -> Recommendation:
    """The fastest way to an error, or the least error in a time, on this machine.

    Where the family was calibrated on another machine, its levels are timed here first, which takes seconds.

    Args:
        mse: mean squared error per pixel to the many-step run of the largest level from the same noise, > 0.
        seconds: wall seconds an image, > 0; one of the two is given.
        kind: "ode" or "sde": what is solved.
        batch_size: images in a batch.

    Raises:
        ValueError: no target or two, the family is not calibrated, or nothing reaches the target.
    """
    if (mse is None) == (seconds is None):
        raise ValueError("recommend() takes mse=, the error that is allowed, or seconds= an image; give one of them")
    name, target = ("mse", mse) if mse is not None else ("seconds", seconds)
    if target is None or not 0 < target < math.inf:
        raise ValueError(f"{name} must be a number > 0, got {target!r}")
    check_choice("kind", kind, KINDS)
    choosing = _ForError if mse is not None else _ForTime
    return choosing(family, target, kind, batch_size).choice()


@dataclass(frozen=True)
class _Way:
    """How the largest level runs, and the family as planning sees it then; reuse: None, whole."""

    family: Family
    calibration: Calibration
    reuse: Reuse | None = None


@dataclass
class _Choosing:
    """A family, what is asked, and the candidates that were found."""

    family: Family
    target: float
    kind: str
    batch_size: int
    found: list[Candidate] = field(default_factory=list[Candidate])

    def __post_init__(self) -> None:
        family = self.family
        self.calibration = timed_here(family, family.fitted.calibration_for(family), self.batch_size)
        family.fitted = replace(family.fitted, calibration=self.calibration)
        self.ways = [*self._reusing(), _Way(family, self.calibration)]
        self._seconds = {name: self.seconds({name: 1.0}, 0) for name in family.names}
        self.outside = self.seconds({}, 1)
        if next(self.methods(), None) is None:
            raise ValueError(f"no error of an {self.kind.upper()} solver was measured of this family: {COMMAND}")

    def _reusing(self) -> Iterator[_Way]:
        """Ways to reuse deep features of the largest level, those that were measured."""
        for reuse in REUSES:
            with suppress(ValueError):
                seen = seen_reusing(self.family, reuse)
                yield _Way(seen, seen.fitted.calibration_for(seen), reuse)

    def methods(self) -> Iterator[tuple[Solver, str]]:
        """Solvers of the kind, and the grids that they were measured on."""
        for key in self.calibration.discretisation:
            name, _, grid = key.rpartition("/")
            if name in SOLVERS and SOLVERS[name].stochastic == (self.kind == "sde"):
                yield make_solver(name), grid

    def piloted(self) -> Iterator[tuple[Solver, str]]:
        """Those on which it is known how far predictions of plans are off."""
        known = {(name, grid) for name, grid, *_ in PILOTS}
        return ((solver, grid) for solver, grid in self.methods() if (solver.name, grid) in known)

    def seconds(self, calls: Mapping[str, float], steps: int, reuse: Reuse | None = None) -> float:
        """Wall seconds an image."""
        return self.calibration.predicted_seconds(calls, steps, self.kind, self.batch_size, reuse)

    def step_seconds(self, level: str) -> float:
        """Wall seconds an image of a step of this level alone."""
        return self._seconds[level] + self.outside

    def grid(self, solver: Solver, grid: str, steps: int) -> TimeGrid:
        return solver.grid(self.family.schedule, steps, grid)

    def predictor(self, solver: Solver, grid: str, steps: int, calibration: Calibration | None = None) -> Predictor:
        schedule = self.family.schedule
        return Predictor(calibration or self.calibration, schedule, solver, self.grid(solver, grid, steps))

    def measured(self, solver: Solver, grid: str) -> Sequence[int]:
        return sorted(self.calibration.discretisation[f"{solver.name}/{grid}"])

    def alone(self, solver: Solver, grid: str, steps: int) -> Candidate:
        """The largest level, whole at every step."""
        by, level = self.predictor(solver, grid, steps), self.family.names[-1]
        errors = by.discretisation or 0.0, by.discretisation_spread
        return self._add(solver, grid, steps, errors, self.seconds({level: by.rows}, steps), level=level)

    def reused(self) -> None:
        """The largest level alone, its features reused, in the steps that were measured: between them errors jump."""
        level, known = self.family.names[-1], self.calibration.discretisation
        for (solver, grid), way in itertools.product(self.piloted(), self.ways):
            key = f"{solver.name}/{grid}/{way.reuse}"
            for steps, error in known.get(key, {}).items():
                by = self.predictor(solver, grid, steps)
                # a few images may say that it errs less than the whole network
                spread = max(self.calibration.stderr[key][steps] / error, by.discretisation_spread)
                errors = max(error, by.discretisation or 0.0), spread
                seconds = self.seconds({level: float(steps)}, steps, way.reuse)
                self._add(solver, grid, steps, errors, seconds, level=level, reuse=way.reuse)

    def planned(self, solver: Solver, grid: str, steps: int, spec: PlanSpec, way: _Way) -> Candidate | None:
        """A plan; None where no plan costs so little."""
        points = GridPoint.of(self.family.schedule, self.grid(solver, grid, steps))
        try:
            plan = found_plan(spec, way.family, solver, points)
        except ValueError:
            return None
        by, names = self.predictor(solver, grid, steps, way.calibration), plan.levels or self.family.names
        calls: dict[str, float] = dict(zip(names, plan.expected_calls.tolist(), strict=True))
        reuse = way.reuse if calls.get(self.family.names[-1], 0.0) > 1 else None
        alone = len(names) == 1 and reuse is None  # which needs no plan
        how: dict[str, Any] = {"level": names[0]} if alone else {"plan": plan, "reuse": reuse}
        return self._add(
            solver, grid, steps, (by.total(plan), by.spread(plan)), self.seconds(calls, steps, reuse), **how
        )

    def _add(
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

    def spec(self, estimator: str, seconds: float, steps: int, way: _Way) -> PlanSpec | None:
        """A plan of so many wall seconds an image in so many steps; None where that is no share of the largest."""
        top = {self.family.names[-1]: 1.0}
        budget = seconds / (steps * way.calibration.predicted_seconds(top, 1, self.kind, self.batch_size))
        if not 0 < budget <= 1:
            return None
        return PlanSpec(budget=budget, estimator=estimator, batch_size=self.batch_size)

    def recommendation(self, order: list[Candidate], met: str, missed: str) -> Recommendation:
        """The first of these, the others of other kinds behind it."""
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
            return f"{top} alone {met}: {levels}, and no plan that was found does better"
        if plain is None:
            return f"{missed}: {levels}"
        if best.predicted_seconds < 0.99 * plain.predicted_seconds:
            gain = f"{plain.predicted_seconds / best.predicted_seconds:.2g} times as fast as"
        else:
            gain = f"{plain.predicted_mse / best.predicted_mse:.2g} times less error than"
        return f"{gain} {top} alone in {plain.steps} steps of {plain.solver}: {levels}"


class _ForError(_Choosing):
    """The fastest way to an error."""

    def choice(self) -> Recommendation:
        for solver, grid in self.methods():
            self._alone(solver, grid)
        self.reused()
        if len(self.family.names) > 1:
            for share in SHARES:
                for solver, grid, steps in self._best_methods(share * self.target):
                    for estimator, way in itertools.product(RECOMMENDED, self.ways):
                        self._searched(solver, grid, steps, estimator, way)
        good = sorted(self._reaching(), key=lambda one: one.predicted_seconds * (1.0 if one.plan is None else WORTH))
        if not good:
            errors = [by.discretisation_at(MOST_STEPS) for by in self._longest()]
            least = min(error for error in errors if error is not None)
            raise ValueError(
                f"mse={self.target:g}: nothing reaches it for sure in {MOST_STEPS} steps, where {least:.2g} are left; "
                "allow more, or calibrate on more images"
            )
        return self.recommendation(good, "is fastest", "the largest level alone does not reach it")

    def _longest(self) -> list[Predictor]:
        return [self.predictor(solver, grid, self.measured(solver, grid)[-1]) for solver, grid in self.methods()]

    def _reaching(self) -> list[Candidate]:
        return [one for one in self.found if one.upper_mse <= self.target]

    def _steps(self, solver: Solver, grid: str, error: float, sure: bool) -> int | None:
        """The fewest steps of the largest level to this error; sure: for the upper end; None: too many."""
        known = self.measured(solver, grid)
        by = self.predictor(solver, grid, known[0])
        margin = math.exp(SURE * by.discretisation_spread) if sure else 1.0

        def reached(steps: int) -> bool:
            return (by.discretisation_at(steps) or 0.0) * margin <= error

        # between two measured counts errors fall or rise; over all of them they need not fall
        high = next((steps for steps in (*known, MOST_STEPS) if reached(steps)), None)
        if high is None:
            return None
        low = max((steps for steps in known if steps < high), default=high - 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        return high

    def _alone(self, solver: Solver, grid: str) -> None:
        steps = self._steps(solver, grid, self.target, sure=True)
        while steps is not None and steps <= MOST_STEPS and self.alone(solver, grid, steps).upper_mse > self.target:
            steps += 1

    def _best_methods(self, error: float) -> list[tuple[Solver, str, int]]:
        """Solvers and grids that come to this error in few steps, and how many."""
        found = [(solver, grid, self._steps(solver, grid, error, sure=False)) for solver, grid in self.piloted()]
        known = [(solver, grid, steps) for solver, grid, steps in found if steps is not None]
        fewest = min((steps for _, _, steps in known), default=0)
        return [(solver, grid, steps) for solver, grid, steps in known if steps <= NEAR * fewest]

    def _searched(self, solver: Solver, grid: str, steps: int, estimator: str, way: _Way) -> None:
        """Plans in so many steps, the cheaper the better."""
        best = min((one.predicted_seconds for one in self._reaching()), default=math.inf)
        high = min(best, steps * self.step_seconds(self.family.names[-1]))
        low = steps * self.step_seconds(self.family.names[0])
        if low >= high or not self._reaches(solver, grid, steps, estimator, way, high):
            return
        for _ in range(HALVINGS):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self._reaches(solver, grid, steps, estimator, way, middle) else (middle, high)

    def _reaches(self, solver: Solver, grid: str, steps: int, estimator: str, way: _Way, seconds: float) -> bool:
        spec = self.spec(estimator, seconds, steps, way)
        one = None if spec is None else self.planned(solver, grid, steps, spec, way)
        return one is not None and one.upper_mse <= self.target


class _ForTime(_Choosing):
    """The least error in a time."""

    def choice(self) -> Recommendation:
        top = self.family.names[-1]
        most = int(self.target / self.step_seconds(top))
        self.reused()
        if most >= 1:
            for solver, grid in self.methods():
                self.alone(solver, grid, min(most, MOST_STEPS))
        if len(self.family.names) > 1:
            for steps in sorted({min(round(max(most, 4) * longer), MOST_STEPS) for longer in LONGER}):
                methods = self._best_methods(steps)
                for (solver, grid), estimator, way in itertools.product(methods, RECOMMENDED, self.ways):
                    if (spec := self.spec(estimator, self.target, steps, way)) is not None:
                        self.planned(solver, grid, steps, spec, way)
        good = [one for one in self.found if one.predicted_seconds <= 1.0001 * self.target]
        if not good:
            raise ValueError(
                f"seconds={self.target:g} an image: a step of {self.family.names[0]} takes "
                f"{self.step_seconds(self.family.names[0]):.2g}; allow more"
            )
        good.sort(key=lambda one: one.upper_mse)
        return self.recommendation(good, "errs least", "the largest level alone takes longer")

    def _best_methods(self, steps: int) -> list[tuple[Solver, str]]:
        """Solvers and grids that err little in so many steps."""
        errors = {
            (solver, grid): self.predictor(solver, grid, steps).discretisation or 0.0 for solver, grid in self.piloted()
        }
        least = min(errors.values(), default=0.0)
        return [method for method, error in errors.items() if error <= NEAR**2 * least]
