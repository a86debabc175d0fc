"""A UNet on patches: every patch of pixels becomes the channels of one.

The time of small networks at full resolution depends on the number of pixels, not on arithmetic. On patches of 2 x 2
with twice the channels the FLOPs are the same and the time about half (`LOG.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from mlem.networks.unet_2d import UNet2DModel

__all__ = ["PatchUNet2DModel"]


class PatchUNet2DModel(ModelMixin, ConfigMixin):
    """A convolutional `UNet2DModel` that works on patches but is called like one that works on pixels.

    `x (B, C, H, W)` is rearranged to `(B, C P^2, H/P, W/P)`, and the output is rearranged back.

    Args:
        sample_size: pixels per side, or (height, width); multiples of patch_size.
        in_channels, out_channels: C.
        patch_size: P, pixels per side of a patch.
        block_out_channels: channels of each stage; every stage but the first has half the resolution of the one before.
        layers_per_block: residual blocks of each stage.
        dropout: probability of dropout in training, in [0, 1).
        norm_num_groups: groups of each group norm.
        num_class_embeds: number of classes, including "no class"; None: it takes no classes.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int],
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int = 2,
        block_out_channels: Sequence[int] = (16, 32),
        layers_per_block: int = 1,
        dropout: float = 0.0,
        norm_num_groups: int = 4,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        sides = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        stages = len(block_out_channels)
        self.unet = UNet2DModel(
            sample_size=(sides[0] // patch_size, sides[1] // patch_size),
            in_channels=in_channels * patch_size**2,
            out_channels=out_channels * patch_size**2,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            down_block_types=("DownBlock2D",) * stages,
            up_block_types=("UpBlock2D",) * stages,
            add_attention=False,
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            num_class_embeds=num_class_embeds,
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Like `UNet2DModel.forward`."""
        size = self._patch_size
        out: Any = self.unet(pixel_unshuffle(sample, size), timestep, class_labels, return_dict=False)
        x = pixel_shuffle(out[0], size)
        return UNet2DOutput(sample=x) if return_dict else (x,)

    @property
    def _patch_size(self) -> int:
        return self.config["patch_size"]
