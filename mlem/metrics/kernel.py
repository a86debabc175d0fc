"""The kernel distance (KID, Binkowski et al., arXiv:1801.01401) between sets of features."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SUBSETS", "SUBSET_SIZE", "kernel_distance"]

SUBSETS = 100
SUBSET_SIZE = 1000
_SEED = 0


def kernel_distance(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the unbiased squared MMD with kernel (x.y / d + 1)^3.

    generated, real: (n, d) and (m, d), at least 2 rows each. Every subset holds min(1000, n, m) rows of each side,
    without replacement; there are 100 subsets, the same for the same n and m. Being unbiased, the value scatters around
    zero for samples of one distribution.
    """
    from torchmetrics.image.kid import poly_mmd

    generator = torch.Generator().manual_seed(_SEED)
    size = min(SUBSET_SIZE, len(generated), len(real))

    def subset(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size].to(features.device)]

    values = torch.stack([poly_mmd(subset(real), subset(generated)) for _ in range(SUBSETS)])
    return float(values.mean()), float(values.std(unbiased=False))
