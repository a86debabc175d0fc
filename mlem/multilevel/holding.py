"""Holding: what stands in for a correction between the evaluations at which it is measured.

Time is `-ln kappa`. A stand-in is a linear combination of one or two measurements, by the rules of `Holding`. They are
applied to tensors when a sample is made, and to unit numbers, which gives the weights of the combination, when the
error of a plan is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Holding", "Measurement"]


class Measurement(NamedTuple):
    """A correction as it was measured, `(f^k - f^(k-1)) / alpha`, the difference of v predictions, and its time."""

    time: Tensor
    value: Tensor


@dataclass(frozen=True)
class Holding:
    """The rules for stand-ins.

    Args:
        order: of extrapolation: 0 holds the last measurement, 1 draws a straight line through the last two.
        correlation_length: in `-ln kappa`. A held measurement fades as `exp(-distance / length)`, the best linear
            guess of a process with this correlation; None: it does not fade.
    """

    order: int
    correlation_length: float | None

    def extrapolated(self, points: Sequence[Measurement], time: Tensor) -> Tensor:
        """What the last `order + 1` measurements, or the one there is, say of a later `time`."""
        last = points[-1]
        if len(points) == 1:
            return self._faded(last.value, time - last.time)
        before = points[-2]
        return _line(last.value, before.value, time - last.time, before.time - last.time)

    def interpolated(self, before: Measurement, after: Measurement, time: Tensor) -> Tensor:
        """What two measurements say of a `time` in between."""
        return self._between(before.value, after.value, time - before.time, after.time - before.time)

    def deviations(self, measured: Tensor, scale: Tensor, times: Tensor, *, hindsight: bool) -> Tensor:
        """Stand-ins less corrections, as coefficients of the corrections, for N plans at once.

        Args:
            measured: (N, R) bool, the evaluations at which the correction is measured; the first must be.
            scale: (R,), what a unit of error at each evaluation counts.
            times: (R,), `-ln kappa` of each evaluation.
            hindsight: whether interpolation replaces extrapolation where there is a later measurement.

        Returns: (N, R); the error of a plan is the sum over rows of these times the corrections.
        """
        rows = measured.shape[1]
        number = torch.arange(rows).expand_as(measured)
        last = torch.where(measured, number, 0).cummax(1).values
        before = torch.cat([torch.zeros_like(last[:, :1]), last[:, :-1]], 1).gather(1, last)  # the one before the last
        later = torch.where(measured, number, rows).flip(1).cummin(1).values.flip(1)
        between = (later < rows) if hindsight else torch.zeros_like(measured)
        second = torch.where(between, later.clamp(max=rows - 1), before if self.order else last)
        passed, span = times - times[last], times[second] - times[last]
        weights: list[Tensor] = []
        for a, b in ((1.0, 0.0), (0.0, 1.0)):
            alone = self._faded(torch.full_like(passed, a), passed)
            two = torch.where(between, self._between(a, b, passed, span), _line(a, b, passed, span))
            stand_in = torch.where(second == last, alone, two)
            weights.append(torch.where(measured, a, stand_in))
        said = torch.zeros(measured.shape, dtype=torch.float64)
        said.scatter_add_(1, last, scale * weights[0])
        said.scatter_add_(1, second, scale * weights[1])
        return said - scale

    def _faded(self, value: Tensor, passed: Tensor) -> Tensor:
        """One measurement, `passed` later."""
        return value if self.correlation_length is None else value * torch.exp(-passed / self.correlation_length)

    def _between(self, a: Tensor | float, b: Tensor | float, passed: Tensor, span: Tensor) -> Tensor:
        """`passed` after a measurement a, and before another, b, at a distance of `span` from the first.

        A straight line; with a correlation length b, the mean of an Ornstein-Uhlenbeck process that is known at both
        ends: `(sinh((span - passed) / length) a + sinh(passed / length) b) / sinh(span / length)`.
        """
        length = self.correlation_length
        if length is None:
            return _line(a, b, passed, span)
        return (torch.sinh((span - passed) / length) * a + torch.sinh(passed / length) * b) / torch.sinh(span / length)


def _line(a: Tensor | float, b: Tensor | float, passed: Tensor, span: Tensor) -> Tensor:
    """The straight line through a, where nothing has passed, and b, at a distance of `span`, which may be negative."""
    # two evaluations at one time (Heun) give no slope
    return a + (b - a) * torch.where(span != 0, passed / span, 0.0)
