"""Holding: what stands in for a correction between the evaluations at which it is measured.

Time is `-ln kappa`. A stand-in is a linear combination of one or two measurements; `Holding` gives their weights: as
plain numbers or, where times differ from sample to sample, as tensors when a sample is made, and as arrays, for many
plans at once, when an error is predicted.
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
    """A correction as it was measured, `(f^k - f^(k-1)) / alpha`, the difference of v predictions, and its time."""

    time: float | Tensor
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

    def extrapolated(self, points: Sequence[Measurement], time: float | Tensor) -> Tensor:
        """What the last `order + 1` measurements, or the one there is, say of a later `time`."""
        last = points[-1]
        if len(points) == 1:
            return last.value if self.correlation_length is None else last.value * self._fading(time - last.time)
        before = points[-2]
        return _combined(last, before, _line(time - last.time, before.time - last.time))

    def interpolated(self, before: Measurement, after: Measurement, time: float | Tensor) -> Tensor:
        """What two measurements say of a `time` in between."""
        return _combined(before, after, self._between(time - before.time, after.time - before.time))

    def deviations(
        self,
        measured: NDArray[np.bool_],
        scale: NDArray[np.float64],
        times: NDArray[np.float64],
        *,
        hindsight: bool,
    ) -> NDArray[np.float64]:
        """Stand-ins less corrections, as coefficients of the corrections, for N plans at once.

        Args:
            measured: (N, R), the evaluations at which the correction is measured; the first must be.
            scale: (R,), or (N, R), what a unit of error at each evaluation counts.
            times: (R,), `-ln kappa` of each evaluation.
            hindsight: whether interpolation replaces extrapolation where there is a later measurement.

        Returns: (N, R); the error of a plan is the sum over rows of these times the corrections.
        """
        plans, rows = measured.shape
        number, plan = np.arange(rows), np.arange(plans)[:, None]
        last = np.maximum.accumulate(np.where(measured, number, 0), axis=1)
        since = times[last]
        passed = times - since
        # where a correction is measured nothing has passed, and the measurement weighs 1
        later = np.full_like(last, rows)
        if hindsight:
            later = np.minimum.accumulate(np.where(measured, number, rows)[:, ::-1], axis=1)[:, ::-1]
        between = later < rows
        if between.all():
            second, weights = later, self._between(passed, np.where(measured, 1.0, times[later] - since))
        else:
            second = last
            if self.order:
                before = np.zeros_like(last)
                before[:, 1:] = last[:, :-1]
                second = before[plan, last]  # the one before the last
            weights = self._extrapolation(passed, times[second] - since, second == last)
            if between.any():
                second = np.where(between, later, second)
                span = np.where(between & ~measured, times[second] - since, 1.0)
                weights = _chosen(between, self._between(passed, span), weights)
        said = np.bincount((plan * rows + last).ravel(), (scale * weights[0]).ravel(), plans * rows)
        said += np.bincount((plan * rows + second).ravel(), (scale * weights[1]).ravel(), plans * rows)
        return said.reshape(plans, rows) - scale

    def _extrapolation(
        self, passed: NDArray[np.float64], span: NDArray[np.float64], alone: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights of the last measurement and the one before it, at a distance of `span`, or of the last alone."""
        faded = np.broadcast_to(self._fading(passed), passed.shape)
        return _chosen(alone, (faded, np.zeros_like(passed)), _line(passed, span))

    def _fading(self, passed: Numbers) -> Numbers:
        """Weight of one measurement, `passed` later."""
        length = self.correlation_length
        return 1.0 if length is None else _library(passed).exp(-passed / length)

    def _between(self, passed: Numbers, span: Numbers) -> tuple[Numbers, Numbers]:
        """Weights of a measurement, `passed` after it, and of another, at a distance of `span` from it.

        A straight line; with a correlation length, the mean of an Ornstein-Uhlenbeck process that is known at both
        ends: `(sinh((span - passed) / length) a + sinh(passed / length) b) / sinh(span / length)`.
        """
        length = self.correlation_length
        if length is None:
            return _line(passed, span)
        left, gone, whole = (_library(x).sinh(x / length) for x in (span - passed, passed, span))
        return left / whole, gone / whole


def _line(passed: Numbers, span: Numbers) -> tuple[Numbers, Numbers]:
    """Weights of the straight line through a value, where nothing has passed, and one at a distance of `span`."""
    # two evaluations at one time (Heun) give no slope
    share = passed * (span != 0) / (span + (span == 0))
    return 1 - share, share


def _combined(one: Measurement, other: Measurement, weights: tuple[Any, Any]) -> Tensor:
    a, b = (weight if isinstance(weight, Tensor) else float(weight) for weight in weights)
    return (one.value * a).add_(other.value * b)


def _chosen(which: NDArray[np.bool_], yes: tuple[Any, Any], no: tuple[Any, Any]) -> tuple[Any, Any]:
    return np.where(which, yes[0], no[0]), np.where(which, yes[1], no[1])


def _library(numbers: object) -> Any:
    """Whose functions these numbers take."""
    return torch if isinstance(numbers, Tensor) else np
