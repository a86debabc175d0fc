"""The UNets: sizes xs to xl, set by the channels at full resolution, purely convolutional or with attention.

A network is a diffusers `UNet2DModel`, so diffusers can read its folder; the smallest sizes work on patches, which
takes half the time of a network with as many FLOPs on pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlem.networks.patch_unet import PatchUNet2DModel
    from mlem.networks.unet_2d import UNet2DModel

__all__ = ["SIZES", "unet"]

SIZES: dict[str, int] = {"xs": 8, "s": 16, "m": 32, "l": 64, "xl": 128}
"""Name of a size -> channels at full resolution. Twice the channels are about 4 times the FLOPs."""

PATCHED = ("xs", "s")
"""Sizes on patches of 2 x 2 pixels with twice the channels, for images with at least 16 pixels per side."""


def unet(
    size: str, shape: Sequence[int], dropout: float = 0.0, attention: bool = False, classes: int = 0
) -> UNet2DModel | PatchUNet2DModel:
    """Build a UNet with fresh weights.

    Full resolution has SIZES[size] channels, doubled at each halving; on patches, it is the network for an image half
    as large with twice the channels. Purely convolutional networks have one or two halvings, as the image allows (no
    lower than 4 pixels). With attention it is the network of Ho et al. (arXiv:2006.11239) for CIFAR-10, exactly so at
    size xl: three halvings, two blocks at each resolution, and attention with one head at the first resolution of 16x16
    pixels or fewer.

    Forward-mode differentiation works unless weights or images are in channels_last (a limit of torch's group norm).

    Args:
        size: a key of SIZES.
        shape: (C, H, W) of an image; H and W even, at least 4; with attention multiples of 8, at least 32.
        dropout: probability of dropout in training, in [0, 1).
        attention: the network of Ho et al. instead of convolutions only.
        classes: above 0: it takes `class_labels`, (B,) int64 in [0, classes], where the last means "no class".

    Raises:
        ValueError: the size is unknown, the image cannot be halved, or dropout is out of range.
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
    if attention and (height % 8 or width % 8 or min(height, width) < 32):
        raise ValueError(
            f"attention needs images of 32x32 or more, height and width multiples of 8, got {height} and {width}"
        )
    if size in PATCHED and not attention and min(height, width) >= 16 and height % 4 == width % 4 == 0:
        return _on_patches(SIZES[size], shape, dropout, classes)
    from mlem.networks.unet_2d import UNet2DModel

    design = _with_attention(SIZES[size], min(height, width)) if attention else _plain(SIZES[size], height, width)
    return UNet2DModel(
        sample_size=height if height == width else (height, width),  # most pipelines only know squares
        in_channels=channels,
        out_channels=channels,
        dropout=dropout,
        num_class_embeds=classes + 1 if classes else None,
        **design,
    )


def _on_patches(channels: int, shape: Sequence[int], dropout: float, classes: int) -> PatchUNet2DModel:
    """The convolutional network on patches of 2 x 2."""
    from mlem.networks.patch_unet import PatchUNet2DModel

    _, height, width = shape
    return PatchUNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=_plain(2 * channels, height // 2, width // 2)["block_out_channels"],
        dropout=dropout,
        num_class_embeds=classes + 1 if classes else None,
    )


def _plain(channels: int, height: int, width: int) -> dict[str, Any]:
    """The diffusers config of a convolutional network."""
    halvings = 2 if height % 4 == 0 and width % 4 == 0 and min(height, width) >= 16 else 1
    stages = halvings + 1
    return {
        "block_out_channels": tuple(channels * 2 ** min(i, 1) for i in range(stages)),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",) * stages,
        "up_block_types": ("UpBlock2D",) * stages,
        "add_attention": False,
        "norm_num_groups": 4,
    }


def _with_attention(channels: int, side: int) -> dict[str, Any]:
    """The diffusers config of the network of Ho et al.; side: the smaller side of the image."""
    at = next((i for i in range(4) if side // 2**i <= 16), 3)
    attends = [i == at for i in range(4)]
    return {
        "block_out_channels": (channels, 2 * channels, 2 * channels, 2 * channels),
        "layers_per_block": 2,
        "down_block_types": tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        "up_block_types": tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        "attention_head_dim": None,  # one head
        "norm_num_groups": max(4, channels // 4),
        "norm_eps": 1e-6,
        # as in TensorFlow, which the published weights need
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    }
