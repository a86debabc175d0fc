"""The error that linear response predicts of a draw of the coins: the control variate of learning.

To first order the draw adds the quadratic form `r = x' M x` of `x_k(i) = B_k(i) / p_k(i) - 1`; M is what a calibration
has measured (`mlem.multilevel.predict`). Both parts of its gradient have known means, and no network is evaluated.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.multilevel.learning.law import Law
from mlem.multilevel.predict import Predictor
from mlem.solvers import Solver

__all__ = ["Response", "controlled", "others"]

LEAST_DRAWS = 4
"""From which on the slope of the other draws is worth more than none."""


class Response:
    """The quadratic form; matrix: (C, R, C, R), C corrections of all levels of a family, R rows."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @staticmethod
    def of(family: Family, solver: Solver, grid: TimeGrid) -> Response | None:
        """By the calibration of the family; None without one."""
        if not family.fitted.has("calibration"):
            return None
        predictor = Predictor(family.fitted.calibration_for(family), family.schedule, solver, grid)
        scale = predictor.scale
        block = predictor.covariance.block(np.arange(len(scale)), np.arange(predictor.rows))
        return Response(torch.from_numpy(block) * scale[:, :, None, None] * scale)

    def __call__(self, counts: Tensor, p: Tensor) -> Tensor:
        """r of counts (.., R, K): (..)."""
        excess = self._excess(counts, p)
        return (self._times(excess) * excess).sum((-2, -1))

    def slopes(self, law: Law, theta: Tensor, counts: Tensor) -> Tensor:
        """Derivative of r by theta while the coins (.., R, K) lie still: (.., 2 + knots, K - 1)."""
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


def controlled(
    part: Tensor, scores: Tensor, baseline: Tensor, predicted: Tensor | None, mean: Tensor | float = 0.0
) -> Tensor:
    """A part of the gradient with less noise and the same mean.

    It is `part - baseline scores - slope (predicted - mean)`. The slope is that of the other draws, and one draw more
    that goes as predicted: so it is independent of the draw, and no bias comes in. Below four draws it is 1.

    Args:
        part, scores: (.., D, 2 + knots, K - 1), of D draws, independent of each other.
        baseline: (.., D, 1, 1) or as `part`, from the other draws alone.
        predicted: as `part`, what is predicted of `part - baseline scores`; None: nothing is.
        mean: (2 + knots, K - 1), the mean of that over draws.
    """
    found, count = part - baseline * scores, part.shape[-3]
    if predicted is None:
        return found
    excess, slope = predicted - mean, torch.ones(())
    if count >= LEAST_DRAWS:
        product = others(part * excess) - baseline * others(scores * excess)
        square = others(excess.square()).sum((-2, -1), keepdim=True)
        fitted = product.sum((-2, -1), keepdim=True) / square.clamp(min=1e-300)
        slope = (1 + (count - 1) * fitted) / count
    return found - slope * excess


def others(values: Tensor) -> Tensor:
    """Sums over the other draws: (.., D, 2 + knots, K - 1) -> the same."""
    return values.sum(-3, keepdim=True) - values
