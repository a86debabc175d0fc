"""DDPM ancestral sampling (Ho et al., arXiv:2006.11239): the exact posterior step for frozen x_0."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlem.brownian import NoisePath
from mlem.solvers.base import GridPoint, NoiseEstimate, Solver

__all__ = ["DDPM", "ancestral_noise"]


def ancestral_noise(path: NoisePath, here: GridPoint, there: GridPoint) -> Tensor:
    """The noise of an ancestral step, of variance `kappa'^2 (1 - (kappa'/kappa)^2)`; see `BrownianPath`."""
    return (path.at(here.t) * -((there.kappa / here.kappa) ** 2)).add_(path.at(there.t))


class DDPM(Solver):
    """`y' = x_0 + r^2 (y - x_0) + noise`, with `x_0 = y - kappa eps` and `r = kappa'/kappa`."""

    name = "ddpm"
    order = 1.0
    stochastic = True
    reference = "ddpm"
    measured_grids = ("uniform", "log_snr")

    def step(
        self, eps: NoiseEstimate, y: Tensor, state: Any, here: GridPoint, there: GridPoint, path: NoisePath
    ) -> tuple[Tensor, Any]:
        # y - x_0 = kappa eps, so the mean is y + (r^2 - 1) kappa eps
        drift = ((there.kappa / here.kappa) ** 2 - 1) * here.kappa
        return (y + drift * eps(y, here)).add_(ancestral_noise(path, here, there)), state
