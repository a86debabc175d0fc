"""Heun's method of Karras et al. (EDM), Algorithm 1 of arXiv:2206.00364, without churn."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from mlem.brownian import NoisePath
from mlem.solvers.base import GridPoint, GridPoints, NoiseEstimate, Solver

__all__ = ["Heun"]


class Heun(Solver):
    """Euler to kappa', then the mean of both slopes; steps to kappa' = 0 and from pure noise are plain Euler."""

    name = "heun"
    order = 2.0
    stochastic = False
    reference = "dpm_solver_pp"
    default_grid = "log_snr"

    def evaluations(self, points: GridPoints) -> int:
        return sum(1 if _single(*pair) else 2 for pair in itertools.pairwise(points))

    def step(
        self, eps: NoiseEstimate, y: Tensor, state: Any, here: GridPoint, there: GridPoint, path: NoisePath
    ) -> tuple[Tensor, Any]:
        slope = eps(y, here)
        euler = y + (there.kappa - here.kappa) * slope
        if _single(here, there):
            return euler, state
        return y + (there.kappa - here.kappa) / 2 * (slope + eps(euler, there)), state


def _single(here: GridPoint, there: GridPoint) -> bool:
    """Whether a step is plain Euler: at 0 there is no slope, and at infinity the second one has no weight."""
    return there.kappa == 0 or here.pure_noise
