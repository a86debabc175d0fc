"""A pipeline's scheduler as plans see it: its evaluation points, and the weight of each output in the result."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlem.brownian import NoisePath
from mlem.grids import TimeGrid
from mlem.interop.diffusers import PREFIX
from mlem.level import Level
from mlem.multilevel.evaluators import Moment
from mlem.predictions import NoiseLevel, Prediction
from mlem.schedule import NoiseSchedule
from mlem.scheduler_configs import prediction_of
from mlem.solvers import GridPoint, NoiseEstimate, Solver, quadrature_weights
from mlem.solvers.base import GridPoints

__all__ = ["LinearPart", "Stepping", "Steppings"]

_SAME_NOISE = 0.01
"""Tolerance on log-SNR for two noise levels to be the same."""
_MOST = 16
"""Number of cached calls with different steps."""

_REVISABLE = {
    **dict.fromkeys(("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"), True),
    **dict.fromkeys(("EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"), True),
    "FlowMatchEulerDiscreteScheduler": True,
    "UniPCMultistepScheduler": False,  # its corrector begins at the sample before
}
"""Schedulers with one evaluation per step -> whether moving the sample has lasting effect."""
_STOCHASTIC = ("DDPMScheduler", "EulerAncestralDiscreteScheduler")


class Stepping:
    """The steps of one pipeline call, from its scheduler after `set_timesteps`.

    Args:
        scheduler: of the pipeline.
        first: the number of its first timestep; above 0 for image-to-image.
        time_scale: the network's time per unit of the scheduler's timesteps.

    Attributes:
        points: the noise levels visited, including the last.
        moments: of the evaluations, in the units of the network's output.
        quadrature: weight of each noise estimate in the last y.

    Raises:
        ValueError: plans cannot be made for this scheduler.
    """

    def __init__(self, scheduler: Any, first: int = 0, time_scale: float = 1.0) -> None:
        self.time_scale = time_scale
        name, self.config = type(scheduler).__name__, _config(scheduler)
        if name not in _REVISABLE:
            raise ValueError(f"a pipeline with {name} cannot be accelerated; use {', '.join(_REVISABLE)}")
        self.schedule = NoiseSchedule.from_diffusers(self.config | {"use_dynamic_shifting": False})
        self.prediction: Prediction = prediction_of(self.config)
        self.flows = self.prediction.name == "flow"
        # schedulers with their own sigmas work in y, the others in x
        self._in_y = not self.flows and float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0
        times = self._times(scheduler)[first:]
        self.points = GridPoint.of(self.schedule, TimeGrid("diffusers", tuple(times)))
        self.moments = [self._moment(point) for point in self.points[:-1]]
        self.solver = LinearPart(scheduler, self, first)
        self.quadrature: list[float] = quadrature_weights(self.solver, self.schedule, self.points)[0].tolist()

    def refuse_other(self, level: Level) -> None:
        """Raise ValueError unless a level's inputs and outputs mean the same as those of the pipeline's network."""
        times = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
        same = level.prediction.name == self.prediction.name
        if same and not self.flows:
            difference = (level.schedule.log_snr(times) - self.schedule.log_snr(times)).abs().max()
            same = level.schedule.num_timesteps == self.schedule.num_timesteps and difference < _SAME_NOISE
        if not same:
            raise ValueError(
                f"level {level.name} predicts {level.prediction} under {level.schedule}, but this pipeline's network "
                f"{self.prediction} under {self.schedule}; use one trained the same way"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """Its identity, apart from the steps; plain data."""
        return {"schedule": self.schedule.fingerprint, "prediction": self.prediction.to_config()}

    def scale(self, point: GridPoint) -> float:
        """The scheduler's sample at a point, per unit of y."""
        if self.flows:
            return 1 / (1 + point.kappa)
        return 1.0 if self._in_y else point.alpha

    def _moment(self, point: GridPoint) -> Moment:
        """The moment of a point, in the units of the network's outputs."""
        level = NoiseLevel(torch.zeros(1, dtype=torch.float64), point.alpha, point.sigma)
        nothing, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        eps = self.prediction.eps(one, nothing, level) - self.prediction.eps(nothing, nothing, level)
        # x_0 = alpha x - sigma v, eps = sigma x + alpha v, and x = alpha y
        slope = self.prediction.target(one * point.alpha**2, one * point.alpha * point.sigma, level)
        return Moment(point.alpha, point.kappa, point.alpha / eps.item(), slope.item())

    def _times(self, scheduler: Any) -> list[float]:
        """The times of the points, 1 to 0."""
        n, asked = self.schedule.num_timesteps, scheduler.timesteps.double().cpu()
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is None or len(sigmas) <= len(asked):
            times = (asked + 1) / n
            final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
            return [*times.tolist(), self.schedule.time_from_alpha(final**0.5).item() if final < 1 else 0.0]
        sigmas = sigmas.double().cpu()
        kappas = sigmas / (1 - sigmas).clamp(min=1e-12) if self.flows else sigmas
        most = self.schedule.kappa(1.0).item()
        return [1.0 if kappa >= most else self.schedule.time_from_kappa(kappa).item() for kappa in kappas.tolist()]


class Steppings:
    """A cache of `Stepping`, for pipeline calls with the same timesteps.

    Args:
        time_scale: see `Stepping`.
    """

    def __init__(self, time_scale: float) -> None:
        self._scale, self._kept = time_scale, OrderedDict[Any, tuple[Any, Stepping]]()

    def of(self, scheduler: Any, asked: float) -> Stepping:
        """The steps of the scheduler, given the first time of the network. Raises ValueError like `Stepping`."""
        times: list[float] = scheduler.timesteps.tolist()
        first = self._number(times, asked)
        key = (id(scheduler.config), first, *times)
        # the config is kept alive, so that its id cannot be reused
        config, stepping = self._kept.pop(key, None) or (scheduler.config, Stepping(scheduler, first, self._scale))
        self._kept[key] = config, stepping
        if len(self._kept) > _MOST:
            self._kept.popitem(last=False)
        return stepping

    def _number(self, times: Sequence[float], asked: float) -> int:
        distances = [abs(time * self._scale - asked) for time in times]
        number = distances.index(min(distances))
        if distances[number] > 1e-2 * max(1.0, abs(asked)):
            raise ValueError(
                f"the network is called at time {asked:g}, which is none of the scheduler's timesteps; this pipeline "
                "cannot be accelerated"
            )
        return number


class LinearPart(Solver):
    """The steps of a scheduler without noise and clipping, for which plans are searched."""

    order = 1.0
    reference = "dpm_solver_pp"

    def __init__(self, scheduler: Any, stepping: Stepping, first: int) -> None:
        self.name = PREFIX + type(scheduler).__name__
        config = stepping.config
        self.revisable = _REVISABLE[type(scheduler).__name__]
        self.stochastic = type(scheduler).__name__ in _STOCHASTIC or str(config.get("algorithm_type")).startswith("sde")
        self.stochastic |= bool(config.get("stochastic_sampling"))
        if self.stochastic:
            self.reference = "ddpm"
        self._fresh, self._stepping, self._first = copy.deepcopy(scheduler), stepping, first
        vars(self._fresh).pop("step", None)  # the wrapper of the original's step
        for option in ("clip_sample", "thresholding"):
            if option in config:
                self._fresh.register_to_config(**{option: False})

    def init(self, points: GridPoints, indices: Tensor, seed: int) -> Any:
        """Two schedulers that draw the same noise; one of them gets nothing else."""
        return [copy.deepcopy(self._fresh) for _ in range(2)], iter(range(self._first, self._first + points.steps))

    def step(
        self, eps: NoiseEstimate, y: Tensor, state: Any, here: GridPoint, there: GridPoint, path: NoisePath
    ) -> tuple[Tensor, Any]:
        schedulers, numbers = state
        number, own = next(numbers), y * self._stepping.scale(here)
        x, level = here.alpha * y, NoiseLevel(torch.zeros(len(y), dtype=torch.float64), here.alpha, here.sigma)
        noise = eps(y, here)
        output = self._stepping.prediction.target((x - here.sigma * noise) / here.alpha, noise, level)
        found = [
            self._stepped(scheduler, number, *given)
            for scheduler, given in zip(
                schedulers, ((output, own), (torch.zeros_like(output), torch.zeros_like(own))), strict=True
            )
        ]
        return (found[0] - found[1]) / self._stepping.scale(there), state

    @staticmethod
    def _stepped(scheduler: Any, number: int, output: Tensor, own: Tensor) -> Tensor:
        timestep = scheduler.timesteps[number]
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(own, timestep)
        takes = inspect.signature(scheduler.step).parameters
        extra = {"generator": torch.Generator().manual_seed(number)} if "generator" in takes else {}
        return scheduler.step(output, timestep, own, **extra).prev_sample.double()


def _config(scheduler: Any) -> dict[str, Any]:
    return dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
