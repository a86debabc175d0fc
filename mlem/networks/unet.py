"""The UNets: sizes xs to xl, set by the channels at full resolution.

A network is a diffusers `UNet2DModel` and nothing else, so that its folder on disk is one that diffusers reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

__all__ = ["SIZES", "unet"]

SIZES: dict[str, int] = {"xs": 8, "s": 16, "m": 32, "l": 64, "xl": 128}
"""Name of a size -> channels at full resolution. Twice the channels are about 4 times the FLOPs."""


def unet(size: str, shape: Sequence[int], dropout: float = 0.0) -> UNet2DModel:
    """Build a UNet with fresh weights.

    Full resolution has SIZES[size] channels, and each of the one or two halvings that the image allows (no
    lower than 4 pixels) twice as many. Convolutions only: forward-mode differentiation passes through, as long as
    the weights and the images are not in channels_last (torch's group norm cannot do both).

    Args:
        size: a key of SIZES.
        shape: (C, H, W) of an image; H and W even, at least 4.
        dropout: share of the values that are set to 0 in training, in [0, 1).

    Raises:
        ValueError: the size is not known, the image cannot be halved, or dropout is out of range.
    """
    if size not in SIZES:
        raise ValueError(f"network size must be one of {', '.join(SIZES)}, got {size!r}")
    if len(shape) != 3:
        raise ValueError(f"image shape must be (channels, height, width), got {tuple(shape)}")
    channels, height, width = shape
    if height % 2 or width % 2 or min(height, width) < 4:
        raise ValueError(f"image height and width must be even and at least 4, got {height} and {width}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    from diffusers.models.unets.unet_2d import UNet2DModel

    halvings = 2 if height % 4 == 0 and width % 4 == 0 and min(height, width) >= 16 else 1
    stages = halvings + 1
    return UNet2DModel(
        sample_size=(height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(SIZES[size] * 2 ** min(i, 1) for i in range(stages)),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * stages,
        up_block_types=("UpBlock2D",) * stages,
        add_attention=False,
        norm_num_groups=4,
        dropout=dropout,
    )
