"""The one loop from noise to samples: sampling, calibration, pilots, memorising and learning all use it.

The state is `y = x / alpha` in float64: at large kappa, y and kappa eps are both large and nearly cancel. The caller
chooses the source of noise estimates and its precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from torch import Tensor

from mlem.brownian import BrownianPath, NoisePath
from mlem.denoiser import Denoiser, of_rows
from mlem.noise import NoiseStream, noise_dtype
from mlem.schedule import NoiseSchedule
from mlem.solvers import (
    EvaluationPoint,
    GridPoint,
    GridPoints,
    NoiseEstimate,
    ScatteredPoints,
    Solver,
    denoiser_at,
    model_input,
)

__all__ = ["SIGNAL_LEFT", "noise_estimate", "samples", "starting_noise", "trajectory", "warn_of_signal"]

Revise = Callable[[Tensor, GridPoint], Tensor]
"""revise(y, here): the state to continue from, given y (B, ...) before the step at `here`."""

Watch = Callable[[int, Tensor], None]
"""watch(i, y): gets the number of a step and y (B, ...) after it."""


SIGNAL_LEFT = 0.01
"""alpha^2 above which starting from N(0, I) gives a warning: the mean is off by a tenth of the data's."""


def warn_of_signal(schedule: NoiseSchedule, t: float = 1.0) -> None:
    """Warn if sampling begins at time t but x_t is still far from N(0, I)."""
    signal = schedule.alpha(t).item() ** 2
    if signal > SIGNAL_LEFT:
        what = f"the schedule ends at t = {t:g}" if t == 1 else f"the grid begins at t = {t:.3g}"
        warnings.warn(
            f"{what} with a signal of alpha^2 = {signal:.2g} (it should be at most {SIGNAL_LEFT:g}), but sampling "
            "starts from pure noise: samples will be off; use larger betas, a lower log_snr_min or a grid from t = 1",
            stacklevel=3,
        )


def starting_noise(seed: int, indices: Tensor, shape: Sequence[int]) -> Tensor:
    """x_T ~ N(0, I) of the samples with these indices (B,), int64: (B, *shape), in `noise_dtype()`."""
    return NoiseStream(seed, "start").normal(indices, [0], shape, noise_dtype())[0]


def noise_estimate(denoiser: Denoiser, schedule: NoiseSchedule) -> NoiseEstimate:
    """The denoiser as a solver calls it, in float64."""

    def eps(y: Tensor, place: EvaluationPoint) -> Tensor:
        own = of_rows(denoiser, place.rows) if isinstance(place, ScatteredPoints) else denoiser_at(denoiser, place)
        return own(*model_input(schedule, y, place)).double()

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
        estimate: the noise estimate, given y (B, ...) and an evaluation point.
        solver, points: the method and the times it visits under their schedule.
        x_T: (B, ...), starting noise; see `starting_noise`.
        indices: (B,), int64, sample indices; with the seed they fix all randomness of the solver.
        path: the Brownian path; by default that of these samples, in the dtype of x_T.
        revise: may change the state before each step, even its number of rows. watch: sees it after each step.
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
