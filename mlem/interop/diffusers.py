"""Any diffusers scheduler as a solver: `solver="diffusers:UniPCMultistepScheduler"`.

The scheduler gets the betas of our schedule at the N timesteps and steps on its own grid; so it is a baseline in the
loop that all solvers share: same noise, same ledger. Stochastic schedulers draw from one generator per sample, keyed by
(seed, index), so that batches and ranks do not matter there either. The network is evaluated at the noise level that a
scheduler steps from, even if its own pipelines round that to a timestep (as with Karras sigmas).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mlem.arguments import hint
from mlem.brownian import BrownianPath, NoisePath
from mlem.grids import TimeGrid
from mlem.schedule import NoiseSchedule
from mlem.solvers.base import GridPoint, GridPoints, NoiseEstimate, Solver

__all__ = ["PREFIX", "DiffusersSolver", "SchedulerGrid"]

PREFIX = "diffusers:"
"""Prefix of scheduler names, as in `solver="diffusers:UniPCMultistepScheduler"`."""
_PROBE_STEPS = 4
"""Steps of the run that tests whether a scheduler draws noise: the last step of most draws none."""
_MOST_LEAST = 16
"""Limit of the search for the fewest steps that a scheduler can make."""
_LEAST_SIGNAL = 2.0**-24
"""alpha^2 that replaces 0 at the start, as in diffusers itself: schedulers compute in float32."""
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
_RANGE = ("snr_shift_scale", "sigma_min", "sigma_max")
_FLOWS = ("use_flow_sigmas", "flow_shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal")
_FIXED: dict[str, tuple[str, ...]] = {
    "the schedule of the model": _BETAS + _RANGE + _FLOWS,
    "the noise estimate that mlem passes": ("prediction_type",),
    "the timesteps of the model": ("timestep_type",),
}
"""Options that mlem sets itself: what they would contradict -> their names."""
_DISTILLED = "it is made for networks distilled for it"
_REFUSED = {
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
    "DDIMInverseScheduler": "it goes from images to noise",
    "DPMSolverMultistepInverseScheduler": "it goes from images to noise",
    "KDPM2AncestralDiscreteScheduler": "the second call of a step is at the next noise level, so each occurs twice",
    "IPNDMScheduler": "it uses its own noise schedule, whatever betas it is given",
}
"""Schedulers that take betas but cannot sample a model from noise -> the reason."""


@dataclass(frozen=True)
class SchedulerGrid(TimeGrid):
    """The times of a scheduler set to this many steps; some schedulers take more."""

    asked: int


class _StepsError(ValueError):
    """A scheduler cannot make the requested number of steps."""


class DiffusersSolver(Solver):
    """One scheduler class of diffusers. Options are fields of its config, such as `use_karras_sigmas=True`."""

    order = 1.0
    stochastic = False
    reference = "dpm_solver_pp"
    revisable = False  # some keep their last sample

    def __init__(self, class_name: str, **options: object) -> None:
        self._class: Any = _scheduler_class(class_name)
        self._accepted = inspect.signature(self._class.__init__).parameters
        self.name = PREFIX + class_name
        _check_options(class_name, options, self._accepted)
        self._options = options
        clips = bool(options.get("clip_sample") or options.get("thresholding"))
        self.coupled = not self._tosses()
        self.linear = self.coupled and not clips

    def _scheduler(self, schedule: NoiseSchedule, steps: int) -> Any:
        n = schedule.num_timesteps
        signal = schedule.alpha(torch.arange(n + 1, dtype=torch.float64) / n).square().clamp(min=_LEAST_SIGNAL)
        betas: list[float] = (1 - signal[1:] / signal[:-1]).tolist()
        options: dict[str, object] = {
            "num_train_timesteps": n,
            "trained_betas": betas,
            "prediction_type": "epsilon",
            "snr_shift_scale": 1.0,
        }
        options |= {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False} | self._options
        try:
            scheduler: Any = self._class(**{key: value for key, value in options.items() if key in self._accepted})
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(f"{self._class.__name__}: {' '.join(str(error).split())}") from error
        try:
            scheduler.set_timesteps(steps)
        except (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise _StepsError(f"{self._class.__name__} cannot make {steps} steps") from error
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # else it looks up its first timestep, taking the second of two equal ones
        return scheduler

    def grid(self, schedule: NoiseSchedule, steps: int, grid: str | TimeGrid | None = None) -> SchedulerGrid:
        """The scheduler's own grid of `steps` steps.

        Raises: ValueError for any other grid, for steps that the scheduler cannot make, and if it evaluates the network
            twice at one noise level.
        """
        if grid is not None:
            raise ValueError(f"a diffusers scheduler has its own grid; leave out grid (got {grid!r})")
        TimeGrid.make("trailing", schedule, steps)  # rejects what no scheduler can do
        name = self._class.__name__
        try:
            times = _times(self._scheduler(schedule, steps), schedule)
        except _StepsError as error:
            least = f"it needs at least {found}" if (found := self._least(schedule, steps)) else "try another number"
            raise ValueError(f"{error}; {least}") from error
        if len(set(times)) != len(times):
            twice = next(time for time in times if times.count(time) > 1)
            raise ValueError(
                f"{name} evaluates the network twice at one noise level (t = {twice:.4g}), but grid times must differ; "
                "use solver=heun or another scheduler"
            )
        return SchedulerGrid("diffusers", (*times, 0.0), steps)

    def _least(self, schedule: NoiseSchedule, steps: int) -> int | None:
        """The smallest number of steps above `steps` that the scheduler can make, up to a limit."""
        for more in range(steps + 1, _MOST_LEAST + 1):
            try:
                self._scheduler(schedule, more)
            except _StepsError:
                continue
            return more
        return None

    def _tosses(self) -> bool:
        """Whether the scheduler draws its own noise: from zero input and zero estimates it then returns nonzero."""
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
        # schedulers with their own sigmas work in y, the others in x
        in_y = float(scheduler.init_noise_sigma) != 1.0
        own = y if in_y else here.alpha * y
        scheduler.scale_model_input(own, timestep)
        extra = {} if generators is None else {"generator": generators}
        own = scheduler.step(eps(y, here), timestep, own, **extra).prev_sample
        return (own if in_y else own / there.alpha), state


def _scheduler_class(class_name: str) -> Any:
    """The scheduler of this name. Raises ValueError if there is none, or it cannot sample a model from noise."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    found: Any = getattr(diffusers, class_name, None) if class_name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ValueError(f"diffusers has no scheduler {class_name!r}; use the class name, as in {PREFIX}DDIMScheduler")
    if class_name in _REFUSED:
        raise ValueError(f"{class_name} cannot be compared: {_REFUSED[class_name]}; use another scheduler")
    if "trained_betas" not in inspect.signature(found.__init__).parameters:
        raise ValueError(f"{class_name} takes no betas: only variance-preserving schedulers can be compared")
    own, made = {"self", "model_output", "timestep", "sample"}, cast(Any, found)
    step = inspect.signature(made.step).parameters.values()
    if more := [one.name for one in step if one.default is one.empty and one.name not in own]:
        raise ValueError(f"{class_name} cannot be compared: its step needs {', '.join(more)}")
    return found


def _check_options(class_name: str, options: dict[str, object], accepted: Iterable[str]) -> None:
    """Raise ValueError for unknown options of the scheduler, and for those that mlem sets itself."""
    fixed = {name: what for what, names in _FIXED.items() for name in names}
    known = [name for name in accepted if name not in {"self", "kwargs", *fixed}]
    listed = f"its options are {', '.join(known)}"
    for name, value in options.items():
        if name in fixed:
            raise ValueError(f"{name} of {class_name} would contradict {fixed[name]}; leave it out: {listed}")
        if name not in known:
            raise ValueError(f"{class_name} has no option {name!r}; {listed}{hint(name, known)}")
        if name == "variance_type" and str(value).startswith("learned"):
            raise ValueError(f"variance_type of {class_name} is {value!r}, but no variance is estimated; leave it out")


def _times(scheduler: Any, schedule: NoiseSchedule) -> list[float]:
    """The times at which a scheduler with timesteps set evaluates the network, in (0, 1]."""
    n = schedule.num_timesteps
    most = schedule.time_from_alpha(_LEAST_SIGNAL**0.5).item()
    times = ((scheduler.timesteps.double() + 1) / n).clamp(max=most)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) <= len(times):
        return times.tolist()
    if hasattr(scheduler, "sigmas_interpol"):  # two calls per step, the second one in between
        second = torch.arange(len(sigmas)) % 2 == 1
        sigmas = torch.where(second, scheduler.sigmas_interpol, sigmas)
    # the levels it steps from; its timesteps may be rounded, and if not, are more precise than the float32 sigmas
    exact = schedule.time_from_kappa(sigmas[: len(times)].double())
    return torch.where((exact - times).abs() < 0.02 / n, times, exact).tolist()


def _generator(seed: int, index: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/diffusers/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
