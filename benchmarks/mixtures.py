"""Mixtures of three Gaussians with exact scores, samples and projections; midpoints.py measures on them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlem.denoiser import MixtureDenoiser
from mlem.noise import NoiseStream
from mlem.sampling import Sampler
from mlem.schedule import NoiseSchedule
from mlem.solvers import Solver

COSINE = NoiseSchedule.cosine()
WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
DIRECTIONS = 100
SHORT = {"uniform": "t", "log_snr": "snr", "karras": "karras", "ou_halving": "ou"}
"""Names of grids in tables."""


class Problem:
    """A mixture of isotropic Gaussians in d dimensions: its denoiser, exact samples and projections."""

    def __init__(self, dimension: int, distance: float, deviation: float, apart: float = 0.0) -> None:
        """apart: the least distance between two means, in units of theirs from 0."""
        stream = NoiseStream(0, "midpoints/means")
        draws = (stream.normal(torch.arange(3), [slot], (dimension,), torch.float64)[0] for slot in itertools.count())
        # in two dimensions random directions may nearly agree: two modes in one
        spread = (draw / draw.norm(dim=1, keepdim=True) for draw in draws)
        directions = next(draw for draw in spread if torch.pdist(draw).min() > apart)
        self.means, self.deviation = distance * directions, deviation
        self.denoiser = MixtureDenoiser(COSINE, WEIGHTS, self.means, torch.full((3,), deviation**2))
        self.shape = (dimension,)
        slopes = NoiseStream(0, "midpoints/slices").normal(torch.arange(DIRECTIONS), [0], (dimension,), torch.float64)[
            0
        ]
        self._slices = slopes / slopes.norm(dim=1, keepdim=True)

    def run(self, solver: str | Solver, steps: int, indices: Sequence[int], seed: int, grid: str | None = None) -> Any:
        """The result of these samples, as one batch."""
        options: dict[str, Any] = {"schedule": COSINE, "shape": self.shape, "seed": seed, "grid": grid}
        return Sampler(self.denoiser, solver=solver, steps=steps, **options).run(indices)

    def exact(self, count: int, seed: int) -> Tensor:
        """Samples of the mixture itself, (count, d)."""
        stream, indices = NoiseStream(seed, "midpoints/exact"), torch.arange(count)
        modes = torch.searchsorted(WEIGHTS.cumsum(0), stream.uniform(indices, [0], torch.float64)[0])
        return (
            self.means[modes.clamp(max=2)] + self.deviation * stream.normal(indices, [1], self.shape, torch.float64)[0]
        )

    def slices(self, x: Tensor) -> Tensor:
        """Projections of x (N, d), each sorted: (N, DIRECTIONS)."""
        return (x @ self._slices.T).sort(0).values

    def quantiles(self, count: int) -> Tensor:
        """The `slices` of `count` samples at the exact quantiles."""
        middles, levels = (self.means @ self._slices.T).numpy(), (np.arange(count) + 0.5) / count
        found = []
        for column in middles.T:
            values = np.linspace(column.min() - 8 * self.deviation, column.max() + 8 * self.deviation, 20_001)
            away = torch.from_numpy((values - column[:, None]) / self.deviation)
            found.append(np.interp(levels, (WEIGHTS[:, None] * torch.special.ndtr(away)).sum(0).numpy(), values))
        return torch.from_numpy(np.stack(found, 1))

    def weights(self, x: Tensor) -> Tensor:
        """The share of samples nearest to each mean, as differences from WEIGHTS in standard errors: (3,)."""
        share = torch.bincount(torch.cdist(x, self.means).argmin(1), minlength=3) / len(x)
        return (share - WEIGHTS) / (WEIGHTS * (1 - WEIGHTS) / len(x)).sqrt()


def distance(one: Tensor, other: Tensor) -> float:
    """Wasserstein-2 of sorted projections, root mean square over directions."""
    return (one - other).square().mean().sqrt().item()
