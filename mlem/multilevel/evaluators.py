"""Evaluators: the evaluations of one trajectory under a plan, per estimator. `estimators.py` chooses among them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mlem.denoiser import Denoiser, of_rows
from mlem.multilevel.holding import Holding, Measurement
from mlem.schedule import NoiseSchedule, expand_like
from mlem.solvers import GridPoint, denoiser_at

__all__ = [
    "Evaluator",
    "ForecastEvaluator",
    "HeldEvaluator",
    "HindsightEvaluator",
    "JumpEvaluator",
    "Moment",
    "OwnCoinsEvaluator",
    "Place",
    "Program",
]


class Program(NamedTuple):
    """A plan as plain lists with one row per evaluation, so that no step waits for a device; see `Plan`."""

    evaluated: list[list[bool]]
    weights: list[list[float]]
    measured: list[list[bool]]
    stored: list[list[bool]]
    revising: list[list[bool]]
    holding: Holding


class Moment(NamedTuple):
    """The noise level of an evaluation: numbers, or (B, 1, ...) if they differ between samples.

    Args:
        alpha, kappa: of the schedule there.
        unit: divisor that turns a difference of the levels' outputs into one of v: alpha if they are eps.
        slope: change of an output per unit of the state y = x / alpha, if v stays: alpha sigma if they are eps.
    """

    alpha: float | Tensor
    kappa: float | Tensor
    unit: float | Tensor
    slope: float | Tensor

    @staticmethod
    def of(schedule: NoiseSchedule, x: Tensor, t: Tensor, point: Place) -> Moment:
        """The moment of an evaluation at x (B, ...) and t (B,), at a grid point if one is given."""
        if isinstance(point, Moment):
            return point
        if point is not None:
            return Moment(point.alpha, point.kappa, point.alpha, point.alpha * point.sigma)
        alpha, sigma = (expand_like(scale, x) for scale in schedule.scales(t))
        return Moment(alpha, sigma / alpha, alpha, alpha * sigma)

    @property
    def time(self) -> float | Tensor:
        """-ln kappa."""
        return -(self.kappa.log() if isinstance(self.kappa, Tensor) else math.log(self.kappa))


Place: TypeAlias = "GridPoint | Moment | None"
"""A grid point, its moment, or neither."""


class Evaluator(ABC):
    """Makes the evaluations of one trajectory, row by row, and keeps the state between them."""

    @abstractmethod
    def evaluate(self, row: int, x: Tensor, t: Tensor, point: Place) -> Tensor:
        """The noise estimate at x (B, ...) and t (B,), at a grid point if one is given: like x."""

    def revise(self, row: int, x: Tensor, t: Tensor, point: Place) -> Tensor | None:
        """The move of the state y = x / alpha before the evaluation of this row, if any."""
        return None

    def forget(self) -> None:  # noqa: B027 - most keep nothing
        """Outputs from before a move do not hold: someone else has changed the state since."""


class JumpEvaluator(Evaluator):
    """A weighted sum over levels."""

    def __init__(self, levels: Sequence[Denoiser], program: Program) -> None:
        self._levels, self._program = levels, program

    def evaluate(self, row: int, x: Tensor, t: Tensor, point: Place) -> Tensor:
        outputs = _outputs(self._levels, self._program.evaluated[row], x, t, point)
        return _weighted(outputs, self._program.weights[row], x)


class _Share(NamedTuple):
    """The part of a batch that a level runs on: positions, and their weights."""

    positions: Tensor
    weights: Tensor


class OwnCoinsEvaluator(Evaluator):
    """The jump estimate with coins per sample: each level runs on its share of the batch."""

    def __init__(self, levels: Sequence[Denoiser], weights: Tensor, device: torch.device) -> None:
        """weights: (B, R, K) on the CPU; device: of the samples."""
        self._levels = levels
        self._shares = [[_share(level, device) for level in row.unbind(1)] for row in weights.unbind(1)]

    def evaluate(self, row: int, x: Tensor, t: Tensor, point: Place) -> Tensor:
        total = torch.zeros_like(x)
        for level, share in zip(self._levels, self._shares[row], strict=True):
            if share is not None:
                output = of_rows(level, share.positions)(x[share.positions], t[share.positions])
                total = total.index_add(0, share.positions, output * expand_like(share.weights, output))
        return total


def _share(weights: Tensor, device: torch.device) -> _Share | None:
    """The samples with nonzero weight (B,)."""
    positions = weights.nonzero().flatten()
    if not len(positions):
        return None
    parts = [part.to(device, non_blocking=True) for part in (positions, weights[positions])]
    return _Share(*parts)


class HeldEvaluator(Evaluator):
    """Measured corrections, and stand-ins for the others."""

    def __init__(self, levels: Sequence[Denoiser], schedule: NoiseSchedule, program: Program) -> None:
        self._levels, self._schedule, self._program = levels, schedule, program
        self._measured: list[list[Measurement]] = [[] for _ in levels]

    def evaluate(self, row: int, x: Tensor, t: Tensor, point: Place) -> Tensor:
        moment = Moment.of(self._schedule, x, t, point)
        outputs = _outputs(self._levels, self._program.evaluated[row], x, t, point)
        if row == 0:
            self._begin(x, moment)
        self._measure(row, outputs, moment)
        estimate = _weighted(outputs, self._program.weights[row], x)
        return self._corrected(estimate, row, moment, fresh=False)

    def _begin(self, x: Tensor, moment: Moment) -> None:
        """Corrections that are not measured at the first row start as 0."""
        for level, due in enumerate(self._program.measured[0]):
            if level and not due:
                self._measured[level].append(Measurement(moment.time, torch.zeros_like(x)))

    def _measure(self, row: int, outputs: Sequence[Tensor | None], moment: Moment) -> Tensor | None:
        """Keep the corrections measured at this row. Returns the move of the state, if any."""
        move: Tensor | None = None
        for level, due in enumerate(self._program.measured[row]):
            if level == 0 or not due or not self._keeps(row, level):
                continue
            above, below = outputs[level], outputs[level - 1]
            assert above is not None
            assert below is not None
            self._measured[level].append(Measurement(moment.time, (above - below) / moment.unit))
            move = _sum(move, self._look_back(level, moment))
            del self._measured[level][: -(self._program.holding.order + 1)]
        return move

    def _keeps(self, row: int, level: int) -> bool:
        """Whether this measurement is used again."""
        return self._program.stored[row][level]

    def _look_back(self, level: int, now: Moment) -> Tensor | None:
        """The move of the state, if any, after a correction was measured again."""
        return None

    def _corrected(self, estimate: Tensor, row: int, moment: Moment, fresh: bool) -> Tensor:
        """`estimate` plus the corrections at this row; without `fresh`, only those not measured at it."""
        total: Tensor | None = None
        for level, due in enumerate(self._program.measured[row]):
            if level == 0 or (due and not fresh):
                continue
            points = self._measured[level][-1:] if due else self._measured[level]
            value = self._program.holding.extrapolated(points, moment.time)
            if not due:
                self._stands_in(level, row, moment, value)
            total = _sum(total, value * moment.unit)
        return estimate if total is None else estimate + total

    def _stands_in(self, level: int, row: int, moment: Moment, value: Tensor) -> None:
        """Called with each stand-in."""


class ForecastEvaluator(Evaluator):
    """One level; where it does not run, the polynomial through its last outputs."""

    def __init__(self, levels: Sequence[Denoiser], schedule: NoiseSchedule, program: Program) -> None:
        self._levels, self._schedule, self._program = levels, schedule, program
        self._known: list[Measurement] = []

    def evaluate(self, row: int, x: Tensor, t: Tensor, point: Place) -> Tensor:
        time = Moment.of(self._schedule, x, t, point).time
        (output,) = _outputs(self._levels, self._program.evaluated[row], x, t, point)
        if output is None:
            return self._forecast(time, x)
        self._known = [one for one in self._known if not _same(one.time, time)]  # Heun evaluates twice at one time
        self._known = [*self._known, Measurement(time, output)][-(self._program.holding.order + 1) :]
        return output

    def _forecast(self, time: float | Tensor, like: Tensor) -> Tensor:
        """The Lagrange polynomial at this time: like the outputs."""
        total = torch.zeros_like(like)
        for one in self._known:
            weight: float | Tensor = 1.0
            for other in self._known:
                if other is not one:
                    weight = weight * (time - other.time) / (one.time - other.time)
            total = total + one.value * weight
        return total


def _same(one: float | Tensor, other: float | Tensor) -> bool:
    """Whether two times are equal, for any sample."""
    return bool(torch.as_tensor(one == other).any())


class _StandIn(NamedTuple):
    """A stand-in that was used, with its row and time."""

    row: int
    moment: Moment
    value: Tensor


class HindsightEvaluator(HeldEvaluator):
    """Held corrections whose past errors are corrected when they are measured again."""

    def __init__(
        self, levels: Sequence[Denoiser], schedule: NoiseSchedule, program: Program, quadrature: Sequence[float]
    ) -> None:
        super().__init__(levels, schedule, program)
        self._quadrature = quadrature
        self._stand_ins: list[list[_StandIn]] = [[] for _ in levels]
        self._last: tuple[Tensor | None, Tensor | None] = (None, None)
        """The output of the cheapest level before the last move, and that move."""

    def revise(self, row: int, x: Tensor, t: Tensor, point: Place) -> Tensor | None:
        outputs = _outputs(self._levels, self._program.revising[row], x, t, point)
        move = self._measure(row, outputs, Moment.of(self._schedule, x, t, point))
        self._last = outputs[0], move
        return move

    def evaluate(self, row: int, x: Tensor, t: Tensor, point: Place) -> Tensor:
        if not any(self._program.revising[row]):
            return super().evaluate(row, x, t, point)
        moment = Moment.of(self._schedule, x, t, point)
        estimate = self._moved(x, moment)
        if estimate is None:
            (estimate,) = _outputs(self._levels[:1], [True], x, t, point)
        assert estimate is not None
        return self._corrected(estimate, row, moment, fresh=True)

    def forget(self) -> None:
        self._last = None, None

    def _moved(self, x: Tensor, moment: Moment) -> Tensor | None:
        """The output of the cheapest level after the last move, with v as it was before: exact for unit normal data."""
        before, move = self._last
        self.forget()
        if before is None or move is None:
            return before
        moved, channels = before.clone(), x.shape[1]  # outputs may have more: variances
        moved[:, :channels] += move[:, :channels] * moment.slope
        return moved

    def _keeps(self, row: int, level: int) -> bool:
        # a measurement at a revision is added to the cheapest level in the evaluation that follows
        return super()._keeps(row, level) or any(self._program.revising[row])

    def _look_back(self, level: int, now: Moment) -> Tensor | None:
        """`sum_i c_i (interpolated_i - stand-in_i)` over the rows since the last measurement."""
        move: Tensor | None = None
        for row, then, value in self._stand_ins[level]:
            error = self._program.holding.interpolated(self._measured[level], then.time).sub_(value)
            # errors made there have shrunk since, about as with frozen data
            error.mul_(then.alpha).mul_(now.kappa / then.kappa).mul_(self._quadrature[row])
            move = _sum(move, error)
        self._stand_ins[level] = []
        return move

    def _stands_in(self, level: int, row: int, moment: Moment, value: Tensor) -> None:
        self._stand_ins[level].append(_StandIn(row, moment, value))


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of the values that are not None."""
    return other if one is None else one if other is None else one + other


def _outputs(
    levels: Sequence[Denoiser], runs: Sequence[bool], x: Tensor, t: Tensor, point: Place
) -> list[Tensor | None]:
    """The noise estimates of the levels that run; None for the others."""
    at = point if isinstance(point, GridPoint) else None
    return [denoiser_at(level, at)(x, t) if run else None for level, run in zip(levels, runs, strict=True)]


def _weighted(outputs: Sequence[Tensor | None], weights: Sequence[float], x: Tensor) -> Tensor:
    """`sum_k w_k f^k`; a single level of weight 1 is returned unchanged."""
    total: Tensor | None = None
    for output, weight in zip(outputs, weights, strict=True):
        if output is not None and weight:
            term = output if weight == 1 else output * weight
            total = term if total is None else total + term
    return torch.zeros_like(x) if total is None else total
