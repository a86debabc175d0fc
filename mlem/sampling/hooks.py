"""Sampling hooks: `start` sets where samples begin, `revise` changes them on the way, `watch` observes them.

Image-to-image, inpainting, images of a trajectory and gradient guidance take a few lines each with these: see
`examples/`. All hooks see x as the networks do, `x_t = alpha_t x_0 + sigma_t z` with `alpha^2 + sigma^2 = 1`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mlem.schedule import NoiseSchedule
from mlem.solvers import GridPoint, GridPoints

__all__ = ["Hooks", "Revise", "Start", "Step", "Watch", "noised", "started"]


class Step(NamedTuple):
    """The state of a batch during sampling.

    Args:
        number: steps made so far.
        point: of the time grid: t, alpha and kappa, plain numbers.
        indices: (B,), int64, sample indices.
        x: (B, *shape), float64.
    """

    number: int
    point: GridPoint
    indices: Tensor
    x: Tensor


Start: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""start(indices, z): x (B, *shape) at the first time of the grid, given the noise z (B, *shape) of these samples."""

Watch: TypeAlias = Callable[[Step], None]
"""watch(step): observes the samples after each step."""

Revise: TypeAlias = Callable[[Step], Tensor]
"""revise(step): the x to continue from, given the state before each step. Must be a pure function."""


def noised(pictures: Tensor, schedule: NoiseSchedule, t: float) -> Start:
    """The start of image-to-image (SDEdit, arXiv:2108.01073): images with noise up to time t.

    Args:
        pictures: (N, *shape), in [-1, 1]; samples use them in turn.
        schedule: of the family.
        t: where the grid begins: `TimeGrid.make(...).below(t)`.
    """
    alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()

    def start(indices: Tensor, z: Tensor) -> Tensor:
        own = pictures.to(z)[indices % len(pictures)]
        return alpha * own + sigma * z

    return start


class Hooks:
    """The hooks of one run, as the solver's loop calls them, with y = x / alpha."""

    def __init__(self, points: GridPoints, indices: Tensor, revise: Revise | None, watch: Watch | None) -> None:
        self._points, self._indices, self._revise, self._watch = points, indices, revise, watch
        self._number = 0

    def revise(self, y: Tensor, here: GridPoint) -> Tensor:
        """y to continue from."""
        number, self._number = self._number, self._number + 1
        if self._revise is None:
            return y
        x = self._revise(Step(number, here, self._indices, y * here.alpha))
        if x.shape != y.shape:
            raise ValueError(f"revise= must return x of shape {tuple(y.shape)}, got {tuple(x.shape)}")
        return x.to(y) / here.alpha

    def watch(self, number: int, y: Tensor) -> None:
        """y after a step."""
        if self._watch is not None:
            here = self._points[number + 1]
            self._watch(Step(number + 1, here, self._indices, y * here.alpha))


def started(start: Start | None, indices: Tensor, z: Tensor) -> Tensor:
    """x at the first time. Raises ValueError for a start that is not finite or has the wrong shape."""
    if start is None:
        return z
    x = torch.as_tensor(start(indices, z)).to(z)
    if x.shape != z.shape:
        raise ValueError(f"start= must return x of shape {tuple(z.shape)}, got {tuple(x.shape)}")
    if x.device.type == "cpu" and not bool(torch.isfinite(x).all()):
        raise ValueError("start= returned NaN or infinity")
    return x
