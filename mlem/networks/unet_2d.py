"""The UNet of diffusers, called without a walk through all of its modules."""

from __future__ import annotations

import torch
from diffusers.models.unets import unet_2d

__all__ = ["UNet2DModel"]


class UNet2DModel(unet_2d.UNet2DModel):
    """As in diffusers, under the same name in its config.

    Every call asks for `dtype`, for which diffusers looks through all modules: 0.4 ms, a twentieth of the time of a
    small network on a batch of 64.
    """

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.conv_in.weight.dtype
