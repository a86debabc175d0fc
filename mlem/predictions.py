"""Predictions: the meaning of a network's input, time and output.

The state of sampling is `x = alpha x_0 + sigma z` with `alpha^2 + sigma^2 = 1`, whatever path a network was trained on:
all Gaussian paths visit the same `y = x / alpha` at the same noise-to-signal ratio `kappa = sigma / alpha`. They differ
in the scale of the network's input, its time variable and the meaning of its output. With `r = kappa / (1 + kappa)`,
data standard deviation d and `q^2 = kappa^2 + d^2`:

| prediction     | input       | time            | output                                                             |
|----------------|-------------|-----------------|--------------------------------------------------------------------|
| `v`            | x           | N t - 1         | alpha z - sigma x_0 (Salimans and Ho, arXiv:2202.00512)            |
| `eps`          | x           | N t - 1         | z                                                                  |
| `x0`           | x           | N t - 1         | x_0                                                                |
| `edm`          | y / q       | ln(kappa) / 4   | (x_0 - d^2 y / q^2) q / (kappa d), F of table 1, arXiv:2206.00364  |
| `edm_denoised` | y           | kappa           | x_0, D of the same                                                 |
| `flow`         | (1 - r) y   | N r             | z - x_0                                                            |
| `sit`          | (1 - r) y   | 1 - r           | x_0 - z: time runs the other way (arXiv:2401.08740)                |

Users pass a name, or an object to set options: `prediction="edm"`, `prediction=EDM(sigma_data=1.0)`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from mlem.arguments import hint
from mlem.schedule import NoiseSchedule, expand_like

__all__ = [
    "EDM",
    "PREDICTIONS",
    "SIT",
    "X0",
    "EDMDenoised",
    "Eps",
    "Flow",
    "NoiseLevel",
    "Prediction",
    "V",
    "make_prediction",
]

_LEAST_SHARE = 1e-6
"""Clips quantiles when training times are drawn from a normal distribution: the outermost are not finite."""
P_MEAN, P_STD = -1.2, 1.2
"""Mean and standard deviation of the normal ln kappa of `edm` in training; table 1, arXiv:2206.00364."""


class NoiseLevel(NamedTuple):
    """The noise level at which a network is evaluated.

    Args:
        t: (B,), times in [0, 1].
        alpha, sigma: scales of data and noise in x, `alpha^2 + sigma^2 = 1`: (B,), or numbers where all samples agree.
        number: t as a number, if known.
    """

    t: Tensor
    alpha: Tensor | float
    sigma: Tensor | float
    number: float | None = None

    @staticmethod
    def of(schedule: NoiseSchedule, t: Tensor) -> NoiseLevel:
        """The noise level of a schedule at t (B,)."""
        return NoiseLevel(t, *schedule.scales(t))

    def like(self, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """alpha and sigma, shaped to multiply x (B, ...)."""
        return expand_like(self.alpha, x), expand_like(self.sigma, x)

    def time(self, value: Tensor | float) -> Tensor:
        """A time of the network, (B,) float32."""
        if isinstance(value, Tensor):
            return value.float()
        return self.t.new_full(self.t.shape, value, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Prediction(ABC):
    """One convention.

    Args:
        clip: bound of the data: the estimate of x_0 is clipped to +-clip, like `clip_sample` of diffusers. Not affine,
            so no sum over levels may use it. None: no clipping.
    """

    name: ClassVar[str]
    clip: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{field.name} of prediction {self.name} must be a positive number, got {value!r}")

    @abstractmethod
    def ask(self, x: Tensor, at: NoiseLevel, timesteps: int) -> tuple[Tensor, Tensor]:
        """The network's input, like x (B, ...), and its time, (B,) float32; timesteps: N of the schedule."""

    @abstractmethod
    def _noise(self, output: Tensor, x: Tensor, at: NoiseLevel) -> Tensor: ...

    @abstractmethod
    def target(self, x_0: Tensor, z: Tensor, at: NoiseLevel) -> Tensor:
        """What the network should answer for data x_0 and noise z, both (B, ...)."""

    def eps(self, output: Tensor, x: Tensor, at: NoiseLevel) -> Tensor:
        """The noise estimate of an output; output, x: (B, ...)."""
        eps = self._noise(output, x, at)
        if self.clip is None:
            return eps
        alpha, sigma = at.like(x)
        return (x - alpha * ((x - sigma * eps) / alpha).clamp(-self.clip, self.clip)) / sigma

    def training_times(self, shares: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Training times, (B,), from shares (B,) uniform in [0, 1)."""
        return shares

    def check(self, schedule: NoiseSchedule) -> None:  # noqa: B027  (most fit any schedule)
        """Raise ValueError if this cannot be sampled under the schedule."""

    @property
    def options(self) -> dict[str, float]:
        """Options that differ from their defaults."""
        fields = dataclasses.fields(self)
        return {field.name: value for field in fields if (value := getattr(self, field.name)) != field.default}

    def to_config(self) -> str | dict[str, Any]:
        """Plain data from which `make_prediction` rebuilds this: just its name if all options are defaults."""
        return {"kind": self.name} | self.options if self.options else self.name

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value:g}" for name, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


def _normal(shares: Tensor) -> Tensor:
    """Standard normal numbers from uniform ones, by quantiles: they stay evenly spread."""
    return torch.special.ndtri(shares.double().clamp(_LEAST_SHARE, 1 - _LEAST_SHARE))


@functools.lru_cache(4096)
def _timestep(t: float, timesteps: int) -> float:
    """N t - 1, rounded like float32 tensors."""
    return float(np.float32(t) * np.float32(timesteps) - np.float32(1))


@dataclass(frozen=True, kw_only=True)
class _OfTimesteps(Prediction):
    """A network that takes x and timesteps.

    Args:
        timesteps: N of the network; None: that of its schedule.
    """

    timesteps: int | None = None

    def ask(self, x: Tensor, at: NoiseLevel, timesteps: int) -> tuple[Tensor, Tensor]:
        timesteps = self.timesteps or timesteps
        if at.number is not None:
            return x, at.time(_timestep(at.number, timesteps))
        return x, at.t.float() * timesteps - 1


@dataclass(frozen=True, kw_only=True)
class V(_OfTimesteps):
    """See the module docstring."""

    name = "v"

    def _noise(self, output: Tensor, x: Tensor, at: NoiseLevel) -> Tensor:
        alpha, sigma = at.like(x)
        return (sigma * x).add_(alpha * output)

    def target(self, x_0: Tensor, z: Tensor, at: NoiseLevel) -> Tensor:
        alpha, sigma = at.like(x_0)
        return alpha * z - sigma * x_0


@dataclass(frozen=True, kw_only=True)
class Eps(_OfTimesteps):
    """See the module docstring. It carries no information at pure noise, so no schedule may end there."""

    name = "eps"

    def _noise(self, output: Tensor, x: Tensor, at: NoiseLevel) -> Tensor:
        return output

    def target(self, x_0: Tensor, z: Tensor, at: NoiseLevel) -> Tensor:
        return z

    def check(self, schedule: NoiseSchedule) -> None:
        if schedule.ends_in_noise:
            raise ValueError(
                "prediction eps says nothing about the data without signal, and this schedule ends with none "
                "(flow, or zero terminal SNR); use v, x0 or flow, or another schedule"
            )


@dataclass(frozen=True, kw_only=True)
class X0(_OfTimesteps):
    """See the module docstring. The noise estimate divides by sigma: t = 0 is out of range."""

    name = "x0"

    def _noise(self, output: Tensor, x: Tensor, at: NoiseLevel) -> Tensor:
        alpha, sigma = at.like(x)
        return (x - alpha * output) / sigma

    def target(self, x_0: Tensor, z: Tensor, at: NoiseLevel) -> Tensor:
        return x_0


@dataclass(frozen=True, kw_only=True)
class EDM(Prediction):
    """The raw network F of Karras et al., without its preconditioning.

    Args:
        sigma_data: d, the standard deviation of the data.
    """

    name = "edm"
    sigma_data: float = 0.5

    def _norm(self, alpha: Tensor | float, sigma: Tensor | float) -> Tensor | float:
        """alpha q."""
        return (sigma**2 + (self.sigma_data * alpha) ** 2) ** 0.5

    def ask(self, x: Tensor, at: NoiseLevel, timesteps: int) -> tuple[Tensor, Tensor]:
        kappa = at.sigma / at.alpha
        time = kappa.log() / 4 if isinstance(kappa, Tensor) else math.log(kappa) / 4
        return x / self._norm(*at.like(x)), at.time(time)

    def _noise(self, output: Tensor, x: Tensor, at: NoiseLevel) -> Tensor:
        alpha, sigma = at.like(x)
        norm = self._norm(alpha, sigma)
        return sigma * x / norm**2 - self.sigma_data * alpha * output / norm

    def target(self, x_0: Tensor, z: Tensor, at: NoiseLevel) -> Tensor:
        alpha, sigma = at.like(x_0)
        return (sigma * x_0 / self.sigma_data - self.sigma_data * alpha * z) / self._norm(alpha, sigma)

    def training_times(self, shares: Tensor, schedule: NoiseSchedule) -> Tensor:
        """ln kappa is normal, with weight 1 on F: section 5 of Karras et al."""
        return schedule.time_from_kappa(torch.exp(P_MEAN + P_STD * _normal(shares))).to(shares.dtype)


@dataclass(frozen=True, kw_only=True)
class EDMDenoised(Prediction):
    """A network that includes the preconditioning of Karras et al.: D(y, kappa)."""

    name = "edm_denoised"

    def ask(self, x: Tensor, at: NoiseLevel, timesteps: int) -> tuple[Tensor, Tensor]:
        return x / at.like(x)[0], at.time(at.sigma / at.alpha)

    def _noise(self, output: Tensor, x: Tensor, at: NoiseLevel) -> Tensor:
        alpha, sigma = at.like(x)
        return (x - alpha * output) / sigma

    def target(self, x_0: Tensor, z: Tensor, at: NoiseLevel) -> Tensor:
        return x_0


@dataclass(frozen=True, kw_only=True)
class Flow(Prediction):
    """The velocity of rectified flow, `x = (1 - r) x_0 + r z`.

    Args:
        timesteps: N: the network's time is N r.
    """

    name = "flow"
    timesteps: float = 1000

    def ask(self, x: Tensor, at: NoiseLevel, timesteps: int) -> tuple[Tensor, Tensor]:
        alpha, sigma = at.like(x)
        return x / (alpha + sigma), at.time(self._time(at.sigma / (at.alpha + at.sigma)))

    def _time(self, r: Tensor | float) -> Tensor | float:
        return self.timesteps * r

    def _noise(self, output: Tensor, x: Tensor, at: NoiseLevel) -> Tensor:
        alpha, sigma = at.like(x)
        return (x + alpha * output) / (alpha + sigma)

    def target(self, x_0: Tensor, z: Tensor, at: NoiseLevel) -> Tensor:
        return z - x_0

    def training_times(self, shares: Tensor, schedule: NoiseSchedule) -> Tensor:
        """r is logit-normal, so that ln kappa is normal (Esser et al., arXiv:2403.03206)."""
        return schedule.time_from_kappa(torch.exp(_normal(shares))).to(shares.dtype)


@dataclass(frozen=True, kw_only=True)
class SIT(Flow):
    """Rectified flow with time and velocity reversed.

    Args:
        timesteps: N: the network's time is N (1 - r).
    """

    name = "sit"
    timesteps: float = 1

    def _time(self, r: Tensor | float) -> Tensor | float:
        return self.timesteps * (1 - r)

    def _noise(self, output: Tensor, x: Tensor, at: NoiseLevel) -> Tensor:
        return super()._noise(-output, x, at)

    def target(self, x_0: Tensor, z: Tensor, at: NoiseLevel) -> Tensor:
        return x_0 - z


PREDICTIONS: dict[str, type[Prediction]] = {kind.name: kind for kind in (V, Eps, X0, EDM, EDMDenoised, Flow, SIT)}
"""Name -> class."""
_ALIASES = {"v_prediction": "v", "epsilon": "eps", "sample": "x0", "flow_prediction": "flow"}
"""Diffusers name -> our name."""

Named: TypeAlias = str | Prediction
"""What users may pass."""


def make_prediction(prediction: Named | Mapping[str, Any]) -> Prediction:
    """The prediction given by name, by `Prediction.to_config`, or as itself.

    Raises:
        ValueError: unknown name or option.
    """
    if isinstance(prediction, Prediction):
        return prediction
    options = dict(prediction) if isinstance(prediction, Mapping) else {"kind": prediction}
    name = options.pop("kind", None)
    kind = PREDICTIONS.get(_ALIASES.get(name, name)) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {name!r}")
    known = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if option not in known:
            raise ValueError(
                f"prediction {name} has no option {option!r}; its options are {', '.join(known)}{hint(option, known)}"
            )
    return kind(**cast(dict[str, Any], options))
