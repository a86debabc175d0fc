"""Solvers: the interface, the grid points and the loop.

The loop works in EDM coordinates `y = x / alpha`, `kappa = sigma / alpha`, in which the reverse
ODE is `dy/dkappa = eps(y, kappa)` and the reverse SDE `dy = 2 eps dkappa + dB` with B a Brownian motion in the
clock kappa^2. A solver steps from one point of a time grid to the next and knows nothing about networks.
A subclass of `Solver` in a file of this folder is found by its name.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from mlem.brownian import NoisePath
from mlem.denoiser import Denoiser, NetworkDenoiser
from mlem.grids import TimeGrid
from mlem.schedule import PURE_NOISE, NoiseSchedule, expand_like

__all__ = [
    "SOLVERS",
    "EvaluationPoint",
    "GridPoint",
    "GridPoints",
    "NoiseEstimate",
    "ScatteredPoints",
    "Solver",
    "denoiser_at",
    "model_input",
    "quadrature_weights",
]


class GridPoint(NamedTuple):
    """A point of a time grid, in plain numbers, so that a step never waits for a device."""

    t: float
    alpha: float
    sigma: float
    kappa: float

    @property
    def pure_noise(self) -> bool:
        """Whether no signal is left here: kappa then stands for infinity, and a step must take its limit."""
        return self.kappa > PURE_NOISE / 2

    @staticmethod
    def at(schedule: NoiseSchedule, t: float) -> GridPoint:
        """The point at time t."""
        alpha, sigma = schedule.scales(t)
        return GridPoint(t, alpha.item(), sigma.item(), schedule.kappa(t).item())

    @staticmethod
    def of(schedule: NoiseSchedule, grid: TimeGrid) -> GridPoints:
        """The points of `grid` under `schedule`; recent grids are cached."""
        return _points(schedule, grid)


@dataclass(frozen=True)
class GridPoints(Sequence[GridPoint]):
    """A time grid under a schedule; make it with `GridPoint.of(schedule, grid)`. A slice of it is a list of points."""

    schedule: NoiseSchedule
    grid: TimeGrid
    points: tuple[GridPoint, ...]

    @property
    def steps(self) -> int:
        """Number of steps: one less than the number of points."""
        return len(self.points) - 1

    def __len__(self) -> int:
        return len(self.points)

    @overload
    def __getitem__(self, index: int) -> GridPoint: ...

    @overload
    def __getitem__(self, index: slice) -> list[GridPoint]: ...

    def __getitem__(self, index: int | slice) -> GridPoint | list[GridPoint]:
        return list(self.points[index]) if isinstance(index, slice) else self.points[index]


@functools.lru_cache(32)
def _points(schedule: NoiseSchedule, grid: TimeGrid) -> GridPoints:
    return GridPoints(schedule, grid, tuple(GridPoint.at(schedule, t) for t in grid.times))


class ScatteredPoints(NamedTuple):
    """Points for some samples of a batch: none, one or several per sample.

    Args:
        kappa: (P,), float64.
        rows: (P,), int64, positions in the batch.
    """

    kappa: Tensor
    rows: Tensor


EvaluationPoint = GridPoint | Tensor | ScatteredPoints
"""Where to estimate the noise: a point of the grid, a kappa per sample, (B,) float64, or scattered points."""

NoiseEstimate = Callable[[Tensor, EvaluationPoint], Tensor]
"""eps(y, place): the noise estimate at y (B, ...), like y."""


def model_input(schedule: NoiseSchedule, y: Tensor, place: EvaluationPoint) -> tuple[Tensor, Tensor]:
    """A denoiser's input for a solver's state y (B, ...): x (B, ...) and t (B,), float64."""
    if isinstance(place, GridPoint):
        return (y * place.alpha).double(), y.new_full((y.shape[0],), place.t, dtype=torch.float64)
    t = schedule.time_from_kappa(place.kappa if isinstance(place, ScatteredPoints) else place)
    return (y * expand_like(schedule.alpha(t), y)).double(), t


def denoiser_at(denoiser: Denoiser, place: EvaluationPoint | None) -> Denoiser:
    """The denoiser for calls at one point: on the grid alpha and sigma are known."""
    if isinstance(place, GridPoint) and isinstance(denoiser, NetworkDenoiser):
        return denoiser.at(place.t, place.alpha, place.sigma)
    return denoiser


SOLVERS: dict[str, type[Solver]] = {}
"""Name -> solver class, filled as the files of this folder are imported."""


class Solver(ABC):
    """One step of a numerical method.

    No method changes a solver after construction, so samplers may share one. What a trajectory changes is `state`:
    whatever `init` returns and `step` passes on.
    """

    name: str
    order: float
    """Order of convergence: of the ODE's solution, or strong order for an SDE solver."""
    stochastic: bool
    """Whether `step` reads the Brownian path."""
    default_grid: str = "uniform"
    reference: str
    """The solver whose many-step run from the same noise is the limit of this one."""
    coupled: bool = True
    """Whether samples converge to those of `reference`; otherwise only their distribution does."""
    sequential: bool = True
    """Whether every call of the noise estimate is one evaluation per sample, `evaluations` in all."""
    linear: bool = True
    """Whether a step is linear in y and its noise estimates, random only in its path and evaluation points."""
    revisable: bool = True
    """Whether y may be moved between two steps, with lasting effect."""
    chunk: int | None = None
    """The most rows per network call; None: any number."""
    exact_on_a_point: bool = True
    """Whether data of a single point are reached exactly, on every grid and in any number of steps."""
    measured_grids: tuple[str, ...] = ()
    """Grids on which a calibration measures the solver's own error, so that plans for an `mse` work there."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            SOLVERS[cls.name] = cls

    def grid(self, schedule: NoiseSchedule, steps: int, grid: str | TimeGrid | None = None) -> TimeGrid:
        """The time grid called `grid`, or `grid` itself, or the solver's own choice."""
        return grid if isinstance(grid, TimeGrid) else TimeGrid.make(grid or self.default_grid, schedule, steps)

    def evaluations(self, points: GridPoints) -> int:
        """Evaluations per sample over the whole grid."""
        return points.steps

    def init(self, points: GridPoints, indices: Tensor, seed: int) -> Any:
        """The state before the first step: None for methods without memory."""
        return None

    @abstractmethod
    def step(
        self, eps: NoiseEstimate, y: Tensor, state: Any, here: GridPoint, there: GridPoint, path: NoisePath
    ) -> tuple[Tensor, Any]:
        """y at `there`, given y (B, ...) at `here`, and the new state."""

    def integrate(
        self,
        eps: NoiseEstimate,
        y: Tensor,
        points: GridPoints,
        path: NoisePath,
        indices: Tensor,
        seed: int,
        *,
        revise: Callable[[Tensor, GridPoint], Tensor] | None = None,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """The loop: y (B, ...) at points[0] -> y at points[-1].

        revise: may change y before each step. watch: gets the number of each step and y after it.
        """
        state = self.init(points, indices, seed)
        for i, (here, there) in enumerate(itertools.pairwise(points)):
            if revise is not None:
                y = revise(y, here)
            y, state = self.step(eps, y, state, here, there, path)
            if watch is not None:
                watch(i, y)
        return y


class _Still:
    """A path without noise."""

    def at(self, t: float) -> Tensor:
        return torch.zeros((), dtype=torch.float64)

    def between(self, t: float, kappa: Tensor) -> tuple[Tensor, Tensor]:
        return self.at(t), self.at(t)


def quadrature_weights(
    solver: Solver,
    schedule: NoiseSchedule,
    points: GridPoints,
    watch: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, list[GridPoint]]:
    """The weight of each noise estimate in the last y, others held fixed, (R,) float64, and the evaluation points.

    A linear solver's coefficients are read off by feeding it unit vectors; DDIM's are `kappa' - kappa`, those of
    Euler-Maruyama twice that. At most two evaluations per step. Random evaluation points are those of sample 0 with
    seed 0. watch: gets the number of each step and the weights so far, (>= R,). Raises ValueError for a solver that is
    not linear.
    """
    if not solver.linear:
        raise ValueError(f"{solver.name} is not linear in its noise estimates: no plan can be searched for it")
    size = 2 * len(points)
    asked: list[GridPoint] = []

    def unit(y: Tensor, place: EvaluationPoint) -> Tensor:
        if not isinstance(place, GridPoint):
            assert isinstance(place, Tensor)
            point = GridPoint.at(schedule, schedule.time_from_kappa(place).item())
            place = point._replace(kappa=place.item())
        asked.append(place)
        return torch.zeros_like(nothing).index_fill_(2, torch.tensor([len(asked) - 1]), 1.0)

    # one image, for schedulers of other libraries, with one pixel per estimate
    nothing, index = torch.zeros(1, 1, size, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)

    def seen(step: int, y: Tensor) -> None:
        if watch is not None:
            watch(step, y.flatten())

    return solver.integrate(unit, nothing, points, _Still(), index, 0, watch=seen).flatten()[: len(asked)], asked
