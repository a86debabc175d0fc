"""The error of a draw of the coins, predicted by linear response: the control variate of learning.

To first order the draw adds the quadratic form `r = x' M x` of `x_k(i) = B_k(i) / p_k(i) - 1`; M comes from a
calibration (`mlem.multilevel.predict`). Both parts of its gradient have known means, and no network is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.multilevel.learning.law import Law
from mlem.multilevel.predict import Predictor
from mlem.solvers import Solver

__all__ = ["Response", "others", "slope"]

LEAST_DRAWS = 4
"""Number of draws from which the slope over the other draws is better than none."""


class Response:
    """The quadratic form; matrix: (C, R, C, R), C corrections between the levels in use, R rows."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @staticmethod
    def of(family: Family, solver: Solver, grid: TimeGrid, levels: Sequence[str] = ()) -> Response | None:
        """The response from the family's calibration, for these levels or all; None without a calibration."""
        if not family.fitted.has("calibration"):
            return None
        predictor = Predictor(family.fitted.calibration_for(family), family.schedule, solver, grid)
        return Response.predicted(predictor, levels)

    @staticmethod
    def predicted(predictor: Predictor, levels: Sequence[str] = ()) -> Response:
        """The response for these levels, or all."""
        scale = predictor.scale
        block = predictor.covariance.block(np.arange(len(scale)), np.arange(predictor.rows))
        matrix = torch.from_numpy(block) * scale[:, :, None, None] * scale
        # a correction between two levels in use covers all corrections between them
        *groups, _ = predictor.groups(levels)
        matrix = torch.stack([matrix[group].sum(0) for group in groups])
        return Response(torch.stack([matrix[:, :, group].sum(2) for group in groups], 2))

    def __call__(self, counts: Tensor, p: Tensor) -> Tensor:
        """r of counts (.., R, K): (..)."""
        excess = self._excess(counts, p)
        return (self._times(excess) * excess).sum((-2, -1))

    def slopes(self, law: Law, theta: Tensor, counts: Tensor) -> Tensor:
        """Derivative of r by theta with the coins (.., R, K) fixed: (.., 2 + knots, K - 1)."""
        p = law.probabilities(theta)
        by_p = -2 * self._times(self._excess(counts, p)) * counts[..., 1:] / p[:, 1:]
        return law.back(by_p * (1 - p[:, 1:]))

    def _excess(self, counts: Tensor, p: Tensor) -> Tensor:
        return counts[..., 1:] / p[:, 1:] - 1

    def _times(self, excess: Tensor) -> Tensor:
        """M x: (.., R, C) -> (.., R, C)."""
        corrections, rows = self.matrix.shape[:2]
        flat = excess.transpose(-1, -2).flatten(-2)
        product = flat @ self.matrix.view(corrections * rows, -1)
        return product.view(*flat.shape[:-1], corrections, rows).transpose(-1, -2)


def slope(errors: Tensor, predicted: Tensor, mean: Tensor) -> Tensor:
    """The factor of a control variate: the slope of errors against predictions, over the other draws.

    One extra draw is assumed to match its prediction. A factor is independent of its own draw, so there is no bias; it
    is affine in the errors.

    Args:
        errors, predicted: (.., D, T), of D >= 2 independent draws. mean: (), of the predictions.

    Returns: (.., D). Below four draws 1.
    """
    count = errors.shape[-2]
    if count < LEAST_DRAWS:
        return torch.ones(errors.shape[:-1], dtype=errors.dtype)
    excess = predicted - mean
    product = others(errors * excess) - others(errors) * others(excess) / (errors.shape[-1] * (count - 1))
    fitted = product / others(excess.square()).clamp(min=1e-300)
    return (1 + (count - 1) * fitted) / count


def others(values: Tensor) -> Tensor:
    """Sums over the other draws: (.., D, T) -> (.., D)."""
    own = values.sum(-1)
    return own.sum(-1, keepdim=True) - own
