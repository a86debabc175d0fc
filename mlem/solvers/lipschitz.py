"""How fast the score changes with x: the constant L that sizes predictor and corrector steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlem.denoiser import Denoiser
from mlem.grids import TimeGrid
from mlem.noise import NoiseStream, reserved_indices
from mlem.schedule import NoiseSchedule, expand_like
from mlem.solvers.base import EvaluationPoint, GridPoint, model_input

__all__ = ["Lipschitz", "estimate_lipschitz"]


class Lipschitz(NamedTuple):
    """Lipschitz constants of the score of x_t: one number for all t, or a table of (t, L), log-linear in between."""

    number: float | None = None
    table: tuple[tuple[float, float], ...] = ()

    @staticmethod
    def of(value: float | Sequence[tuple[float, float]] | None) -> Lipschitz:
        """Raises ValueError unless given a positive number, or a table of them with falling times."""
        if value is None:
            return Lipschitz()
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not 0 < value < math.inf:
                raise ValueError(f"lipschitz must be a positive number, got {value!r}")
            return Lipschitz(float(value))
        try:
            table = tuple((float(t), float(constant)) for t, constant in value)  # type: ignore[union-attr]
        except (TypeError, ValueError) as error:
            raise ValueError(f"lipschitz must be a positive number or a table of (t, L), got {value!r}") from error
        if not table or any(constant <= 0 for _, constant in table) or sorted(table, reverse=True) != list(table):
            raise ValueError("lipschitz: a table needs falling times t and positive constants")
        return Lipschitz(None, table)

    def scaled(self, point: GridPoint) -> float:
        """`sigma^2 L` at a point, at most 1: noise of variance sigma^2 makes no score steeper than 1 / sigma^2."""
        variance = (point.kappa * point.alpha) ** 2
        if self.number is not None:
            return min(1.0, variance * self.number)
        if self.table:
            times, constants = np.array(self.table[::-1]).T
            return min(1.0, variance * float(np.exp(np.interp(point.t, times, np.log(constants)))))
        return 1.0


def estimate_lipschitz(
    denoiser_for: Callable[[Tensor], Denoiser],
    schedule: NoiseSchedule,
    shape: Sequence[int],
    *,
    steps: int = 12,
    samples: int = 4,
    iterations: int = 6,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[tuple[float, float]]:
    """(t, L) along a DDIM trajectory: the largest rate of change of the score over some samples.

    Power iteration on finite differences, `iterations` of them at each of `steps` noise levels: a lower bound of the
    spectral norm at these points, close in practice. Costs `steps (2 iterations + 1)` evaluations per sample.

    Args:
        denoiser_for: indices (B,) -> the denoiser of these samples.
    """
    index = reserved_indices("lipschitz", samples, device)
    denoiser = denoiser_for(index)
    stream = NoiseStream(seed, "lipschitz")
    points = GridPoint.of(schedule, TimeGrid.make("log_snr", schedule, steps))
    y = stream.normal(index, [0], shape, torch.float32)[0].double() / points[0].alpha

    def eps(y: Tensor, place: EvaluationPoint) -> Tensor:
        return denoiser(*model_input(schedule, y, place)).double()

    def unit(v: Tensor) -> Tensor:
        return v / expand_like(v.flatten(1).norm(dim=1).clamp(min=1e-30), v)

    found: list[tuple[float, float]] = []
    with torch.inference_mode():
        for here, there in itertools.pairwise(points):
            sigma, size = here.alpha * here.kappa, math.sqrt(math.prod(shape))
            reach = 0.01 * size * sigma / here.alpha
            direction = unit(stream.normal(index, [1], shape, torch.float32)[0].double())
            change = direction
            for _ in range(iterations):
                change = (eps(y + reach * direction, here) - eps(y - reach * direction, here)) / (2 * reach)
                direction = unit(change)
            # d score / d x = -(d eps / d y) / (alpha sigma)
            found.append((here.t, change.flatten(1).norm(dim=1).max().item() / (here.alpha * sigma)))
            y = y + (there.kappa - here.kappa) * eps(y, here)
    return found
