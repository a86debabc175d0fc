"""UniPC for the ODE (Zhao et al., arXiv:2302.04867, Algorithms 1 and 2, of the data estimate, with B(h) = e^h - 1).

With `lambda = -ln kappa`, h the step in lambda, and earlier data estimates x0_k at lambda_k, a step of order p is

    y' = r y + (1 - r) (x0_i + sum_k rho_k (x0_k - x0_i) / r_k),  r = kappa'/kappa,  r_k = (lambda_k - lambda_i) / h,

with p - 1 of them, and rho that makes polynomials in lambda exact. The corrector repeats the step with the estimate at
its end included; this costs no evaluation, since the next step begins with that estimate. Here it adds the difference
to y. Orders rise from 1 at the start and fall to 1 towards kappa' = 0; estimates at pure noise, where lambda is
infinite, are not used again.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlem.brownian import NoisePath
from mlem.solvers.base import GridPoint, GridPoints, NoiseEstimate, Solver

__all__ = ["UniPC", "UniPC3"]


class _Estimate(NamedTuple):
    """A data estimate and its lambda."""

    data: Tensor
    time: float


class _State(NamedTuple):
    """Steps left to kappa = 0; of the last step: its estimates, newest first, its kappa and its bend."""

    left: float
    used: tuple[_Estimate, ...] = ()
    kappa: float = math.inf
    bend: Tensor | None = None


class UniPC(Solver):
    """UniPC-2: a predictor of order 2; with the corrector, order 3."""

    name = "unipc"
    order = 3.0
    used: ClassVar[int] = 2
    """Data estimates that the predictor uses."""
    stochastic = False
    default_grid = "log_snr"
    measured_grids = ("uniform", "log_snr")
    reference = "dpm_solver_pp"

    def init(self, points: GridPoints, indices: Tensor, seed: int) -> _State:
        return _State(points.steps if points[-1].kappa == 0 else math.inf)

    def step(
        self, eps: NoiseEstimate, y: Tensor, state: _State, here: GridPoint, there: GridPoint, path: NoisePath
    ) -> tuple[Tensor, _State]:
        data = y - here.kappa * eps(y, here)
        new = _Estimate(data, math.inf if here.pure_noise else -math.log(here.kappa))
        if state.used:
            first, *others = state.used
            y = y + _bend(state.kappa, here.kappa, first, (new, *others))
            if state.bend is not None:
                y -= state.bend
        used = state.used[: int(min(self.used, state.left)) - 1]
        ratio = there.kappa / here.kappa
        y = (ratio * y).add_((1 - ratio) * data)
        bend = _bend(here.kappa, there.kappa, new, used) if used else None
        if bend is not None:
            y += bend
        return y, _State(state.left - 1, () if here.pure_noise else (new, *used), here.kappa, bend)


class UniPC3(UniPC):
    """UniPC-3: a predictor of order 3. The first step, of order 1 and corrected, limits the whole to 3."""

    name = "unipc_3"
    used = 3


def _bend(kappa: float, end: float, first: _Estimate, others: tuple[_Estimate, ...]) -> Tensor:
    """Contribution of the other estimates to a step from kappa to end: (1 - r) times the sum."""
    step = math.log(kappa / end)
    r = np.array([(other.time - first.time) / step for other in others])
    weights = (1 - end / kappa) * _rho(r, step) / r
    total = torch.zeros_like(first.data)
    for weight, other in zip(weights.tolist(), others, strict=True):
        total.add_(other.data - first.data, alpha=weight)
    return total


def _rho(r: np.ndarray, step: float) -> np.ndarray:
    """rho of a step h for these r: 1/2 for one, as in the paper; for more, by its equation 4."""
    if len(r) == 1:
        return np.array([0.5])
    phi, factorial, moments = math.expm1(-step) / -step - 1, 1, list[float]()
    for power in range(1, len(r) + 1):
        moments.append(phi * factorial / math.expm1(-step))
        factorial *= power + 1
        phi = phi / -step - 1 / factorial
    return np.linalg.solve(np.stack([r**power for power in range(len(r))]), np.array(moments))
