"""From noise to image: the samples after every eighth step.

python examples/trajectory.py runs/demo/family
"""

import sys

import torch
from torch import Tensor

from mlem import Family, sample
from mlem.images import image_grid
from mlem.sampling import Step


def way(family: Family, count: int = 8, steps: int = 64, every: int = 8) -> Tensor:
    """The samples along the trajectory: (steps / every, count, C, H, W)."""
    seen: list[Tensor] = []

    def watch(step: Step) -> None:
        if step.number % every == 0:
            seen.append(step.x)

    sample(family, solver="ddim", steps=steps, indices=range(count), watch=watch)
    return torch.stack(seen)


if __name__ == "__main__":
    pictures = way(Family.load(sys.argv[1]))
    image_grid(pictures.flatten(0, 1), columns=pictures.shape[1]).save("trajectory.png")
