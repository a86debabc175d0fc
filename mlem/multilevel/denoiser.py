"""Multilevel sampling as a denoiser: a sum over levels of a family, most of them rarely evaluated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlem.conditions import ConditionSource, conditions_of
from mlem.denoiser import Conditional, Denoiser, NetworkDenoiser
from mlem.level import Level
from mlem.multilevel.estimators import ESTIMATORS
from mlem.multilevel.evaluators import Evaluator, OwnCoinsEvaluator
from mlem.multilevel.plan import Plan
from mlem.schedule import NoiseSchedule
from mlem.solvers import EvaluationPoint, GridPoint, model_input

if TYPE_CHECKING:
    from mlem.family import Family

__all__ = ["MultilevelDenoiser", "MultilevelTrajectory"]

SAME = 1e-12
"""Relative difference of two states that is only rounding."""


class MultilevelDenoiser:
    """The levels of a family under a plan.

    `begin` starts a trajectory, which makes the evaluations of the plan in order. The object is also a plain denoiser:
    each call is the next evaluation of the trajectory begun by `start`, or, after its last evaluation, of a new one.
    Such a caller must evaluate the whole batch in one call, as often as the plan has evaluations, and must call `start`
    after aborting a trajectory.

    Args:
        model: a Family, or denoisers, cheapest first (then with `schedule`).
        plan: with one row per evaluation of a trajectory.
        schedule: of bare denoisers.

    Raises:
        ValueError: the plan's levels are not those of the model, or bare denoisers come without a schedule.
    """

    any_dtype = True

    def __init__(
        self, model: Family | Sequence[Denoiser], plan: Plan, *, schedule: NoiseSchedule | None = None
    ) -> None:
        self._levels: list[Level] = []
        if not isinstance(model, Sequence):
            self._levels = levels = [model.level(name) for name in plan.levels] if plan.levels else list(model.levels)
            self.names = [level.name for level in levels]
            denoisers: list[Denoiser] = [level.denoiser for level in levels]
            schedule = model.schedule
        else:
            denoisers = list(model)
            self.names = list(plan.levels) or [str(number) for number in range(1, len(denoisers) + 1)]
        if schedule is None:
            raise ValueError("bare denoisers do not know their schedule; pass schedule=")
        columns = plan.probabilities.shape[1]
        if columns != len(denoisers):
            raise ValueError(
                f"the plan is for {columns} levels, but the family has {len(denoisers)} ({', '.join(self.names)}); "
                "draw it for these levels, or name the plan's with levels="
            )
        self.plan, self.schedule = plan, schedule
        self._denoisers = denoisers
        self._trajectory: MultilevelTrajectory | None = None

    def metered(self, meter: Callable[[str, Any], Any]) -> MultilevelDenoiser:
        """A copy with every network (or bare denoiser) wrapped by `meter(name, network)`."""
        denoisers: list[Denoiser] = []
        for name, denoiser in zip(self.names, self._denoisers, strict=True):
            inside = isinstance(denoiser, NetworkDenoiser)
            denoisers.append(denoiser.through(meter(name, denoiser.network)) if inside else meter(name, denoiser))
        metered = copy.copy(self)
        metered._denoisers, metered._trajectory = denoisers, None
        return metered

    def begin(
        self,
        indices: Tensor | None = None,
        quadrature: Sequence[float] | None = None,
        conditions: ConditionSource | None = None,
    ) -> MultilevelTrajectory:
        """Begin a trajectory.

        Args:
            indices: (B,), of the samples; required if samples have their own coins or conditions.
            quadrature: the weights of `mlem.solvers.quadrature_weights`; required if the state is moved.
            conditions: of the samples, for the levels of a family.

        Raises:
            ValueError: one of them is missing.
        """
        plan, levels = self.plan, self._told(indices, conditions)
        if not plan.per_sample:
            evaluator = ESTIMATORS[plan.estimator].evaluator(levels, self.schedule, plan.program, quadrature)
        elif indices is None:
            raise ValueError("this plan tosses coins for every sample: call start(indices) before the first step")
        else:
            evaluator = OwnCoinsEvaluator(levels, plan.sample_weights(indices), indices.device)
        return MultilevelTrajectory(plan, self.schedule, evaluator)

    def _told(self, indices: Tensor | None, conditions: ConditionSource | None) -> list[Denoiser]:
        """The levels with their conditions. Raises ValueError if these are unknown."""
        if not self._levels:
            if conditions is not None:
                raise ValueError("conditions= needs the levels of a family, but these are bare denoisers")
            return self._denoisers
        if indices is None:
            if any(level.conditions for level in self._levels):
                raise ValueError("these levels take conditions: call start(indices) before the first step")
            return self._denoisers
        told = conditions_of(self._levels, conditions, indices)
        pairs = zip(self._denoisers, told, strict=True)
        return [one.given(own) if own and isinstance(one, Conditional) else one for one, own in pairs]

    def start(
        self,
        indices: Tensor | None = None,
        quadrature: Sequence[float] | None = None,
        conditions: ConditionSource | None = None,
    ) -> None:
        """Begin the trajectory of the calls that follow; see `begin`."""
        self._trajectory = self.begin(indices, quadrature, conditions)

    def revise(self, y: Tensor, here: GridPoint) -> Tensor:
        """`MultilevelTrajectory.revise` of the trajectory begun by `start`."""
        if self._trajectory is None:
            self.start()
        assert self._trajectory is not None
        return self._trajectory.revise(y, here)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self._trajectory is None or self._trajectory.row == self.plan.evaluations:
            self.start()
        assert self._trajectory is not None
        return self._trajectory.evaluate(x, t)


class MultilevelTrajectory:
    """One trajectory of a batch of samples: the n-th `evaluate` makes the n-th evaluation of the plan.

    row: the number of the next evaluation, from 0.
    """

    def __init__(self, plan: Plan, schedule: NoiseSchedule, evaluator: Evaluator) -> None:
        self.row = 0
        self._evaluations, self._schedule, self._evaluator = plan.evaluations, schedule, evaluator
        self._revised: list[bool] = plan.revised.tolist() if plan.moves_state else []

    def evaluate(self, x: Tensor, t: Tensor, point: GridPoint | None = None) -> Tensor:
        """The next noise estimate: x (B, ...), t (B,) -> like x.

        Args:
            point: the grid point, if it is one: plain numbers then replace tensors (B,).

        Raises:
            ValueError: all evaluations have been made.
        """
        if self.row == self._evaluations:
            raise ValueError(f"this trajectory has made all {self.row} evaluations; begin another")
        row, self.row = self.row, self.row + 1
        return self._evaluator.evaluate(row, x, t, point)

    def denoiser_at(self, place: EvaluationPoint) -> Denoiser:
        """The denoiser that makes the solver's next evaluation, at `place`."""
        return partial(self.evaluate, point=place if isinstance(place, GridPoint) else None)

    def estimate(self, y: Tensor, place: EvaluationPoint) -> Tensor:
        """The next noise estimate for a solver, at y (B, ...) in float64: like y."""
        return self.denoiser_at(place)(*model_input(self._schedule, y, place)).double()

    def revise(self, y: Tensor, point: GridPoint) -> Tensor:
        """y (B, ...) moved as the plan requires before the step from `point`; y itself if nothing moves."""
        if not self._revised or not self._revised[self.row]:
            return y
        move = self._evaluator.revise(self.row, *model_input(self._schedule, y, point), point)
        return y if move is None else y + move

    def changed(self, before: Tensor, y: Tensor) -> None:
        """Told that the state, `before` after `revise`, became y (B, ...): levels that ran for the next row run again.

        A device waits for the comparison, at rows before which the state was moved.
        """
        if self._revised and self._revised[self.row] and not torch.allclose(before, y, rtol=SAME, atol=0):
            self._evaluator.forget()
