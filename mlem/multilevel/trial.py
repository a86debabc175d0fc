"""Trial runs: samples for calibration and for choosing plans, from indices that no user draws; no meters, no ledger."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlem.brownian import BrownianPath
from mlem.denoiser import Denoiser
from mlem.grids import TimeGrid
from mlem.multilevel.denoiser import MultilevelDenoiser
from mlem.noise import NoiseStream
from mlem.schedule import NoiseSchedule
from mlem.solvers import EvaluationPoint, GridPoint, NoiseEstimate, Solver, model_input, quadrature_weights

CALIBRATION, PILOT, MEMORY = 10**9, 11 * 10**8, 12 * 10**8
"""Where the sample indices of each use begin."""


def trial_indices(first: int, count: int, device: str | torch.device = "cpu") -> Tensor:
    """(count,) int64 sample indices."""
    return torch.arange(first, first + count, device=device)


def check_reference_steps(steps: int) -> int:
    """`steps` of a reference themselves. Raises ValueError unless they are a whole number >= 1."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"reference_steps must be a whole number >= 1, got {steps!r}")
    return steps


def estimate(denoiser: Denoiser, schedule: NoiseSchedule) -> NoiseEstimate:
    """The denoiser as a solver calls it, in float64."""

    def eps(y: Tensor, place: EvaluationPoint) -> Tensor:
        return denoiser(*model_input(schedule, y, place)).double()

    return eps


def trial(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    shape: Sequence[int],
    solver: Solver,
    grid: TimeGrid,
    index: Tensor,
    seed: int,
) -> Tensor:
    """Samples with these indices: (B, *shape) float64. A MultilevelDenoiser begins anew and may revise."""
    points = GridPoint.of(schedule, grid)
    path = BrownianPath(schedule, seed, index, shape, torch.float32)
    y = start(schedule, shape, index, seed)
    revise = None
    if isinstance(denoiser, MultilevelDenoiser):
        denoiser.start(index, quadrature_weights(solver, schedule, points)[0].tolist())
        revise = denoiser.revise
    return (
        solver.integrate(estimate(denoiser, schedule), y, points, path, index, seed, revise=revise) * points[-1].alpha
    )


def start(schedule: NoiseSchedule, shape: Sequence[int], index: Tensor, seed: int) -> Tensor:
    """The starting noise in EDM coordinates, at t = 1."""
    noise = NoiseStream(seed, "start").normal(index, [0], shape, torch.float32)[0].double()
    return noise / schedule.alpha(1.0).item()
