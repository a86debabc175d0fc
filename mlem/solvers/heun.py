"""Heun's method of Karras et al. (EDM), Algorithm 1 of arXiv:2206.00364, without churn."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlem.brownian import NoisePath
from mlem.solvers.base import GridPoint, GridPoints, NoiseEstimate, Solver

__all__ = ["Heun"]


class Heun(Solver):
    """Euler to kappa', then the mean of both slopes; the step to kappa' = 0 is Euler's alone."""

    name = "heun"
    order = 2.0
    stochastic = False
    reference = "dpm_solver_pp"
    default_grid = "log_snr"

    def evaluations(self, points: GridPoints) -> int:
        return 2 * points.steps - (points[-1].kappa == 0)

    def step(
        self, eps: NoiseEstimate, y: Tensor, state: Any, here: GridPoint, there: GridPoint, path: NoisePath
    ) -> tuple[Tensor, Any]:
        slope = eps(y, here)
        euler = y + (there.kappa - here.kappa) * slope
        if there.kappa == 0:
            return euler, state
        return y + (there.kappa - here.kappa) / 2 * (slope + eps(euler, there)), state
