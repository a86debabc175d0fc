"""Euler-Maruyama for the reverse SDE in kappa."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlem.brownian import NoisePath
from mlem.solvers.base import GridPoint, NoiseEstimate, Solver

__all__ = ["EulerMaruyama"]


class EulerMaruyama(Solver):
    """`y' = y + 2 (kappa' - kappa) eps + B(kappa^2) - B(kappa'^2)`; strong order 1, since the noise is additive.

    It has no limit at pure noise: a step from there is a DDIM step. (An ancestral step would use the same B as later
    increments and change the distribution.)
    """

    name = "euler_maruyama"
    order = 1.0
    stochastic = True
    reference = "euler_maruyama"
    exact_on_a_point = False

    def step(
        self, eps: NoiseEstimate, y: Tensor, state: Any, here: GridPoint, there: GridPoint, path: NoisePath
    ) -> tuple[Tensor, Any]:
        if here.pure_noise:
            return y + (there.kappa - here.kappa) * eps(y, here), state
        noise = path.at(here.t) - path.at(there.t)
        return y + 2 * (there.kappa - here.kappa) * eps(y, here) + noise, state
