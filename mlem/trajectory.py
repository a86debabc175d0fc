"""The one loop from noise to samples: sampling, calibration, pilots, memorising and learning all run through it.

The state is `y = x / alpha` in float64: at large kappa, y and kappa eps are both large and nearly cancel. What is asked
for noise estimates, and in which precision, is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from mlem.brownian import BrownianPath, NoisePath
from mlem.denoiser import Denoiser
from mlem.noise import NoiseStream, noise_dtype
from mlem.schedule import NoiseSchedule
from mlem.solvers import EvaluationPoint, GridPoint, GridPoints, NoiseEstimate, Solver, model_input

__all__ = ["noise_estimate", "samples", "starting_noise", "trajectory"]

Revise = Callable[[Tensor, GridPoint], Tensor]
"""revise(y, here): the state to go on from, given y (B, ...) before the step at `here`."""

Watch = Callable[[int, Tensor], None]
"""watch(i, y): sees the number of a step and y (B, ...) after it."""


def starting_noise(seed: int, indices: Tensor, shape: Sequence[int]) -> Tensor:
    """x_T ~ N(0, I) of the samples with these indices (B,), int64: (B, *shape), in `noise_dtype()`."""
    return NoiseStream(seed, "start").normal(indices, [0], shape, noise_dtype())[0]


def noise_estimate(denoiser: Denoiser, schedule: NoiseSchedule) -> NoiseEstimate:
    """The denoiser as a solver calls it, in float64."""

    def eps(y: Tensor, place: EvaluationPoint) -> Tensor:
        return denoiser(*model_input(schedule, y, place)).double()

    return eps


def trajectory(
    estimate: NoiseEstimate,
    solver: Solver,
    points: GridPoints,
    x_T: Tensor,
    indices: Tensor,
    seed: int,
    *,
    path: NoisePath | None = None,
    revise: Revise | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """x at the last point, from x_T at the first: (B, ...), float64, in the memory format of x_T.

    Args:
        estimate: the noise estimate, given y (B, ...) and where it is wanted.
        solver, points: the method, and the times it visits under their schedule.
        x_T: (B, ...), starting noise; see `starting_noise`.
        indices: (B,), int64, the samples; with the seed they fix all chance of the solver.
        path: the Brownian path; by default that of these samples, in the dtype of x_T.
        revise: may change the state before each step, also the number of its rows. watch: sees it after each step.
    """
    if path is None:
        times = [point.t for point in points]
        path = BrownianPath(points.schedule, seed, indices, x_T.shape[1:], x_T.dtype, times)
    y = x_T.double() / points[0].alpha
    y = solver.integrate(estimate, y, points, path, indices, seed, revise=revise, watch=watch)
    return y * points[-1].alpha


def samples(
    denoiser: Denoiser,
    solver: Solver,
    points: GridPoints,
    shape: Sequence[int],
    indices: Tensor,
    seed: int,
    *,
    revise: Revise | None = None,
) -> Tensor:
    """The samples of a denoiser with these indices (B,): (B, *shape), float64. No ledger, no checks, no autocast."""
    x_T = starting_noise(seed, indices, shape)
    return trajectory(noise_estimate(denoiser, points.schedule), solver, points, x_T, indices, seed, revise=revise)
