"""Images as numbers: from the model's [-1, 1] to the 256 values of an image file, alone or side by side.

Quantisation happens here and nowhere else, so that metrics, figures and files agree.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["GUTTER", "image_grid", "quantise"]

GUTTER = 200
"""The grey between images of a grid, distinct from black and white images alike."""


def quantise(x: Tensor) -> Tensor:
    """Round images to the 256 values a PNG can hold.

    Args:
        x: (N, ...), floating point, nominally in [-1, 1]; values outside are clamped.

    Returns: uint8 of the same shape: -1 -> 0, 1 -> 255, rounded to nearest, not truncated.

    Raises:
        ValueError: names the first sample (index along dimension 0) that is not finite.
    """
    if not x.is_floating_point():
        raise ValueError(f"images to quantise must be floating point in [-1, 1], got {x.dtype}")
    bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero()
    if len(bad):
        raise ValueError(f"sample {int(bad[0])} of {len(x)} has values that are not finite; it cannot become an image")
    # float32 at least: bfloat16 cannot hold all integers up to 255 with their fractions
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(images: Tensor, columns: int | None = None, scale: int | None = None) -> Image:
    """Images side by side, row by row, every pixel enlarged to a scale x scale square, between grey gutters.

    The gutters are 2 pixels, around the whole too.

    Args:
        images: (N, C, H, W), C 1 or 3, in [-1, 1] (clamped and rounded by `quantise`) or uint8.
        columns: by default as close to a square as possible.
        scale: by default enough to make the smaller side at least 64 pixels.

    Raises:
        ValueError: other shapes, no images, or columns or scale below 1.
    """
    from PIL import Image as pillow

    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise ValueError(f"images must be (N, C, H, W) with C 1 or 3 and no dimension 0, got {tuple(images.shape)}")
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    scale = math.ceil(64 / min(height, width)) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be >= 1, got {columns} and {scale}")
    pixels = images if images.dtype == torch.uint8 else quantise(images)
    pixels = pixels.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    gap, tall, wide = 2, height * scale, width * scale
    rows = math.ceil(count / columns)
    canvas = torch.full((channels, gap + rows * (tall + gap), gap + columns * (wide + gap)), GUTTER, dtype=torch.uint8)
    for index, picture in enumerate(pixels):
        top, left = gap + index // columns * (tall + gap), gap + index % columns * (wide + gap)
        canvas[:, top : top + tall, left : left + wide] = picture
    array = canvas[0] if channels == 1 else canvas.permute(1, 2, 0)
    return pillow.fromarray(array.contiguous().numpy())
