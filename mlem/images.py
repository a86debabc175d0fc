"""Images as numbers: from the model's [-1, 1] to the 256 values of a picture file.

Lives here: quantisation, the one place where it is done, so that metrics, figures and files agree.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(x: Tensor) -> Tensor:
    """Round images to the 256 values a PNG can hold.

    x: (N, ...), floating point, nominally in [-1, 1]; what lies outside is clamped.
    Returns uint8 of the same shape: -1 -> 0, 1 -> 255, rounded to nearest, not truncated.
    Raises ValueError naming the first sample (index along dimension 0) that is not finite.
    """
    if not x.is_floating_point():
        raise ValueError(f"images to quantise must be floating point in [-1, 1], got {x.dtype}")
    bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero()
    if len(bad):
        raise ValueError(f"sample {int(bad[0])} of {len(x)} has values that are not finite; it cannot become an image")
    # float32 at least: bfloat16 cannot hold all integers up to 255 with their fractions
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
