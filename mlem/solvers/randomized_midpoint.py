"""Randomized midpoints (Gupta, Cai and Chen, arXiv:2406.00924): the noise estimate of a step is taken at a random time.

Algorithm 1 of the paper steps by h from OU time s, with a ~ U[0, 1]:
`x_mid = e^{a h} x + (e^{a h} - 1) score_s(x)`, `x' = e^h x + h e^{(1-a) h} score_{s - a h}(x_mid)`.
In EDM coordinates (`y = e^s x`, `score = -eps / sigma`) that is `clock="ou"`:
`y_mid = y - (e^s - e^{s_mid}) / sigma eps`, `y' = y + (s' - s) (dkappa/ds)(s_mid) eps_mid`.
Its counterpart `clock="kappa"` draws the midpoint uniformly in kappa: DDIM, with the noise estimate of the midpoint.
Either is unbiased: averaged over midpoints the last line is the integral along the path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlem.brownian import NoisePath
from mlem.noise import NoiseStream
from mlem.schedule import expand_like
from mlem.solvers.base import GridPoint, GridPoints, NoiseEstimate, Solver
from mlem.solvers.clock import make_clock

__all__ = ["MIDPOINTS", "RandomizedMidpoint", "SDERandomizedMidpoint", "draw_midpoints"]

MIDPOINTS = ("own", "shared")
"""Whether each sample has its own midpoints, or all share them."""


def draw_midpoints(indices: Tensor, seed: int, count: int, midpoints: str) -> Tensor:
    """Fractions in (0, 1) for each of `count` midpoints and each sample: (count, B) float64."""
    keys = indices if midpoints == "own" else indices[:1] * 0
    return (
        NoiseStream(seed, f"midpoint-{midpoints}").uniform(keys, range(count), torch.float64).expand(-1, len(indices))
    )


class _TwoCalls(Solver):
    """Common to both methods. State: the fractions of the remaining steps, (steps, B).

    A step from pure noise has no midpoint: it is a DDIM step, with one evaluation.
    """

    midpoints: str
    default_grid = "log_snr"

    @staticmethod
    def _checked(midpoints: str) -> str:
        if midpoints not in MIDPOINTS:
            raise ValueError(f"midpoints must be one of {', '.join(MIDPOINTS)}, got {midpoints!r}")
        return midpoints

    def evaluations(self, points: GridPoints) -> int:
        return 2 * points.steps - points[0].pure_noise

    def init(self, points: GridPoints, indices: Tensor, seed: int) -> Tensor:
        return draw_midpoints(indices, seed, points.steps, self.midpoints)


class RandomizedMidpoint(_TwoCalls):
    """Two evaluations per step.

    clock: what midpoints are uniform in, `kappa` or `ou`. midpoints: each sample has its `own`, or one is `shared`.
    Root-mean-square order 3/2; the mean over midpoints has order 2.
    """

    name = "randomized_midpoint"
    order = 1.5
    stochastic = False
    reference = "dpm_solver_pp"

    def __init__(self, clock: str = "kappa", midpoints: str = "own") -> None:
        self.clock, self.midpoints = make_clock(clock), self._checked(midpoints)
        if clock == "ou":
            self.default_grid = "ou_halving"

    def step(
        self, eps: NoiseEstimate, y: Tensor, state: Tensor, here: GridPoint, there: GridPoint, path: NoisePath
    ) -> tuple[Tensor, Tensor]:
        if here.pure_noise:
            return y + (there.kappa - here.kappa) * eps(y, here), state[1:]
        middle = self.clock.place(here.kappa, there.kappa, state[0])
        y_mid = y + expand_like(self.clock.drift(here.kappa, middle, here.kappa), y) * eps(y, here)
        weight = self.clock.weight(here.kappa, there.kappa, middle)
        return y + expand_like(weight, y) * eps(y_mid, middle), state[1:]


class SDERandomizedMidpoint(_TwoCalls):
    """The same for the reverse SDE, midpoint uniform in kappa and on the same Brownian path.

    Stable if kappa falls by at most half per step, as on the default grid from 17 steps on (docs/solvers.md).
    The path is as rough as its noise, so one midpoint leaves an error of order h^(3/2) per step: strong order 1, and
    measured pathwise no better than Euler-Maruyama (LOG.md).

    `y_mid = y + 2 (kappa_mid - kappa) eps + B(kappa^2) - B(kappa_mid^2)`,
    `y' = y + 2 (kappa' - kappa) eps_mid + B(kappa^2) - B(kappa'^2)`.
    """

    name = "randomized_midpoint_sde"
    order = 1.0
    stochastic = True
    reference = "euler_maruyama"
    exact_on_a_point = False

    def __init__(self, midpoints: str = "own") -> None:
        self.midpoints = self._checked(midpoints)

    def step(
        self, eps: NoiseEstimate, y: Tensor, state: Tensor, here: GridPoint, there: GridPoint, path: NoisePath
    ) -> tuple[Tensor, Tensor]:
        if here.pure_noise:
            return y + (there.kappa - here.kappa) * eps(y, here), state[1:]  # as Euler-Maruyama does
        middle = here.kappa + (there.kappa - here.kappa) * state[0]
        at_here = path.at(here.t)
        at_middle, at_there = path.between(there.t, middle)
        y_mid = y + expand_like(2 * (middle - here.kappa), y) * eps(y, here) + at_here - at_middle
        return y + 2 * (there.kappa - here.kappa) * eps(y_mid, middle) + at_here - at_there, state[1:]
