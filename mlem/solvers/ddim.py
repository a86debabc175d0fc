"""DDIM (Song et al., arXiv:2010.02502, eta = 0): Euler's method for the reverse ODE in kappa."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlem.brownian import NoisePath
from mlem.solvers.base import GridPoint, NoiseEstimate, Solver

__all__ = ["DDIM"]


class DDIM(Solver):
    """`y' = y + (kappa' - kappa) eps`."""

    name = "ddim"
    order = 1.0
    stochastic = False
    reference = "dpm_solver_pp"
    default_grid = "log_snr"
    measured_grids = ("uniform", "log_snr")

    def step(
        self, eps: NoiseEstimate, y: Tensor, state: Any, here: GridPoint, there: GridPoint, path: NoisePath
    ) -> tuple[Tensor, Any]:
        return y + (there.kappa - here.kappa) * eps(y, here), state
