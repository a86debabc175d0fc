"""Image features that need no download: a fixed random convolutional network.

Distances between such features compare samplers on one data set; they say nothing about semantics and must not be
compared with Inception numbers, so the protocol, `random256`, is part of the metric's name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["RandomFeatures"]

_SEED = 256
_WIDTHS = (32, 48, 64)
_SMALLEST = 8


class RandomFeatures(nn.Module):
    """256 features of uint8 images: three strided 3x3 convolutions with He-scaled Gaussian weights.

    channels: of the images, such as 1 (grey) or 3 (colour); size: their smaller side in pixels, at least 8.
    The second layer is pooled on a 2x2 grid (48 x 4 features: layout), the third as a whole (64 features).
    float64 throughout, so batch size, autocast, TF32 and device change features by round-off (1e-12) only.
    The weights define the protocol: they come from a generator of their own and never change.
    """

    num_features = 4 * _WIDTHS[1] + _WIDTHS[2]
    protocol = "random256"

    def __init__(self, channels: int, size: int):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be >= 1, got {channels}")
        if size < _SMALLEST:
            raise ValueError(f"random256 features need images of at least {_SMALLEST}x{_SMALLEST}, got size {size}")
        self.channels = channels
        generator = torch.Generator().manual_seed(_SEED)
        for layer, (wide_in, wide_out) in enumerate(zip((channels, *_WIDTHS[:-1]), _WIDTHS, strict=True)):
            weight = torch.randn(wide_out, wide_in, 3, 3, generator=generator, dtype=torch.float64)
            bias = torch.randn(wide_out, generator=generator, dtype=torch.float64)
            # He scaling keeps the size of activations; the biases spread the kinks over the range of values
            self.register_buffer(f"weight_{layer}", weight * math.sqrt(2 / (9 * wide_in)))
            self.register_buffer(f"bias_{layer}", 0.5 * bias)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, channels, H, W), uint8, H and W at least 8. Returns (N, 256), float64."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != self.channels:
            wanted = f"uint8 images (N, {self.channels}, H, W)"
            raise ValueError(f"random256 features take {wanted}, got {images.dtype} {tuple(images.shape)}")
        if min(images.shape[2:]) < _SMALLEST:
            raise ValueError(f"random256 features need at least {_SMALLEST}x{_SMALLEST}, got {tuple(images.shape)}")
        x = images.double() / 127.5 - 1
        first = self._layer(x, 0)  # (N, 32, H/2, W/2)
        second = self._layer(first, 1)  # (N, 48, H/4, W/4)
        third = self._layer(second, 2)  # (N, 64, H/8, W/8)
        return torch.cat([F.adaptive_avg_pool2d(second, 2).flatten(1), third.mean((2, 3))], dim=1)

    def _layer(self, x: Tensor, layer: int) -> Tensor:
        weight, bias = self.get_buffer(f"weight_{layer}"), self.get_buffer(f"bias_{layer}")
        return F.leaky_relu(F.conv2d(x, weight, bias, stride=2, padding=1), 0.2)
