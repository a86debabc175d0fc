"""Similarity of images to reference images: PSNR and SSIM per image, by torchmetrics' functions.

Images are clamped to [-1, 1], a range of 2, as when written to files, but not rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SMALLEST", "psnr", "ssim"]

SMALLEST = 3
"""Pixels of the smaller side that `ssim` needs."""
_RANGE = (-1.0, 1.0)
_RADIUS = 5  # the window of Wang et al. (2004): 11 x 11, standard deviation 1.5
_CHUNK = 8  # images at a time: float64 convolutions of small tensors are several times faster on CPUs


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, 10 log10(4 / mean squared difference): (N,), float64.

    pictures, reference: (N, C, H, W), nominally in [-1, 1]. Infinite for equal images. Raises ValueError for shapes
    that differ or are not those of images.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, y = _float64(pictures, reference)
    return peak_signal_noise_ratio(x, y, data_range=_RANGE, dim=(1, 2, 3), reduction="none")


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al., 2004), at most 1: (N,), float64.

    The window is their Gaussian, 11 x 11 pixels with standard deviation 1.5. For images with a side below 11 it is the
    largest odd size that fits, with the standard deviation scaled: 7 x 7 and 0.9 for 8 x 8. Edges are reflected, and
    the mean is over all pixels and channels.

    Args:
        pictures: (N, C, H, W), nominally in [-1, 1].
        reference: the same shape.

    Raises:
        ValueError: shapes differ or are not those of images, or a side is below 3.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = _float64(pictures, reference)
    side = min(x.shape[2:])
    if side < SMALLEST:
        raise ValueError(f"ssim needs images of at least {SMALLEST}x{SMALLEST}, got {tuple(x.shape[2:])}")
    sigma = 0.3 * min(_RADIUS, (side - 1) // 2)  # torchmetrics makes the window from it, to 3.5 deviations
    found = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), _CHUNK):
        # channels as images: the same mean
        one, other = (images[start : start + _CHUNK].flatten(0, 1)[:, None] for images in (x, y))
        similar = structural_similarity_index_measure(one, other, sigma=sigma, data_range=_RANGE, reduction="none")
        assert isinstance(similar, Tensor)
        found[start : start + _CHUNK] = similar.view(-1, x.shape[1]).mean(1)
    return found


def _float64(pictures: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if pictures.shape != reference.shape or pictures.ndim != 4:
        given = f"{tuple(pictures.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"pictures and reference must both be (N, C, H, W), got {given}")
    return pictures.detach().double(), reference.detach().double()
