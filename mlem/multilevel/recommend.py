"""What to run: the fastest way to an error, or the least error in a time.

Candidates are all solvers and grids with a measured error, in as many steps or more: the largest level alone, and, on
those with pilots, plans on every subset of levels, each with or without reuse of the largest level's deep features; and
forecasts of the largest level.
Errors come from the calibration, and the upper end of their interval counts; seconds are those of calls of the levels
in the loop, and of steps outside. A plan is searched for only if it may be faster than the best known candidate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mlem.multilevel.calibration import KINDS
from mlem.multilevel.candidate import SURE, Candidate, Recommendation
from mlem.multilevel.checking import adjusted, judge_of
from mlem.multilevel.choices import check_choice
from mlem.multilevel.choosing import Choosing, Way
from mlem.multilevel.correction import RECOMMENDED
from mlem.multilevel.predict import Predictor
from mlem.solvers import Solver

if TYPE_CHECKING:
    from mlem.family import Family

__all__ = ["recommend"]

MOST_STEPS = 1000
"""Of a candidate."""
SHARES = (0.4, 0.6, 0.2, 0.8)
"""Shares of the error allowed to the solver, in the order tried; the rest is the plan's."""
BEST = 3
"""How many pairs of estimator and way to run the largest level are kept after the first share or number of steps."""
LONGER = (2.0, 1.0, 1.5, 3.0, 4.0, 6.0)
"""Steps tried for plans, relative to those of the largest level alone."""
WORTH = 1.03
"""Factor on the time of multilevel plans in comparisons: a smaller gain is not worth the trouble."""
NEAR = 1.25
"""Plans are searched for on solvers and grids that need at most this many times the steps of the best."""
HALVINGS = 5
"""Bisections of the interval in which the budget of a plan is searched."""


def recommend(
    family: Family,
    *,
    mse: float | None = None,
    seconds: float | None = None,
    kind: str = "ode",
    batch_size: int = 64,
    check: int = 0,
) -> Recommendation:
    """The fastest way to an error, or the least error in a time, on this machine.

    If the family was calibrated on another machine, its levels are first timed here, which takes seconds.

    Args:
        mse: mean squared error per pixel to the many-step run of the largest level from the same noise, > 0.
        seconds: wall-clock seconds per image, > 0; exactly one of the two is given.
        kind: "ode" or "sde".
        batch_size: images per batch.
        check: images on which choices are measured, and for mse the search goes on until one is as fast as it may
            be; 0: predictions suffice.

    Raises:
        ValueError: not exactly one target, an uncalibrated family, or nothing reaches the target.
    """
    if (mse is None) == (seconds is None):
        raise ValueError("recommend() takes mse=, the allowed error, or seconds=, per image; pass one of them")
    name, target = ("mse", mse) if mse is not None else ("seconds", seconds)
    if target is None or not 0 < target < math.inf:
        raise ValueError(f"{name} must be a number > 0, got {target!r}")
    check_choice("kind", kind, KINDS)
    if not check:
        return _predicted(family, mse, seconds, kind, batch_size)
    judge = judge_of(family, check)
    if mse is not None:
        return adjusted(lambda error: _predicted(family, error, None, kind, batch_size), mse, judge)
    choice = _predicted(family, None, seconds, kind, batch_size)
    return replace(choice, check=judge(choice))


def _predicted(family: Family, mse: float | None, seconds: float | None, kind: str, batch_size: int) -> Recommendation:
    if mse is not None:
        return _ForError(family, mse, kind, batch_size).choice()
    assert seconds is not None
    return _ForTime(family, seconds, kind, batch_size).choice()


def _best(tried: Sequence[tuple[str, Way]], good: Sequence[Candidate]) -> list[tuple[str, Way]]:
    """The estimators and ways whose plans come first among good candidates, best first."""
    order = [(one.plan.estimator, one.reuse) if one.plan else None for one in good]

    def place(one: tuple[str, Way]) -> int:
        key = (one[0], one[1].reuse)
        return order.index(key) if key in order else len(order)

    return sorted(tried, key=place)[:BEST]


class _ForError(Choosing):
    """The fastest way to an error."""

    def choice(self) -> Recommendation:
        for solver, grid in self.methods():
            self._alone(solver, grid)
        self.sparing()
        if len(self.family.names) > 1:
            tried = [*itertools.product(RECOMMENDED, self.ways)]
            for share in SHARES:
                for solver, grid, steps in self._best_methods(share * self.target):
                    for estimator, way in tried:
                        self._searched(solver, grid, steps, estimator, way)
                tried = _best(tried, sorted(self._reaching(), key=lambda one: one.predicted_seconds))
        good = sorted(self._reaching(), key=lambda one: one.predicted_seconds * (1.0 if one.plan is None else WORTH))
        if not good:
            errors = [by.discretisation_at(MOST_STEPS) for by in self._longest()]
            least = min(error for error in errors if error is not None)
            raise ValueError(
                f"mse={self.target:g}: nothing surely reaches it in {MOST_STEPS} steps, where {least:.2g} remains; "
                "allow more, or calibrate on more images"
            )
        return self.recommendation(good, "is fastest", "the largest level alone does not reach it")

    def _longest(self) -> list[Predictor]:
        return [self.predictor(solver, grid, self.measured(solver, grid)[-1]) for solver, grid in self.methods()]

    def _reaching(self) -> list[Candidate]:
        return [one for one in self.found if one.upper_mse <= self.target]

    def _steps(self, solver: Solver, grid: str, error: float, sure: bool) -> int | None:
        """The fewest steps of the largest level to this error; sure: to its upper end; None: too many."""
        known = self.measured(solver, grid)
        by = self.predictor(solver, grid, known[0])
        margin = math.exp(SURE * by.discretisation_spread) if sure else 1.0

        def reached(steps: int) -> bool:
            return (by.discretisation_at(steps) or 0.0) * margin <= error

        # between two measured counts errors are monotone; over all of them they need not fall
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
        """Solvers and grids that reach this error in few steps, and how many."""
        found = [(solver, grid, self._steps(solver, grid, error, sure=False)) for solver, grid in self.piloted()]
        known = [(solver, grid, steps) for solver, grid, steps in found if steps is not None]
        fewest = min((steps for _, _, steps in known), default=0)
        return [(solver, grid, steps) for solver, grid, steps in known if steps <= NEAR * fewest]

    def _searched(self, solver: Solver, grid: str, steps: int, estimator: str, way: Way) -> None:
        """Plans in this many steps, as cheap as possible: on the levels of the first, then once more on any."""
        best = min((one.predicted_seconds for one in self._reaching()), default=math.inf)
        high = min(best, steps * self.step_seconds(self.family.names[-1]))
        low = steps * self.step_seconds(self.family.names[0])

        def reached(seconds: float, levels: tuple[str, ...] | None) -> Candidate | None:
            spec = self.spec(estimator, seconds, steps, way, levels)
            one = None if spec is None else self.planned(solver, grid, steps, spec, way)
            return one if one is not None and one.upper_mse <= self.target else None

        first = reached(high, None) if low < high else None
        if first is None or first.plan is None:  # one level takes what it takes
            return
        levels = first.plan.levels or tuple(self.family.names)
        for _ in range(HALVINGS):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if reached(middle, levels) else (middle, high)
        reached(math.sqrt(low * high), None)


class _ForTime(Choosing):
    """The least error in a time."""

    def choice(self) -> Recommendation:
        top = self.family.names[-1]
        most = int(self.target / self.step_seconds(top))
        self.sparing()
        if most >= 1:
            for solver, grid in self.methods():
                self.alone(solver, grid, min(most, MOST_STEPS))
        if len(self.family.names) > 1:
            tried = [*itertools.product(RECOMMENDED, self.ways)]
            for steps in dict.fromkeys(min(round(max(most, 4) * longer), MOST_STEPS) for longer in LONGER):
                for (solver, grid), (estimator, way) in itertools.product(self._best_methods(steps), tried):
                    if (spec := self.spec(estimator, self.target, steps, way)) is not None:
                        self.planned(solver, grid, steps, spec, way)
                tried = _best(tried, self._in_time())
        good = self._in_time()
        if not good:
            raise ValueError(
                f"seconds={self.target:g} per image: a step of {self.family.names[0]} takes "
                f"{self.step_seconds(self.family.names[0]):.2g}; allow more"
            )
        return self.recommendation(good, "errs least", "the largest level alone takes longer")

    def _in_time(self) -> list[Candidate]:
        """Candidates that take no longer, by ascending error."""
        good = [one for one in self.found if one.predicted_seconds <= 1.0001 * self.target]
        return sorted(good, key=lambda one: one.upper_mse)

    def _best_methods(self, steps: int) -> list[tuple[Solver, str]]:
        """Solvers and grids with small errors in this many steps."""
        errors = {
            (solver, grid): self.predictor(solver, grid, steps).discretisation or 0.0 for solver, grid in self.piloted()
        }
        least = min(errors.values(), default=0.0)
        return [method for method, error in errors.items() if error <= NEAR**2 * least]
