"""Calibration: the cost of each level, the differences between levels, and their effect on a sample.

Along trajectories of the largest level (DDIM for the ODE, DDPM for the SDE) every level is evaluated at a few times.
The correction `g^k = f^k - f^(k-1)` is added to the state there, and a smaller level runs on to the end: the change
`u_k(t)` of the sample, per unit of `-ln kappa`, is the weight of that correction. To first order the error of a plan is
linear in these vectors, so their inner products predict the mean squared error of every plan without new evaluations
(`mlem.multilevel.predict`). `mlem.multilevel.pilot` measures what that neglects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mlem.brownian import BrownianPath
from mlem.conditions import ConditionSource
from mlem.denoiser import Denoiser, of_rows
from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.multilevel.calibration import Calibration, LinearResponse
from mlem.multilevel.timing import time_levels, time_shallow, timed_on
from mlem.networks import evaluating
from mlem.noise import reserved_indices
from mlem.schedule import NoiseSchedule
from mlem.solvers import EvaluationPoint, GridPoint, GridPoints, Solver, make_solver
from mlem.trajectory import noise_estimate, starting_noise, trajectory

__all__ = ["calibrate", "measure"]


def calibrate(
    family: Family,
    *,
    images: int = 16,
    times: int = 24,
    seed: int = 0,
    batch_sizes: Sequence[int] = (64,),
    device: str | torch.device = "cpu",
    conditions: ConditionSource | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """Measure a family.

    Args:
        images: number of trajectories, with reserved indices, so that no sample shares their noise.
        times: T, the noise levels at which levels are compared.
        batch_sizes: at which levels are timed.
        device: where the family's networks are moved, and stay.
        conditions: of the trajectories; by default classes take turns.
        progress: called with a description of each measurement.

    Raises: ValueError for a family of one level, and for fewer than 2 images or 3 times.
    """
    if images < 2:
        raise ValueError(f"images of a calibration must be >= 2, got {images}")
    if times < 3:
        raise ValueError(f"times of a calibration must be >= 3, got {times}")
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch sizes of a calibration must be one or more numbers >= 1, got {list(batch_sizes)}")
    if len(family.levels) < 2:
        raise ValueError("calibration compares levels, but this family has one; train another: model.levels=[xs,s]")
    networks = torch.nn.ModuleList(level.network for level in family.levels).to(device)
    index = reserved_indices("calibration", images, device)
    seconds: dict[int, tuple[float, ...]] = {}
    outside: dict[int, dict[str, float]] = {}
    shallow: dict[int, dict[int, float]] = {}
    with torch.inference_mode(), evaluating(networks):
        for size in batch_sizes:
            progress(f"time of each level, batches of {size}")
            seconds[size], outside[size] = time_levels(family, size, index.device, conditions)
            shallow[size] = time_shallow(family, size, index.device, conditions)
        denoisers = family.denoisers_for(index, conditions)
        # perturbations are propagated by the largest level ten times cheaper than the top, or the cheapest
        cheap = [level.name for level in family.levels if 10 * level.flops <= family.level().flops]
        carrier = denoisers[family.names.index(cheap[-1] if cheap else family.names[0])]
        measured = measure(
            denoisers, family.schedule, family.shape, index, carrier=carrier, times=times, seed=seed, progress=progress
        )
    about = {"images": images, "seed": seed, "device": str(device), "machine": timed_on(index.device)}
    about |= {"weights": family.weights_hash, "schedule": family.schedule.fingerprint}
    flops = tuple(float(level.flops) for level in family.levels)
    return Calibration(tuple(family.names), flops, seconds, *measured, about, outside=outside, shallow=shallow)


def measure(
    denoisers: Sequence[Denoiser],
    schedule: NoiseSchedule,
    shape: Sequence[int],
    index: Tensor,
    *,
    carrier: Denoiser | None = None,
    times: int = 24,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, LinearResponse]]:
    """Differences between levels, and their effect on samples.

    Args:
        index: (B,), of the trajectories.
        carrier: runs perturbed trajectories to the end; by default the largest level.

    Returns: log_snr, differences, image_differences and responses, as in `Calibration`.
    """
    carrier = denoisers[-1] if carrier is None else carrier
    responses: dict[str, LinearResponse] = {}
    differences: list[Tensor] = []
    by_image: list[Tensor] = []
    # twice as many steps as times
    grid = TimeGrid.make("log_snr", schedule, 2 * times)
    points = GridPoint.of(schedule, grid)
    for kind, solver in (("ode", "ddim"), ("sde", "ddpm")):
        progress(f"effect of corrections on a sample, {kind}")
        outputs, changes = _perturbed(denoisers, carrier, points, index, shape, make_solver(solver), seed)
        differences.append((outputs[:, :, None] - outputs[:, None]).square().flatten(3).mean(3))
        by_image.append(outputs.diff(dim=1).square().flatten(3).mean((0, 3)))
        responses[kind] = _response(outputs, changes, grid, schedule)
    log_snr = schedule.log_snr(torch.tensor(grid.times[:-1:2], dtype=torch.float64))
    # the two trajectories of an index share their noise: one image, not two
    return log_snr, torch.stack(differences).mean(0).cpu(), torch.stack(by_image).mean(0).cpu(), responses


class _Repeated:
    """A Brownian path for `copies` copies of its samples, one after another."""

    def __init__(self, path: BrownianPath) -> None:
        self._path, self.copies = path, 1

    def at(self, t: float) -> Tensor:
        value = self._path.at(t)
        return value.repeat(self.copies, *[1] * (value.dim() - 1))

    def between(self, t: float, kappa: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("solvers of a calibration read the path only at the ends of steps")


class _Probes:
    """The trajectory of the largest level, B rows, followed by perturbed copies that the carrier runs to the end.

    At every other point of the grid a copy of the state joins the batch, and one more per correction, with it added.

    outputs: of the levels at each of these points, (K, B, ...). scales: from a change of the sample to one per unit of
    `-ln kappa`.
    """

    def __init__(
        self, denoisers: Sequence[Denoiser], carrier: Denoiser, points: GridPoints, x_T: Tensor, path: _Repeated
    ) -> None:
        self._levels = [noise_estimate(denoiser, points.schedule) for denoiser in denoisers]
        self._carrier, self._copied = carrier, noise_estimate(carrier, points.schedule)
        self._points, self._path, self._rows, self._step = points, path, len(x_T), 0
        self.outputs: list[Tensor] = []
        self.scales: list[float] = []

    def estimate(self, y: Tensor, place: EvaluationPoint) -> Tensor:
        """eps at y (B + copies, ...)."""
        return torch.cat([self._levels[-1](y[: self._rows], place), self._copied(y[self._rows :], place)])

    def revise(self, y: Tensor, here: GridPoint) -> Tensor:
        """y with further copies, if they start at this point."""
        i, self._step = self._step, self._step + 1
        if i % 2 == 0:
            own = y[: self._rows]
            self.outputs.append(torch.stack([level(own, here) for level in self._levels]))
            # the effect of a correction from this time to the next
            width = here.kappa - self._points[min(i + 2, self._points.steps)].kappa
            self.scales.append(-here.kappa / width)
            y = torch.cat([y, own, *(own - width * g for g in self.outputs[-1].diff(dim=0))])
            self._path.copies = len(y) // self._rows
            rows = torch.arange(len(y) - self._rows, device=y.device) % self._rows
            self._copied = noise_estimate(of_rows(self._carrier, rows), self._points.schedule)
        return y


def _perturbed(
    denoisers: Sequence[Denoiser],
    carrier: Denoiser,
    points: GridPoints,
    index: Tensor,
    shape: Sequence[int],
    solver: Solver,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The levels along the trajectory, (T, K, B, ...), and the changes u of the sample, (T, K-1, B, ...)."""
    x_T = starting_noise(seed, index, shape)
    path = _Repeated(BrownianPath(points.schedule, seed, index, shape, x_T.dtype))
    probes = _Probes(denoisers, carrier, points, x_T, path)
    x = trajectory(probes.estimate, solver, points, x_T, index, seed, path=path, revise=probes.revise)
    outputs = torch.stack(probes.outputs)
    ends = x[len(index) :].view(len(outputs), len(denoisers), *x_T.shape)
    scale = torch.tensor(probes.scales, dtype=torch.float64, device=x.device).view(-1, *[1] * (x.dim() + 1))
    return outputs, (ends[:, 1:] - ends[:, :1]) * scale


def _response(outputs: Tensor, changes: Tensor, grid: TimeGrid, schedule: NoiseSchedule) -> LinearResponse:
    """The inner products: outputs (T, K, B, ...), changes (T, K-1, B, ...)."""
    alpha = schedule.alpha(torch.tensor(grid.times[:-1:2], dtype=torch.float64, device=outputs.device))
    corrections = outputs.diff(dim=1).flatten(2) / alpha[:, None, None]
    u = changes.flatten(2)
    # a level equal to the one below: no correction, gain 1
    least = torch.finfo(u.dtype).tiny
    gain = (u.square().mean(2).clamp(min=least) / corrections.square().mean(2).clamp(min=least)).sqrt()
    q = (u / gain[..., None]).transpose(0, 1)  # (C, T, B pixels)
    inner = torch.einsum("ktn,lsn->ktls", q, q) / q.shape[2]
    # structure function: a smooth path gives 4, a Brownian one 2
    one, two = q.diff(dim=1).square().mean((1, 2)), (q[:, 2:] - q[:, :-2]).square().mean((1, 2))
    roughness = (4 * one / two.clamp(min=least) - 1).clamp(0, 1)
    # in the memory order of files, so that sums round the same way
    return LinearResponse(inner.contiguous().cpu(), gain.T.contiguous().cpu(), roughness.cpu())
