"""Pathwise error: how far samples are from reference samples driven by the same noise (same seed and index).

The mean squared difference per value, with its standard error over samples; `ImageMean` does this for any measure of a
sample and its reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["ImageMean", "PathwiseError", "mean_error", "pathwise_error"]


def pathwise_error(x: Tensor, reference: Tensor) -> tuple[float, float]:
    """Mean squared difference to the reference, and its standard error over samples.

    x, reference: (N, ...), N >= 2, row i of both from the same noise. The squared difference is averaged over the
    values of each sample, in float64; returns the mean over samples and the standard deviation / sqrt(N). Raises
    ValueError for different shapes, fewer than 2 samples, and values that are not finite.
    """
    return mean_error(_errors(x, reference))


def mean_error(errors: Tensor) -> tuple[float, float]:
    """Mean and standard error of the samples' errors, or other values, (N,). Raises ValueError for N < 2."""
    if len(errors) < 2:
        raise ValueError(f"a standard error needs at least 2 samples, got {len(errors)}")
    return float(errors.mean()), float(errors.std() / math.sqrt(len(errors)))


class ImageMean(Metric):
    """A measure of samples and their references, in pieces: update on shards and ranks, then compute once.

    compute returns (mean, standard_error) as floats and raises ValueError for fewer than 2 samples.

    Args:
        measure: of x and reference, (N, ...) both: (N,), float64.

    Attributes:
        values: of the samples seen by this rank, in order: one tensor (N,) per update.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    total_squares: Tensor
    count: Tensor

    def __init__(self, measure: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._measure = measure
        self.values: list[Tensor] = []
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total_squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Tensor, reference: Tensor) -> None:
        """x, reference: (N, ...), N >= 0, row i of both from the same noise."""
        values = self._measure(x, reference)
        self.values.append(values)
        values = values.to(self.total.device)
        self.total += values.sum()
        self.total_squares += values.square().sum()
        self.count += len(values)

    def reset(self) -> None:
        """Forget everything seen so far."""
        super().reset()
        self.values = []

    def compute(self) -> tuple[float, float]:
        """(mean, standard_error) over everything seen on all ranks; the error of an infinite mean is NaN."""
        count = int(self.count)
        if count < 2:
            raise ValueError(f"a standard error needs at least 2 samples, got {count}")
        mean = float(self.total) / count
        if not math.isfinite(mean):
            return mean, math.nan
        # round-off can make the difference negative when all values are equal
        variance = max(0.0, (float(self.total_squares) - count * mean**2) / (count - 1))
        return mean, math.sqrt(variance / count)


class PathwiseError(ImageMean):
    """`pathwise_error` in pieces; compute returns (mse, standard_error)."""

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__(_errors)


def _errors(x: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference of every sample: (N,), float64."""
    if x.shape != reference.shape:
        raise ValueError(f"x and reference must have the same shape, got {tuple(x.shape)} and {tuple(reference.shape)}")
    if x.ndim < 2:
        raise ValueError(f"x must be (N, ...) with at least 2 dimensions, got {tuple(x.shape)}")
    errors = (x.detach().double() - reference.detach().double()).square().flatten(1).mean(1)
    bad = (~torch.isfinite(errors)).nonzero()
    if len(bad):
        raise ValueError(f"sample {int(bad[0])} of {len(errors)}: the difference to the reference is not finite")
    return errors
