"""Holding: stand-ins for a correction between the evaluations at which it is measured.

Time is `-ln kappa`. A stand-in is a linear combination of up to three measurements; `Holding` gives their weights: in
sampling as plain numbers, or as tensors if times differ between samples; in predicting errors as arrays, for many plans
at once. A correction that is not measured at the first row is taken as 0 there: on noise all levels nearly agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Holding", "Measurement"]

Numbers: TypeAlias = Any
"""Times and weights: a float, a tensor, or a numpy array."""


class Measurement(NamedTuple):
    """A measured correction, `(f^k - f^(k-1)) / alpha`, the difference of v predictions, and its time."""

    time: float | Tensor
    value: Tensor


@dataclass(frozen=True)
class Holding:
    """The rules for stand-ins.

    Args:
        order: of extrapolation: 0 holds the last measurement, 1 draws a straight line through the last two.
            Interpolation uses one more measurement: the next.
        correlation_length: in `-ln kappa`. A held measurement fades as `exp(-distance / length)`, the best linear
            predictor of a process with this correlation; None: it does not fade.
    """

    order: int
    correlation_length: float | None

    def extrapolated(self, points: Sequence[Measurement], time: float | Tensor) -> Tensor:
        """Extrapolation to a later `time` from the last `order + 1` measurements, or from the only one."""
        last = points[-1]
        if len(points) == 1:
            return last.value if self.correlation_length is None else last.value * self._fading(time - last.time)
        before = points[-2]
        return _combined(last, before, _line(time - last.time, before.time - last.time))

    def interpolated(self, points: Sequence[Measurement], time: float | Tensor) -> Tensor:
        """Interpolation at a `time` between the last two measurements, from up to `order + 2` of them."""
        before, after = points[-2:]
        oldest = points[-3] if len(points) > 2 else before
        passed, span, older = time - before.time, after.time - before.time, before.time - oldest.time
        *weights, third = self._interpolation(passed, span, older)
        found = _combined(before, after, (weights[0], weights[1]))
        return found if oldest is before else found.add_(oldest.value * third)

    def deviations(
        self,
        measured: NDArray[np.bool_],
        scale: NDArray[np.float64],
        times: NDArray[np.float64],
        *,
        hindsight: bool,
    ) -> NDArray[np.float64]:
        """Stand-in minus correction, as coefficients of the corrections, for N plans at once.

        Args:
            measured: (N, R), the evaluations at which the correction is measured.
            scale: (R,), or (N, R), weight of an error at each evaluation.
            times: (R,), `-ln kappa` of each evaluation.
            hindsight: whether interpolation replaces extrapolation if there is a later measurement.

        Returns: (N, R); the error of a plan is the sum over rows of these times the corrections.
        """
        plans, rows = measured.shape
        number, plan = np.arange(rows), np.arange(plans)[:, None]
        known = measured | (number == 0)  # at the first row it is known to be 0
        last = np.maximum.accumulate(np.where(known, number, 0), axis=1)
        before = np.zeros_like(last)
        before[:, 1:] = last[:, :-1]
        before = before[plan, last]  # the last but one
        later = np.full_like(last, rows)
        if hindsight:
            later = np.minimum.accumulate(np.where(known, number, rows)[:, ::-1], axis=1)[:, ::-1]
        between = later < rows
        second = np.where(between, later, before if self.order else last)
        since = times[last]
        passed, older = times - since, since - times[before]
        # where a correction is measured no time has passed, and the measurement has weight 1
        span = np.where(between & known, 1.0, times[second] - since)
        inside = self._interpolation(passed, np.where(between, span, 1.0), older)
        outside = self._extrapolation(passed, span, second == last)
        one, other = _chosen(between, inside[:2], outside)
        said = np.zeros(plans * rows)
        for place, weight in ((last, one), (second, other), (before, between * inside[2])):
            said += np.bincount((plan * rows + place).ravel(), (scale * weight).ravel(), plans * rows)
        said = said.reshape(plans, rows)
        said[:, 0] *= measured[:, 0]
        return said - scale

    def _extrapolation(
        self, passed: NDArray[np.float64], span: NDArray[np.float64], alone: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights of the last measurement and of the one `span` before it, or of the last alone."""
        faded = np.broadcast_to(self._fading(passed), passed.shape)
        return _chosen(alone, (faded, np.zeros_like(passed)), _line(passed, span))

    def _fading(self, passed: Numbers) -> Numbers:
        """Weight of a measurement after a time `passed`."""
        length = self.correlation_length
        return 1.0 if length is None else _library(passed).exp(-passed / length)

    def _interpolation(self, passed: Numbers, span: Numbers, older: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """Weights, `passed` after a measurement, of that one, of the next, `span` later, and of one `older` before it.

        Order 1: a parabola through all three, a straight line if older = 0; order 0: a straight line. With a
        correlation length, the mean of an Ornstein-Uhlenbeck process known at both ends:
        `(sinh((span - passed) / length) a + sinh(passed / length) b) / sinh(span / length)`.
        """
        length = self.correlation_length
        if length is not None:
            left, gone, whole = (_library(x).sinh(x / length) for x in (span - passed, passed, span))
            return left / whole, gone / whole, 0.0 * passed
        one, other = _line(passed, span)
        if self.order == 0:
            return one, other, 0.0 * passed
        # two evaluations at one time (Heun) give no slope
        lacking = (span == 0) + (older == 0)
        bend = (span != 0) * (older != 0) * passed * (passed - span)
        return (
            one - bend / (span * older + lacking),
            other + bend / (span * (span + older) + lacking),
            bend / (older * (span + older) + lacking),
        )


def _line(passed: Numbers, span: Numbers) -> tuple[Numbers, Numbers]:
    """Weights of the straight line through the values at times 0 and `span`, at `passed`."""
    # two evaluations at one time (Heun) give no slope
    share = passed * (span != 0) / (span + (span == 0))
    return 1 - share, share


def _combined(one: Measurement, other: Measurement, weights: tuple[Any, Any]) -> Tensor:
    a, b = (weight if isinstance(weight, Tensor) else float(weight) for weight in weights)
    return (one.value * a).add_(other.value * b)


def _chosen(which: NDArray[np.bool_], yes: tuple[Any, Any], no: tuple[Any, Any]) -> tuple[Any, Any]:
    return np.where(which, yes[0], no[0]), np.where(which, yes[1], no[1])


def _library(numbers: object) -> Any:
    """The library of these numbers."""
    return torch if isinstance(numbers, Tensor) else np
