"""Gradient guidance (Dhariwal and Nichol, arXiv:2105.05233): samples are pushed towards a small loss.

    python examples/gradient_guidance.py runs/demo/family

Here the loss favours bright images; any differentiable function of the noisy image will do.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from mlem import Family, sample
from mlem.images import image_grid
from mlem.sampling import Step


def guided(family: Family, loss: Callable[[Tensor], Tensor], scale: float = 1.0, count: int = 16) -> Tensor:
    """Samples (count, C, H, W) pushed downhill; loss: noisy images (B, C, H, W) -> (B,)."""

    def revise(step: Step) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = step.x.clone().requires_grad_()
            slope = torch.autograd.grad(loss(x).sum(), x)[0]
        # in proportion to the remaining noise
        return step.x - scale * (step.point.alpha * step.point.kappa) ** 2 * slope

    return sample(family, solver="ddim", steps=64, indices=range(count), revise=revise).x


if __name__ == "__main__":
    bright = guided(Family.load(sys.argv[1]), lambda x: -x.mean((1, 2, 3)), scale=1.0)
    image_grid(bright).save("bright.png")
