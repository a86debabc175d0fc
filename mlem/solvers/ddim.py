"""DDIM (Song et al., arXiv:2010.02502, eta = 0): Euler's method for the reverse ODE in kappa."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlem.noise import BrownianPath
from mlem.solvers.base import Estimate, Point, Solver


class DDIM(Solver):
    """`y' = y + (kappa' - kappa) eps`."""

    name = "ddim"
    order = 1.0
    stochastic = False
    reference = "dpm_solver_pp"

    def step(
        self, eps: Estimate, y: Tensor, state: Any, here: Point, there: Point, path: BrownianPath
    ) -> tuple[Tensor, Any]:
        return y + (there.kappa - here.kappa) * eps(y, here), state
