"""DPM-Solver++ (2M) for the ODE and the SDE (Lu et al., arXiv:2211.01095, Algorithm 2 and Appendix on SDEs).

With `lambda = -ln kappa` and `h` the step in lambda, both step from the extrapolated data estimate
`D = x0_i + (h_i / h_{i-1}) (x0_i - x0_{i-1}) / 2`. The first step, and the step to kappa' = 0, take `D = x0_i`; so
does the one after a step from pure noise, for which h is infinite.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

from torch import Tensor

from mlem.brownian import NoisePath
from mlem.solvers.base import GridPoint, NoiseEstimate, Solver
from mlem.solvers.ddpm import ancestral_noise

__all__ = ["DPMSolverPP", "SDEDPMSolverPP"]


class _Previous(NamedTuple):
    data: Tensor
    step: float


def _extrapolated(
    eps: NoiseEstimate, y: Tensor, previous: _Previous | None, here: GridPoint, there: GridPoint
) -> tuple[Tensor, _Previous]:
    """D of the module docstring, and what the next step needs."""
    data = y - here.kappa * eps(y, here)
    if there.kappa == 0:
        return data, _Previous(data, math.inf)
    step = math.inf if here.pure_noise else math.log(here.kappa / there.kappa)
    if previous is None:
        return data, _Previous(data, step)
    slope = (data - previous.data).mul_(step / (2 * previous.step))
    return slope.add_(data), _Previous(data, step)


class _DPMSolver(Solver):
    """`y' = r y + (1 - r) D`, `r = (kappa'/kappa)^power`; for the SDE plus the noise of an ancestral step."""

    power: ClassVar[int]
    default_grid = "log_snr"
    measured_grids = ("uniform", "log_snr")

    def step(
        self,
        eps: NoiseEstimate,
        y: Tensor,
        state: _Previous | None,
        here: GridPoint,
        there: GridPoint,
        path: NoisePath,
    ) -> tuple[Tensor, _Previous]:
        data, state = _extrapolated(eps, y, state, here, there)
        ratio = (there.kappa / here.kappa) ** self.power
        y = (ratio * y).add_((1 - ratio) * data)
        return (y.add_(ancestral_noise(path, here, there)) if self.stochastic else y), state


class DPMSolverPP(_DPMSolver):
    """DPM-Solver++ 2M for the ODE."""

    name = "dpm_solver_pp"
    order = 2.0
    power = 1
    stochastic = False
    reference = "dpm_solver_pp"


class SDEDPMSolverPP(_DPMSolver):
    """DPM-Solver++ 2M for the SDE."""

    name = "dpm_solver_pp_sde"
    order = 1.0
    power = 2
    stochastic = True
    reference = "ddpm"
