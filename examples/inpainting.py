"""Inpainting by replacement (RePaint without its resampling, arXiv:2201.09865): restore the known part at every step.

    python examples/inpainting.py runs/demo/family picture.png

The upper half of the image is kept, the lower half is generated.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from mlem import Family, sample
from mlem.images import image_grid
from mlem.outputs import read_png
from mlem.sampling import Step


def inpaint(family: Family, picture: Tensor, known: Tensor, count: int = 16) -> Tensor:
    """Images (count, C, H, W) that agree with an image (C, H, W) in [-1, 1] where `known` (C, H, W) is true."""
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))

    def revise(step: Step) -> Tensor:
        alpha, sigma = step.point.alpha, step.point.alpha * step.point.kappa
        return torch.where(known, alpha * picture + sigma * noise, step.x)

    found = sample(family, solver="ddpm", steps=64, indices=range(count), revise=revise).x
    return torch.where(known, picture, found)


if __name__ == "__main__":
    folder, path = sys.argv[1:]
    original = read_png(Path(path))
    upper = torch.arange(original.shape[1])[:, None] < original.shape[1] // 2
    pictures = inpaint(Family.load(folder), original, upper.expand_as(original))
    image_grid(pictures).save("inpainted.png")
