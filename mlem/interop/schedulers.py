"""mlem's solvers as diffusers schedulers.

pipe.scheduler = RandomizedMidpointScheduler.from_config(pipe.scheduler.config)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from torch import Tensor

from mlem.grids import TimeGrid
from mlem.predictions import Flow, NoiseLevel, Prediction
from mlem.schedule import NoiseSchedule, expand_like
from mlem.scheduler_configs import prediction_of
from mlem.solvers import GridPoint
from mlem.solvers.randomized_midpoint import draw_midpoints

__all__ = ["RandomizedMidpointScheduler"]


class RandomizedMidpointScheduler(SchedulerMixin, ConfigMixin):
    """Randomized midpoints (Gupta, Cai and Chen, arXiv:2406.00924), Algorithm 1 in kappa = sigma / alpha.

    A step from kappa to kappa' evaluates the network twice: at kappa, and at a midpoint uniform between kappa and
    kappa'; the sample then moves by the whole step along the second output. Averaged over midpoints, that is the
    integral of the probability flow. Midpoints are drawn when timesteps are set, one per step, shared by all samples
    of a call; they fall between training timesteps, so networks get fractional timesteps.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the noise
            schedule, as in other schedulers.
        prediction_type: "epsilon", "v_prediction" or "sample"; for flows "flow_prediction".
        shift: of a rectified flow, as in FlowMatchEulerDiscreteScheduler; None: not a flow.
        use_flow_sigmas, flow_shift: the same, as in DPMSolverMultistepScheduler.
        use_dynamic_shifting: must be False.
        grid: of the steps, a key of `mlem.grids.GRIDS`.
        seed: of the midpoints: the same seed gives the same midpoints in every call.

    Attributes:
        timesteps: the network's inputs, two per step; one for a step from pure noise.
        sigmas: kappa at each, for flows kappa / (1 + kappa); then the last.
        prediction: what the network predicts. flows: whether it was trained on a rectified flow.

    Raises:
        ValueError: a config that depends on the image size, or lacks a noise schedule.
    """

    _compatibles: ClassVar[list[str]] = [one.name for one in KarrasDiffusionSchedulers]
    order = 2
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        shift: float | None = None,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        grid: str = "log_snr",
        seed: int = 0,
    ) -> None:
        kind = {"_class_name": "FlowMatch" if shift is not None else "", "num_train_timesteps": num_train_timesteps}
        said = {"prediction_type": prediction_type, "use_flow_sigmas": use_flow_sigmas}
        self.prediction: Prediction = prediction_of(kind | said)
        self.flows = isinstance(self.prediction, Flow)
        if self.flows:
            if use_dynamic_shifting:
                raise ValueError("use_dynamic_shifting depends on the image size; set it to False and pass shift=")
            self._schedule = NoiseSchedule.flow(flow_shift if shift is None else shift)
        else:
            names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
            config: dict[str, Any] = {name: self.config[name] for name in (*names, "trained_betas")}
            self._schedule = NoiseSchedule.from_diffusers(config | {"rescale_betas_zero_snr": rescale_betas_zero_snr})
        self.num_inference_steps: int | None = None
        self.timesteps, self.sigmas = torch.zeros(0), torch.zeros(0)
        self._places: list[GridPoint] = []
        self._midpoint: list[bool] = []
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._before: Tensor | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler with the noise schedule of another one's config, including its defaults.

        Raises:
            ValueError: that class uses neither betas nor a rectified flow.
        """
        given = {name: value for name, value in dict(config).items() if name != "_use_default_values"}
        for name in ("sigma_data", "shift_terminal"):  # of EDM, and of flows with another end of the noise
            if given.get(name):
                raise ValueError(f"{cls.__name__} has betas or a rectified flow, but the config's {name} fits neither")
        return super().from_config(given, return_unused_kwargs, **kwargs)

    @property
    def begin_index(self) -> int | None:
        """The number of the first timestep used, if a pipeline set it."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The number of the next timestep."""
        return self._step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin with this timestep, as image-to-image pipelines do."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Choose the noise levels of a call, and draw its midpoints.

        Args:
            num_inference_steps: steps, of two evaluations each.
            device: of `timesteps`.
            generator: draws the midpoints instead of `seed`.
        """
        schedule = self._schedule
        points = GridPoint.of(schedule, TimeGrid.make(self.config["grid"], schedule, num_inference_steps))
        if generator is None:
            fractions = draw_midpoints(torch.zeros(1, dtype=torch.int64), self.config["seed"], points.steps, "shared")
        else:
            fractions = torch.rand(points.steps, 1, generator=generator, dtype=torch.float64, device=generator.device)
        shares: list[float] = fractions[:, 0].tolist()
        self._places, self._midpoint = [], []
        for here, there, share in zip(points[:-1], points[1:], shares, strict=True):
            self._places.append(here)
            self._midpoint.append(False)
            if not here.pure_noise:  # from there a step has no midpoint
                kappa = torch.tensor(here.kappa + (there.kappa - here.kappa) * share, dtype=torch.float64)
                middle = GridPoint.at(schedule, schedule.time_from_kappa(kappa).item())
                self._places.append(middle._replace(kappa=kappa.item()))
                self._midpoint.append(True)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor([self._told(place) for place in self._places], device=device)
        kappas = torch.tensor([*(place.kappa for place in self._places), points[-1].kappa], dtype=torch.float64)
        self.sigmas = (kappas / (1 + kappas) if self.flows else kappas).float()
        self._places.append(points[-1])
        self._begin_index = self._step_index = self._before = None

    def _told(self, place: GridPoint) -> float:
        n = self.config["num_train_timesteps"]
        return n * place.kappa / (1 + place.kappa) if self.flows else n * place.t - 1

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample unchanged."""
        return sample

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The number of a timestep."""
        return int((self.timesteps - torch.as_tensor(timestep).to(self.timesteps)).abs().argmin())

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The next input of the network, given its output at this timestep.

        Args:
            model_output: the output, (B, ...).
            timestep: an entry of `timesteps`; they must come in order.
            sample: (B, ...), the network's input.
            eta, use_clipped_model_output: DDIM's arguments, for pipelines that pass them: must be 0 and unset.
            generator: unused; accepted because pipelines pass one: `set_timesteps` draws the midpoints.
            return_dict: whether to return an object with `.prev_sample`, else a tuple.
        """
        if eta or use_clipped_model_output:
            raise ValueError(f"eta={eta} and use_clipped_model_output belong to DDIM; leave them out")
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps(steps) before step()")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        index = self._step_index
        here, middle = self._places[index], self._midpoint[index]
        y = sample.double() / self._scale(here)
        output = model_output[:, : sample.shape[1]].double()  # without a learned variance
        level = NoiseLevel(torch.empty(0), here.alpha, here.sigma)
        eps = self.prediction.eps(output, here.alpha * y, level)
        begun = self._before if middle else None
        if begun is not None:  # the whole step, along the output at the midpoint
            there = self._places[index + 1]
            y = begun + (there.kappa - self._places[index - 1].kappa) * eps
            self._before = None
        else:
            there, self._before = self._places[index + 1], y
            y = y + (there.kappa - here.kappa) * eps
        self._step_index += 1
        found = (y * self._scale(there)).to(sample.dtype)
        return SchedulerOutput(prev_sample=found) if return_dict else (found,)

    def _scale(self, place: GridPoint) -> float:
        """The sample at a point, per unit of y = x / alpha."""
        return 1 / (1 + place.kappa) if self.flows else place.alpha

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Samples with this noise (B, ...) added, at these timesteps (B,)."""
        times = torch.as_tensor(timesteps, device=original_samples.device).double().view(-1)
        n = self.config["num_train_timesteps"]
        if self.flows:
            signal, deviation = 1 - times / n, times / n
        else:
            signal, deviation = self._schedule.scales(((times + 1) / n).clamp(0, 1))
        return expand_like(signal, original_samples) * original_samples + expand_like(deviation, noise) * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, as pipelines of flows call it."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]
