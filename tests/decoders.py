"""A decoder of latents for tests: a real class, tiny, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_decoder(folder: Path, channels: int = 1, seed: int = 0, **options: Any) -> Path:
    """A tiny AutoencoderKL with random weights, which halves pictures once."""
    from diffusers import AutoencoderKL  # which takes seconds

    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes: dict[str, Any] = {"in_channels": channels, "out_channels": channels, "latent_channels": 4}
    sizes |= {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
    AutoencoderKL(**blocks, **sizes, mid_block_add_attention=False, **options).save_pretrained(folder)
    return folder
