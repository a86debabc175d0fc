"""The noise schedule: how the noise grows with time, on any Gaussian path.

Forward process `x_t = alpha_t x_0 + sigma_t z` with `alpha^2 + sigma^2 = 1`, time t in [0, 1], t = 0 clean.
Discrete timesteps n = 0 .. N-1 of other libraries are at `t = (n + 1) / N`. Paths that scale data and noise differently
(EDM, rectified flow) are converted to this form; the inputs and outputs of their networks are up to the prediction.

A schedule is one increasing function, t -> OU time `s = -ln alpha`; everything else follows from s:
`alpha = e^-s`, `sigma^2 = 1 - e^-2s`, `kappa = sigma / alpha`, `kappa^2 = e^2s - 1`, `log_snr = -2 ln kappa`.
Everything is computed in float64 and returned in the dtype of the input.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

__all__ = [
    "NUM_TIMESTEPS",
    "PURE_NOISE",
    "CosineSchedule",
    "EDMSchedule",
    "FlowSchedule",
    "NoiseSchedule",
    "TabulatedSchedule",
    "expand_like",
]

NUM_TIMESTEPS = 1000
"""N: number of discrete timesteps in the unit interval, as in DDPM."""
PURE_NOISE = 2.0**27
"""kappa where there is no signal: rectified flow at r = 1, and zero terminal SNR.

To networks it equals infinity: x and their times round to the same float32. Solvers can tell: in float64 it leaves
eight digits of `x_0 = y - kappa eps`.
"""


def _float64(value: Tensor | float) -> tuple[Tensor, torch.dtype]:
    """`value` in float64, and the dtype in which to answer (float64 for plain numbers)."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64), torch.float64
    return value.double(), value.dtype if value.is_floating_point() else torch.float64


def _refuse_outside(name: str, value: Tensor, low: float, high: float) -> None:
    # checking on another device would make the host wait for it
    if value.device.type == "cpu" and not bool(((value >= low) & (value <= high)).all()):
        bad = value[~((value >= low) & (value <= high))].flatten()[0].item()
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {bad:g}")


@overload
def expand_like(coefficient: Tensor, x: Tensor) -> Tensor: ...


@overload
def expand_like(coefficient: Tensor | float, x: Tensor) -> Tensor | float: ...


def expand_like(coefficient: Tensor | float, x: Tensor) -> Tensor | float:
    """coefficient: (B,) -> (B, 1, ...) in the dtype of x: (B, ...). A plain number stays one."""
    if not isinstance(coefficient, Tensor):
        return coefficient
    return coefficient.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


NOISIEST = 100.0
"""The kappa up to which grids resolve a schedule that ends in pure noise: a step from there errs by 1 / (2 kappa^2)."""


class NoiseSchedule(ABC):
    """A noise schedule; make one with `cosine`, `linear`, `edm`, `flow` or `from_diffusers`.

    num_timesteps: N, the unit of the networks' time. shift: of the original flow; else 1.
    """

    num_timesteps: int = NUM_TIMESTEPS
    shift: float = 1.0

    @abstractmethod
    def _ou_time(self, t: Tensor) -> Tensor:
        """OU time at t; float64 in and out."""

    @abstractmethod
    def _time(self, s: Tensor) -> Tensor:
        """The inverse of `_ou_time`."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Plain data from which `from_config` rebuilds this schedule."""

    @staticmethod
    def cosine(offset: float = 0.008, log_snr_min: float = -12.0) -> NoiseSchedule:
        """The cosine schedule of Nichol and Dhariwal (2021), `alpha = cos(theta) / cos(theta_0)`.

        theta runs linearly in t from `theta_0 = offset / (1 + offset) * pi / 2` to where the log-SNR is
        `log_snr_min` (instead of clipping beta), so that t = 1 stays invertible.
        """
        return CosineSchedule(offset, log_snr_min)

    @staticmethod
    def linear(beta_start: float = 1e-4, beta_end: float = 0.02, num_timesteps: int = NUM_TIMESTEPS) -> NoiseSchedule:
        """The linear betas of DDPM (Ho et al. 2020), interpolated linearly in OU time between timesteps."""
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
        betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        config = {"kind": "linear", "beta_start": beta_start, "beta_end": beta_end, "num_timesteps": num_timesteps}
        return TabulatedSchedule(-0.5 * torch.log1p(-betas).cumsum(0), config)

    @staticmethod
    def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> NoiseSchedule:
        """The noise levels of Karras et al., arXiv:2206.00364: kappa up to `sigma_max`, even in kappa^(1/7).

        The first of N timesteps has `sigma_min`; from there kappa falls linearly to 0.
        """
        return EDMSchedule(sigma_min, sigma_max)

    @staticmethod
    def flow(shift: float = 1.0) -> NoiseSchedule:
        """Rectified flow, `x = (1 - r) x_0 + r z` with `r = shift t / (1 + (shift - 1) t)`; t = 1 is pure noise."""
        return FlowSchedule(shift)

    @staticmethod
    def from_diffusers(config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule of a diffusers scheduler config: DDPM's betas in any of their forms, EDM or flow matching.

        Raises ValueError for other schedulers, and for options that change their noise levels.
        """
        kind = str(config.get("_class_name", ""))
        if "FlowMatch" in kind or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
            for option in ("use_dynamic_shifting", "shift_terminal", "invert_sigmas"):
                if config.get(option):
                    raise ValueError(
                        f"{option} of {kind} depends on the image size; write it as NoiseSchedule.flow(shift=)"
                    )
            return NoiseSchedule.flow(config.get("shift", config.get("flow_shift", 1.0)))
        if kind.startswith("EDM"):
            return NoiseSchedule.edm(config.get("sigma_min", 0.002), config.get("sigma_max", 80.0))
        if kind and not any(key in config for key in ("beta_start", "beta_schedule", "trained_betas")):
            raise ValueError(f"{kind} has no betas and is not an EDM or flow-matching scheduler; use one of these")
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")
        fields = {name: config[name] for name in names if name in config}
        if config.get("trained_betas") is not None:
            fields["trained_betas"] = [float(beta) for beta in config["trained_betas"]]
        signal = DDPMScheduler(**fields).alphas_cumprod.double().clamp(min=1 / (1 + PURE_NOISE**2))
        return TabulatedSchedule(-0.5 * signal.log(), {"kind": "diffusers", "config": fields})

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule described by `to_config`. Raises ValueError for an unknown kind or invalid options."""
        makers: dict[str, Callable[..., NoiseSchedule]] = {
            "cosine": NoiseSchedule.cosine,
            "linear": NoiseSchedule.linear,
            "edm": NoiseSchedule.edm,
            "flow": NoiseSchedule.flow,
            "diffusers": NoiseSchedule.from_diffusers,
        }
        if not isinstance(config, Mapping):
            raise ValueError(f"a schedule must be an object with a kind, such as cosine, got {config!r}")
        options = dict(config)
        kind = options.pop("kind", None)
        if kind not in [*makers]:
            raise ValueError(f"schedule kind must be one of {', '.join(makers)}, got {kind!r}")
        known = [*inspect.signature(makers[kind]).parameters]
        for name in options:
            if name not in known:
                raise ValueError(f"schedule {kind} has no option {name!r}; its options are {', '.join(known)}")
        try:
            return makers[kind](**options)
        except (TypeError, AttributeError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"schedule {kind} cannot be built ({said}); its options are {', '.join(known)}") from error

    def __repr__(self) -> str:
        return f"NoiseSchedule({self.to_config()})"

    @property
    def fingerprint(self) -> str:
        """Hash of the schedule."""
        return hashlib.sha256(json.dumps(self.to_config(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def ends_in_noise(self) -> bool:
        """Whether no signal is left at t = 1."""
        return self.kappa(1.0).item() > PURE_NOISE / 2

    @property
    def last(self) -> float:
        """Where grids even in a noise level begin: 1, or, under pure noise, where kappa is NOISIEST."""
        return self.time_from_kappa(NOISIEST).item() if self.ends_in_noise else 1.0

    def ou_time(self, t: Tensor | float) -> Tensor:
        """t: any shape, in [0, 1]. Returns `s = -ln alpha >= 0`."""
        value, dtype = _float64(t)
        _refuse_outside("t", value, 0.0, 1.0)
        return self._ou_time(value).to(dtype)

    def alpha(self, t: Tensor | float) -> Tensor:
        """Scale of the data at t, in (0, 1]."""
        value, dtype = _float64(t)
        return torch.exp(-self.ou_time(value)).to(dtype)

    def sigma(self, t: Tensor | float) -> Tensor:
        """Scale of the noise at t, in [0, 1)."""
        value, dtype = _float64(t)
        # expm1: 1 - e^-2s cancels near the data
        return torch.sqrt(-torch.expm1(-2 * self.ou_time(value))).to(dtype)

    def scales(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, for the time of one of them."""
        value, dtype = _float64(t)
        s = self.ou_time(value)
        return torch.exp(-s).to(dtype), torch.sqrt(-torch.expm1(-2 * s)).to(dtype)

    def kappa(self, t: Tensor | float) -> Tensor:
        """Noise-to-signal ratio sigma / alpha at t."""
        value, dtype = _float64(t)
        return torch.sqrt(torch.expm1(2 * self.ou_time(value))).to(dtype)

    def log_snr(self, t: Tensor | float) -> Tensor:
        """`ln(alpha^2 / sigma^2)` at t; infinite at t = 0."""
        value, dtype = _float64(t)
        return -torch.log(torch.expm1(2 * self.ou_time(value))).to(dtype)

    def time_from_ou_time(self, s: Tensor | float) -> Tensor:
        """Inverse of `ou_time`; values past the end of the schedule give t = 1."""
        value, dtype = _float64(s)
        _refuse_outside("OU time", value, 0.0, math.inf)
        return self._time(value).clamp(0.0, 1.0).to(dtype)

    def time_from_alpha(self, alpha: Tensor | float) -> Tensor:
        """Inverse of `alpha`."""
        value, dtype = _float64(alpha)
        _refuse_outside("alpha", value, 0.0, 1.0)
        return self.time_from_ou_time(-torch.log(value)).to(dtype)

    def time_from_sigma(self, sigma: Tensor | float) -> Tensor:
        """Inverse of `sigma`."""
        value, dtype = _float64(sigma)
        _refuse_outside("sigma", value, 0.0, 1.0)
        return self.time_from_ou_time(-0.5 * torch.log1p(-value.square())).to(dtype)

    def time_from_kappa(self, kappa: Tensor | float) -> Tensor:
        """Inverse of `kappa`."""
        value, dtype = _float64(kappa)
        _refuse_outside("kappa", value, 0.0, math.inf)
        return self.time_from_ou_time(0.5 * torch.log1p(value.square())).to(dtype)

    def time_from_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """Inverse of `log_snr`."""
        value, dtype = _float64(log_snr)
        return self.time_from_ou_time(0.5 * torch.nn.functional.softplus(-value, threshold=1e3)).to(dtype)


class CosineSchedule(NoiseSchedule):
    """See `NoiseSchedule.cosine`."""

    def __init__(self, offset: float, log_snr_min: float) -> None:
        if not offset > 0:
            raise ValueError(f"offset must be positive, got {offset}")
        if not -30 <= log_snr_min < 0:
            raise ValueError(f"log_snr_min must be in [-30, 0), got {log_snr_min}")
        self.offset, self.log_snr_min = offset, log_snr_min
        self._theta_0 = offset / (1 + offset) * math.pi / 2
        alpha_1 = (1 + math.exp(-log_snr_min)) ** -0.5
        self._theta_1 = math.acos(alpha_1 * math.cos(self._theta_0))

    def _variance(self, rise: Tensor) -> Tensor:
        """`sigma^2 = sin(theta - theta_0) sin(theta + theta_0) / cos^2(theta_0)`: no cancellation near the data."""
        return torch.sin(rise) * torch.sin(rise + 2 * self._theta_0) / math.cos(self._theta_0) ** 2

    def _ou_time(self, t: Tensor) -> Tensor:
        rise = t * (self._theta_1 - self._theta_0)
        theta, variance = self._theta_0 + rise, self._variance(rise)
        near_data = -0.5 * torch.log1p(-variance.clamp(max=0.75))
        return torch.where(variance < 0.5, near_data, -torch.log(torch.cos(theta) / math.cos(self._theta_0)))

    def _time(self, s: Tensor) -> Tensor:
        theta = torch.acos(torch.exp(-s) * math.cos(self._theta_0))
        # near the data acos loses digits: two Newton steps on the variance restore them
        rise, slope = theta - self._theta_0, torch.sin(2 * theta) / math.cos(self._theta_0) ** 2
        for _ in range(2):
            rise = torch.where(s < 0.1, rise - (self._variance(rise) + torch.expm1(-2 * s)) / slope, rise)
        return rise / (self._theta_1 - self._theta_0)

    def to_config(self) -> dict[str, Any]:
        return {"kind": "cosine", "offset": self.offset, "log_snr_min": self.log_snr_min}


def _ou_time_of(kappa: Tensor) -> Tensor:
    return 0.5 * torch.log1p(kappa.square())


class EDMSchedule(NoiseSchedule):
    """See `NoiseSchedule.edm`."""

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        if not 0 < sigma_min < sigma_max < PURE_NOISE:
            raise ValueError(f"edm needs 0 < sigma_min < sigma_max < 2^27, got {sigma_min} and {sigma_max}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self._low, self._high = sigma_min ** (1 / 7), sigma_max ** (1 / 7)
        self._first = 1 / self.num_timesteps

    def _ou_time(self, t: Tensor) -> Tensor:
        share = ((t - self._first) / (1 - self._first)).clamp(min=0)
        kappa = (self._low + share * (self._high - self._low)) ** 7
        return _ou_time_of(torch.where(t < self._first, self.sigma_min * t / self._first, kappa))

    def _time(self, s: Tensor) -> Tensor:
        kappa = torch.expm1(2 * s).sqrt()
        share = (kappa ** (1 / 7) - self._low) / (self._high - self._low)
        below = self._first * kappa / self.sigma_min
        return torch.where(kappa < self.sigma_min, below, self._first + share * (1 - self._first))

    def to_config(self) -> dict[str, Any]:
        return {"kind": "edm", "sigma_min": self.sigma_min, "sigma_max": self.sigma_max}


class FlowSchedule(NoiseSchedule):
    """See `NoiseSchedule.flow`. r is smaller by a factor of `1 - 2^-27`, so that kappa is finite."""

    _most = PURE_NOISE / (1 + PURE_NOISE)

    def __init__(self, shift: float) -> None:
        if not 0 < shift < 1000:
            raise ValueError(f"shift of a flow must be in (0, 1000), got {shift}")
        self.shift = shift

    def _ou_time(self, t: Tensor) -> Tensor:
        # r / (1 - r), without the cancellation at 1
        return _ou_time_of(self._most * self.shift * t / (1 - t + self.shift * t / (1 + PURE_NOISE)))

    def _time(self, s: Tensor) -> Tensor:
        kappa = torch.expm1(2 * s).sqrt().clamp(max=PURE_NOISE)
        return kappa / (kappa * (1 - self.shift / (1 + PURE_NOISE)) + self._most * self.shift)

    def to_config(self) -> dict[str, Any]:
        return {"kind": "flow", "shift": self.shift}


class TabulatedSchedule(NoiseSchedule):
    """OU times at t = 1/N .. 1, linear in between, and 0 at t = 0. See `linear` and `from_diffusers`."""

    def __init__(self, ou_times: Tensor, config: dict[str, Any]) -> None:
        """ou_times: (N,), float64, positive and strictly increasing."""
        knots = torch.cat([torch.zeros(1, dtype=torch.float64), ou_times.double()])
        if not bool((knots.diff() > 0).all()):
            raise ValueError("noise must grow with every timestep; this scheduler config has betas <= 0")
        self._config = config
        self.num_timesteps = len(ou_times)
        self._knots = {knots.device: knots}

    def _knots_on(self, device: torch.device) -> Tensor:
        """The knots, copied to a device once: copying at every call would make the host wait."""
        if device not in self._knots:
            self._knots[device] = self._knots[torch.device("cpu")].to(device)
        return self._knots[device]

    def _ou_time(self, t: Tensor) -> Tensor:
        knots = self._knots_on(t.device)
        position = t * (len(knots) - 1)
        cell = position.floor().long().clamp(0, len(knots) - 2)
        return torch.lerp(knots[cell], knots[cell + 1], position - cell)

    def _time(self, s: Tensor) -> Tensor:
        knots = self._knots_on(s.device)
        cell = (torch.searchsorted(knots, s.contiguous(), right=True) - 1).clamp(0, len(knots) - 2)
        return (cell + (s - knots[cell]) / (knots[cell + 1] - knots[cell])) / (len(knots) - 1)

    def to_config(self) -> dict[str, Any]:
        return dict(self._config)
