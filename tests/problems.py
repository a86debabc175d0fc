"""Problems with known answers, shared by the tests: schedules, Gaussian data, small networks, the solver loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlem.brownian import BrownianPath
from mlem.denoiser import MixtureDenoiser, gaussian_denoiser
from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.level import Level
from mlem.multilevel.coins import COINS
from mlem.networks import unet
from mlem.schedule import NoiseSchedule
from mlem.solvers import EvaluationPoint, GridPoint, Solver, model_input

DIFFUSERS_CONFIGS: dict[str, dict[str, Any]] = {
    "ddpm": {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "squaredcos": {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "zero_snr": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    "trained": {"trained_betas": np.linspace(1e-4, 0.03, 1000).tolist()},
}
"""Scheduler configs as diffusers writes them."""

SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {
    "cosine": NoiseSchedule.cosine,
    "linear": NoiseSchedule.linear,
    "edm": NoiseSchedule.edm,
    "flow": lambda: NoiseSchedule.flow(3.0),
    **{
        name: (lambda config=config: NoiseSchedule.from_diffusers(config)) for name, config in DIFFUSERS_CONFIGS.items()
    },
}
"""Every kind of schedule: name -> its maker."""

MEAN = torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.6, -0.2], [0.6, 0.8, 0.1], [-0.2, 0.1, 0.3]], dtype=torch.float64)
"""Gaussian data in three dimensions, correlated."""


def gaussian(schedule: NoiseSchedule) -> MixtureDenoiser:
    """The exact denoiser of N(MEAN, COVARIANCE)."""
    return gaussian_denoiser(schedule, MEAN, COVARIANCE)


DEVIATIONS = torch.tensor([0.5, 0.2, 0.1, 0.7], dtype=torch.float64)
"""Standard deviations of a Gaussian whose coordinates are independent."""


def uneven_gaussian(schedule: NoiseSchedule) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact denoiser of N(0, diag(DEVIATIONS^2)), for x of any shape with four numbers a sample."""
    exact = gaussian_denoiser(schedule, torch.zeros(4, dtype=torch.float64), torch.diag(DEVIATIONS.square()))
    return lambda x, t: exact(x.flatten(1), t).view_as(x)


def mixture(schedule: NoiseSchedule) -> MixtureDenoiser:
    """The exact denoiser of an uneven mixture of two correlated Gaussians."""
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    return MixtureDenoiser(
        schedule, weights, torch.stack([MEAN, -2 * MEAN]), torch.stack([COVARIANCE, 0.25 * COVARIANCE])
    )


def point_mass(schedule: NoiseSchedule, x_0: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact denoiser of data that is always x_0: (d,)."""

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return (x - schedule.alpha(t)[:, None] * x_0.to(x.dtype)) / schedule.sigma(t)[:, None]

    return eps


def gaussian_flow(y: Tensor, kappa: float, kappa_end: float) -> Tensor:
    """Exact solution of `dy/dkappa = kappa (Sigma + kappa^2)^-1 (y - m)` for Gaussian data; y: (B, 3).

    In an eigendirection of variance l, `d ln(y - m) = kappa dkappa / (l + kappa^2)`: y - m grows as
    `sqrt(l + kappa^2)`.
    """
    values, axes = torch.linalg.eigh(COVARIANCE)
    scale = torch.sqrt((values + kappa_end**2) / (values + kappa**2))
    return MEAN + ((y - MEAN) @ axes * scale) @ axes.T


def solve(
    solver: Solver, denoiser: Any, schedule: NoiseSchedule, times: Sequence[float], y: Tensor, path: BrownianPath
) -> Tensor:
    """The solver loop on any times, from y at times[0] to y at times[-1]; without a Sampler."""
    points = GridPoint.of(schedule, TimeGrid("custom", tuple(times)))

    def eps(y: Tensor, place: EvaluationPoint) -> Tensor:
        return denoiser(*model_input(schedule, y, place))

    return solver.integrate(eps, y, points, path, torch.arange(len(y)), 0)


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Order of convergence: minus the slope of log error against log steps, by least squares."""
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def rms(difference: Tensor) -> float:
    """Root mean square over all entries."""
    return math.sqrt(difference.square().mean().item())


def level(size: str = "xs", shape: Sequence[int] = (1, 8, 8), *, seed: int = 0, **options: Any) -> Level:
    """An untrained level with weights that the seed fixes; the global random state is left alone."""
    dropout = options.pop("dropout", 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = unet(size, shape, dropout)
    return Level(
        options.pop("name", size), network, options.pop("schedule", NoiseSchedule.cosine()), tuple(shape), **options
    )


def outcomes(coins: str, p: Tensor) -> tuple[Tensor, Tensor]:
    """All tables of counts (N, R, K) that these coins can give, and their probabilities (N,).

    The counts are constant between the breakpoints of each uniform number; cells of no width are left out.
    """
    running = torch.where(p >= 1, 0.0, p).cumsum(0)
    breaks = {"bernoulli": p.reshape(-1, 1), "nested": p, "systematic": (-running % 1).T}[coins]
    cells = []
    for inside in breaks:
        ends = torch.cat([torch.zeros(1, dtype=p.dtype), inside.sort().values, torch.ones(1, dtype=p.dtype)])
        pairs = [(low, high) for low, high in itertools.pairwise(ends.tolist()) if high > low + 1e-12]
        cells.append([((low + high) / 2, high - low) for low, high in pairs])
    whole = torch.tensor(list(itertools.product(*cells)), dtype=torch.float64)
    return COINS[coins].counts(p, whole[..., 0]), whole[..., 1].prod(1)


class ClosedForm(nn.Module):
    """A network that is a formula in float64: the noise estimate of `gaussian` plus an error, nonlinear in x.

    size: makes the FLOPs rise. The weights are fixed by the seed.
    """

    def __init__(self, size: int, error: float, schedule: NoiseSchedule) -> None:
        super().__init__()
        values = torch.randn(3, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
        self.weight = nn.Parameter(values)
        self.error, self.exact = error, gaussian(schedule)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        t = (timestep.double() + 1) / 1000
        return self.exact(x, t) + self.error * torch.cos(x @ self.weight + t[:, None]).mean(1, keepdim=True)


def closed_family(errors: Sequence[float] = (0.5, 0.2, 0.05)) -> Family:
    """Levels "1", "2", .. in closed form and float64, with these errors; use it where the default dtype is float64."""
    schedule = NoiseSchedule.cosine()
    return Family(
        [
            Level(str(number), ClosedForm(4**number, error, schedule), schedule, (3,), "eps", "points")
            for number, error in enumerate(errors, 1)
        ]
    )
