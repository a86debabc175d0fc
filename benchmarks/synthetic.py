"""Hierarchies in closed form: the exact denoiser of a mixture, an error that falls with the level, and real work."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlem.denoiser import MixtureDenoiser
from mlem.family import Family
from mlem.level import Level
from mlem.multilevel.calibrate import measure
from mlem.multilevel.calibration import Calibration
from mlem.multilevel.fitted import Fitted
from mlem.noise import reserved_indices
from mlem.schedule import NoiseSchedule

__all__ = ["HIERARCHIES", "measured", "synthetic"]

COSINE = NoiseSchedule.cosine()
HIERARCHIES = {
    "two-levels": ((0.1, 1), (0.0, 16)),
    "four-levels": ((0.1, 1), (0.05, 4), (0.02, 16), (0.0, 64)),
}
"""Error and cost of each level."""
WIDTH = 512


class Waves(nn.Module):
    """The exact noise estimate of a mixture, plus waves: an error that stays bounded, like those of networks.

    work: products with a square matrix of WIDTH per call, which take as long as networks would.
    """

    mixing: Tensor

    def __init__(self, error: float, seed: int, work: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)))
        means = torch.tensor([[0.4, -0.2, 0.1], [-0.4, 0.2, -0.1]])
        self.exact = MixtureDenoiser(COSINE, torch.tensor([0.3, 0.7]), means, torch.tensor([0.5, 0.4]))
        self.error, self.work = error, work
        self.register_buffer("mixing", torch.eye(WIDTH), persistent=False)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        t = (timestep.double() + 1) / 1000
        wave = torch.cos(0.5 * x @ self.weight[:3].T + self.weight[:3, 0])
        if self.work:
            hidden = wave.new_zeros(len(x), WIDTH, dtype=self.mixing.dtype)
            for _ in range(self.work):
                hidden = hidden @ self.mixing
            wave = wave + hidden[:, :3]
        return self.exact(x, t) + self.error * COSINE.alpha(t)[:, None] * wave


def synthetic(name: str, *, working: bool = False) -> Family:
    """A family of HIERARCHIES.

    Args:
        working: whether levels take seconds in the ratio of their costs.
    """
    levels = [
        Level(str(k), Waves(error, k, cost if working else 0), COSINE, (3,), "eps", name, flops=cost)
        for k, (error, cost) in enumerate(HIERARCHIES[name])
    ]
    return Family(levels)


def measured(family: Family) -> Family:
    """The family, calibrated, with costs used as seconds."""
    found = measure(
        [one.denoiser for one in family.levels], COSINE, (3,), reserved_indices("calibration", 128), times=24
    )
    flops = tuple(float(one.flops) for one in family.levels)
    about = {"images": 128, "seed": 0, "device": "cpu", "weights": family.weights_hash}
    family.fitted = Fitted(Calibration(tuple(family.names), flops, {64: flops}, *found, about))
    return family
