"""Any diffusers scheduler as a solver: `solver="diffusers:UniPCMultistepScheduler"`.

The scheduler gets the betas of our schedule at the N timesteps and does its own stepping on its own grid; so it
is a baseline in the loop that all solvers share: same noise, same ledger. Stochastic schedulers draw from one
generator for each sample, keyed by (seed, index), so that batches and ranks do not matter there either.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlem.brownian import BrownianPath, NoisePath
from mlem.grids import TimeGrid
from mlem.schedule import NUM_TIMESTEPS, NoiseSchedule
from mlem.solvers.base import GridPoint, GridPoints, NoiseEstimate, Solver

__all__ = ["PREFIX", "DiffusersSolver", "SchedulerGrid"]

PREFIX = "diffusers:"
_PROBE_STEPS = 4
"""Steps of the run that shows whether a scheduler draws noise: the last step of most draws none."""


@dataclass(frozen=True)
class SchedulerGrid(TimeGrid):
    """The times of a scheduler that was asked for so many steps; some take more."""

    asked: int


class DiffusersSolver(Solver):
    """One scheduler class of diffusers. Options are fields of its config, such as `use_karras_sigmas=True`."""

    order = 1.0
    stochastic = False
    reference = "dpm_solver_pp"

    def __init__(self, class_name: str, **options: object) -> None:
        import diffusers
        from diffusers.schedulers.scheduling_utils import SchedulerMixin

        found = getattr(diffusers, class_name, None) if class_name.isidentifier() else None
        if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
            raise ValueError(
                f"diffusers has no scheduler {class_name!r}; write the class name, as in {PREFIX}DDIMScheduler"
            )
        accepted = inspect.signature(found.__init__).parameters
        if "trained_betas" not in accepted:
            raise ValueError(f"{class_name} takes no betas: only variance-preserving schedulers can be compared")
        self.name = PREFIX + class_name
        self._class: Any = found
        self._options = options
        self._accepted = accepted
        self.coupled = self.linear = not self._tosses()

    def _scheduler(self, schedule: NoiseSchedule, steps: int) -> Any:
        signal = schedule.alpha(torch.arange(NUM_TIMESTEPS + 1, dtype=torch.float64) / NUM_TIMESTEPS) ** 2
        betas: list[float] = (1 - signal[1:] / signal[:-1]).tolist()
        options: dict[str, object] = {"trained_betas": betas, "prediction_type": "epsilon"}
        options |= {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False} | self._options
        scheduler: Any = self._class(**{key: value for key, value in options.items() if key in self._accepted})
        scheduler.set_timesteps(steps)
        return scheduler

    def grid(self, schedule: NoiseSchedule, steps: int, grid: str | TimeGrid | None = None) -> SchedulerGrid:
        """The scheduler's own grid of `steps` steps. Raises ValueError for any other, and for two calls at one time."""
        if grid is not None:
            raise ValueError(f"a diffusers scheduler brings its own grid; leave grid out (got {grid!r})")
        TimeGrid.make("trailing", schedule, steps)  # refuses what no scheduler can do
        timesteps = self._scheduler(schedule, steps).timesteps.double()
        # some schedulers list a time twice, once for each of their two calls
        times = dict.fromkeys(((timesteps + 1) / NUM_TIMESTEPS).tolist())
        if len(times) != len(timesteps):
            raise ValueError(f"{self._class.__name__} calls the network twice at one time; use solver=heun instead")
        return SchedulerGrid("diffusers", (*times, 0.0), steps)

    def _tosses(self) -> bool:
        """Whether the scheduler draws noise of its own: from nothing, with no noise estimate, it makes something."""
        schedule = NoiseSchedule.linear()
        nothing, index = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)
        path = BrownianPath(schedule, 0, index, (1, 1, 1), nothing.dtype)
        points = GridPoint.of(schedule, self.grid(schedule, _PROBE_STEPS))
        return bool(self.integrate(lambda y, place: torch.zeros_like(y), nothing, points, path, index, 0).any())

    def init(self, points: GridPoints, indices: Tensor, seed: int) -> Any:
        assert isinstance(points.grid, SchedulerGrid)
        scheduler = self._scheduler(points.schedule, points.grid.asked)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        numbers: list[int] = indices.tolist()
        generators = [_generator(seed, index) for index in numbers] if takes_generator else None
        return scheduler, iter(scheduler.timesteps), generators

    def step(
        self, eps: NoiseEstimate, y: Tensor, state: Any, here: GridPoint, there: GridPoint, path: NoisePath
    ) -> tuple[Tensor, Any]:
        scheduler, timesteps, generators = state
        timestep = next(timesteps)
        # schedulers with sigmas of their own work in y, the others in x
        in_y = float(scheduler.init_noise_sigma) != 1.0
        own = y if in_y else here.alpha * y
        scheduler.scale_model_input(own, timestep)
        extra = {} if generators is None else {"generator": generators}
        own = scheduler.step(eps(y, here), timestep, own, **extra).prev_sample
        return (own if in_y else own / there.alpha), state


def _generator(seed: int, index: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/diffusers/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
