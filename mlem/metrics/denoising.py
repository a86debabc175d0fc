"""The denoising error of a network on held-out images, at fixed noise levels."""

from __future__ import annotations

import torch
from torch import Tensor

from mlem.denoiser import Denoiser
from mlem.noise import NoiseStream
from mlem.schedule import NoiseSchedule, expand_like

__all__ = ["NOISE_LEVELS", "denoising_errors"]

NOISE_LEVELS = tuple((i + 0.5) / 10 for i in range(10))
"""Times at which the denoising error is measured."""


def denoising_errors(
    denoiser: Denoiser, schedule: NoiseSchedule, images: Tensor, index: Tensor, seed: int
) -> dict[float, Tensor]:
    """Mean squared error of the noise estimate of each image, (B,), at each of NOISE_LEVELS.

    Args:
        denoiser: makes the estimate.
        schedule: of the noise.
        images: (B, C, H, W), in [-1, 1].
        index: (B,); keys the noise, so that every network sees the same.
        seed: of the noise.
    """
    stream, errors = NoiseStream(seed, "validation"), {}
    for slot, time in enumerate(NOISE_LEVELS):
        t = torch.full((len(images),), time, device=images.device)
        z = stream.normal(index, [slot], images.shape[1:], images.dtype)[0]
        alpha, sigma = (expand_like(scale, images) for scale in schedule.scales(t))
        x_t = alpha * images + sigma * z
        errors[time] = (denoiser(x_t.contiguous(memory_format=torch.channels_last), t) - z).square().flatten(1).mean(1)
    return errors
