"""Denoisers: callables `eps = denoiser(x, t)` that estimate the noise in `x_t = alpha_t x_0 + sigma_t z`.

x: (B, ...), the noised data; t: (B,), times in [0, 1]; eps: like x. A network, a closed-form distribution
and (in its own package) a weighted sum of levels are all denoisers, and every solver takes any of them. One with
`any_dtype = True` gets x and t in float64, whatever its network computes in; others get the default dtype.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mlem.networks import by_position, deep_cache_in
from mlem.predictions import Named, NoiseLevel, make_prediction
from mlem.schedule import NoiseSchedule, expand_like

__all__ = [
    "AnyDtype",
    "Conditional",
    "Denoiser",
    "HoldsNetwork",
    "MixtureDenoiser",
    "NetworkDenoiser",
    "Scheduled",
    "gaussian_denoiser",
    "of_rows",
]


class Denoiser(Protocol):
    """See the module docstring."""

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor: ...


@runtime_checkable
class Scheduled(Protocol):
    """A denoiser that declares its schedule."""

    schedule: NoiseSchedule


@runtime_checkable
class AnyDtype(Protocol):
    """A denoiser that declares whether it takes x and t in float64."""

    any_dtype: bool


@runtime_checkable
class HoldsNetwork(Protocol):
    """A denoiser around a network."""

    network: Any


@runtime_checkable
class Conditional(Protocol):
    """A denoiser that may take conditions besides x and t."""

    def given(self, conditions: Mapping[str, Tensor], /) -> Denoiser:
        """The same denoiser for a batch with these conditions, (B, ...) each."""
        ...

    def rows(self, positions: Tensor | slice, /) -> Denoiser:
        """The same denoiser for these rows of its batch, which may be repeated."""
        ...


def of_rows(denoiser: Denoiser, positions: Tensor | slice) -> Denoiser:
    """The denoiser for some rows of its batch; itself if it treats all rows alike."""
    return denoiser.rows(positions) if isinstance(denoiser, Conditional) else denoiser


class NetworkDenoiser:
    """A network under a schedule, with inputs and outputs as its prediction defines them.

    network(input, time, **conditions) may return a tensor or an object with `.sample` (diffusers). If it returns
    twice the channels, the second half, a learned variance, is dropped.

    The network is fed in its own dtype; its output is turned into eps in the dtype of x. In float64 that loses
    nothing: `x_0 = y - kappa eps` would magnify a float32 rounding of eps by kappa, up to 400.

    Args:
        network: the network to evaluate.
        schedule: the schedule of x and t.
        prediction: meaning of the network's inputs and output.
        own: the schedule that the network was trained under, if different; it is evaluated at its own time with the
            same kappa.
    """

    any_dtype = True

    def __init__(
        self,
        network: nn.Module | Callable[..., Any],
        schedule: NoiseSchedule,
        prediction: Named = "v",
        own: NoiseSchedule | None = None,
    ) -> None:
        self.network = by_position(network)
        self.schedule, self.prediction = schedule, make_prediction(prediction)
        same = own is None or own.fingerprint == schedule.fingerprint
        self.own = schedule if same or own is None else own
        parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
        self.dtype = torch.get_default_dtype() if parameter is None else parameter.dtype
        self.conditions: dict[str, Tensor] = {}
        self._point: tuple[float, float, float] | None = None
        self._cache = deep_cache_in(network)

    def through(self, network: Callable[..., Any]) -> NetworkDenoiser:
        """The same denoiser calling `network` instead: a wrapper of its own, such as a meter."""
        other = copy.copy(self)
        other.network = network
        return other

    def given(self, conditions: Mapping[str, Tensor]) -> NetworkDenoiser:
        """The same denoiser for a batch with these conditions, (B, ...) each, passed to the network by name."""
        other = copy.copy(self)
        other.conditions = {
            name: value.to(self.dtype) if value.is_floating_point() else value for name, value in conditions.items()
        }
        return other

    def rows(self, positions: Tensor | slice) -> NetworkDenoiser:
        """The same denoiser for these rows of its batch, which may be repeated."""
        if not self.conditions:
            return self
        return self.given({name: value[positions] for name, value in self.conditions.items()})

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's raw output at t: like x."""
        return self._answer(x, NoiseLevel.of(self.own, self._own_time(t)))

    def at(self, t: float, alpha: float, sigma: float) -> NetworkDenoiser:
        """The same denoiser for calls at one time, whose scales are known."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _point=(alpha, sigma, t))  # copy.copy takes five times as long
        return other

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        same = self.own is self.schedule
        if self._cache is not None:
            alpha, sigma, _ = self._point or (math.nan,) * 3
            self._cache.kappa = sigma / alpha
        at = NoiseLevel(t, *self._point) if same and self._point else NoiseLevel.of(self.own, self._own_time(t))
        eps = self.prediction.eps(self._answer(x, at), x, at)
        return eps if same else self._beyond(eps, x, t, at)

    def _own_time(self, t: Tensor) -> Tensor:
        return t if self.own is self.schedule else self.own.time_from_kappa(self.schedule.kappa(t))

    def _answer(self, x: Tensor, at: NoiseLevel) -> Tensor:
        asked, time = self.prediction.ask(x, at, self.own.num_timesteps)
        # the time stays in full precision under autocast
        output = self.network(asked.to(self.dtype), time, **self.conditions)
        output = getattr(output, "sample", output).to(x.dtype)
        if output.dim() > 1 and output.shape[1] == 2 * x.shape[1] and output.shape[2:] == x.shape[2:]:
            output = output[:, : x.shape[1]]
        return output

    def _beyond(self, eps: Tensor, x: Tensor, t: Tensor, at: NoiseLevel) -> Tensor:
        """The noise estimate at t, beyond the noisiest level the network knows: of the same x_0."""
        alpha, sigma = (expand_like(scale, x) for scale in self.schedule.scales(t))
        own_alpha, own_sigma = at.like(x)
        ratio = alpha / own_alpha
        return x * ((1 - ratio) / sigma) + eps * (ratio * own_sigma / sigma)


class MixtureDenoiser:
    """The exact denoiser of a Gaussian mixture.

    weights: (M,), positive, sum 1; means: (M, d); covariances: (M, d, d), or (M,) variances of isotropic components.
    With `x ~ N(alpha m, C)`, `C = alpha^2 Sigma + sigma^2 I`, the noise estimate is `sigma C^-1 (x - alpha m)`,
    averaged over components by their posterior weights. Computed in float64. Samples are flat: x is (B, d).
    Isotropic components need no matrices: d may be thousands.
    """

    any_dtype = True

    def __init__(self, schedule: NoiseSchedule, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        self.schedule = schedule
        self.weights, self.means = weights.double(), means.double()
        whole = (*means.shape, means.shape[1])
        if weights.shape != means.shape[:1] or covariances.shape not in (whole, weights.shape):
            raise ValueError(
                f"weights (M,), means (M, d) and covariances (M, d, d) or (M,) must agree, got "
                f"{tuple(weights.shape)}, {tuple(means.shape)} and {tuple(covariances.shape)}"
            )
        self._round = covariances.dim() == 1
        self._variances: Tensor = covariances.double()
        self._axes: Tensor = torch.empty(0)
        if not self._round:
            self._variances, self._axes = torch.linalg.eigh(covariances.double())

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule.scales(t.double())
        estimate = self._of_round if self._round else self._of_any
        return estimate(x.double(), alpha[:, None], sigma[:, None]).to(x.dtype)

    def _of_round(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        variances = alpha**2 * self._variances + sigma**2  # (B, M)
        # by differences: |x|^2 - 2 alpha x m + |alpha m|^2 would cancel
        distances = alpha * torch.cdist(x / alpha, self.means, compute_mode="donot_use_mm_for_euclid_dist")
        log_density = -0.5 * (distances.square() / variances + x.shape[1] * variances.log()) + self.weights.log()
        pulls = torch.softmax(log_density, dim=1) / variances
        return sigma * (pulls.sum(1, keepdim=True) * x - alpha * (pulls @ self.means))

    def _of_any(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        offset = x[:, None, :] - alpha[..., None] * self.means
        along = torch.einsum("bmd,mde->bme", offset, self._axes)
        variances = alpha[..., None] ** 2 * self._variances + sigma[..., None] ** 2
        log_density = -0.5 * (along.square() / variances + variances.log()).sum(-1) + self.weights.log()
        posterior = torch.softmax(log_density, dim=1)
        pulls = torch.einsum("bme,mde->bmd", along / variances, self._axes)
        return sigma * torch.einsum("bm,bmd->bd", posterior, pulls)


def gaussian_denoiser(schedule: NoiseSchedule, mean: Tensor, covariance: Tensor) -> MixtureDenoiser:
    """The exact denoiser of N(mean, covariance); mean: (d,), covariance: (d, d). Linear in x."""
    return MixtureDenoiser(schedule, torch.ones(1), mean[None], covariance[None])
