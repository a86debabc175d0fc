"""Guidance: networks that push what a network says of a condition away from what it, or a weaker one, says otherwise.

    output = null + scale (conditioned - null)

Classifier-free guidance (Ho and Salimans, arXiv:2207.12598): null is the same network told "no class". Autoguidance
(Karras et al., arXiv:2406.02507): null is a smaller or less trained network told the same. In an interval of noise
levels only (Kynkäänniemi et al., arXiv:2404.07724) it is faster and often better. All of it is affine in the outputs,
so that a guided network is a network like any other: plans, calibrations and ledgers see one level.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mlem.denoiser import NetworkDenoiser
from mlem.level import Level
from mlem.networks import by_position

__all__ = ["GuidedNetwork", "guided_level"]


class GuidedNetwork(nn.Module):
    """A network under guidance.

    Args:
        network: `network(x, time, **conditions)`, the one that is guided.
        scale: of the guidance; 1 is none.
        null: name -> what the null side is told instead: a label, or a row of numbers. Conditions that are not named
            stay.
        weak: the null side of autoguidance; None: the network itself.
        interval: the network's times between which guidance acts; None: always.
        weak_share: of the null side in the floating-point operations of a guided evaluation.
    """

    def __init__(
        self,
        network: nn.Module,
        scale: float,
        null: Mapping[str, Any],
        *,
        weak: nn.Module | None = None,
        interval: tuple[float, float] | None = None,
        weak_share: float = 0.5,
    ) -> None:
        super().__init__()
        self.network, self.scale = by_position(network), scale
        self.weak: nn.Module | None = None if weak is None else by_position(weak)
        self._told_instead = tuple(null)
        for name, value in null.items():
            # moved with the network, so that no call waits for a copy; no weights
            self.register_buffer(f"null_{name}", torch.as_tensor(value), persistent=False)
        self.interval, self.weak_share = interval, weak_share

    @property
    def null(self) -> dict[str, Tensor]:
        """What the null side is told instead, by name."""
        return {name: getattr(self, f"null_{name}") for name in self._told_instead}

    @property
    def identity(self) -> dict[str, Any]:
        """What tells guidance apart from others of the same networks; plain data."""
        null = {
            name: hashlib.sha256(str(value.tolist()).encode()).hexdigest()[:16] for name, value in self.null.items()
        }
        interval = None if self.interval is None else list(self.interval)
        return {"scale": self.scale, "null": null, "weak": self.weak is not None, "interval": interval}

    def guided(self, time: Tensor) -> Tensor | slice:
        """The rows on which guidance acts; time: (B,), the network's own."""
        if self.interval is None:
            return slice(None)
        low, high = self.interval
        return ((time >= low) & (time <= high)).nonzero().flatten()

    def evaluations(self, time: Tensor) -> int:
        """Network evaluations of the null side at these times (B,); the other side has B."""
        rows = self.guided(time)
        return len(time) if isinstance(rows, slice) else len(rows)

    def forward(self, x: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        """The guided output: x (B, ...), time (B,) and conditions (B, ...) -> like the network's output."""
        rows = self.guided(time)
        some = {name: value[rows] for name, value in conditions.items()}
        for name, value in self.null.items():
            some[name] = value.to(some[name]).expand_as(some[name])
        if self.weak is None:
            both = {name: torch.cat([value, some[name]]) for name, value in conditions.items()}
            told, null = _output(
                self.network, torch.cat([x, x[rows]]), torch.cat([time, time[rows]]), both
            ).tensor_split([len(x)])
        else:
            told = _output(self.network, x, time, conditions)
            null = _output(self.weak, x[rows], time[rows], some) if len(x[rows]) else told[:0]
        if isinstance(rows, slice):
            return null + self.scale * (told - null)
        return told.index_copy(0, rows, null + self.scale * (told[rows] - null))


def guided_level(
    level: Level,
    scale: float,
    *,
    null: Mapping[str, Any] | None = None,
    weak: Level | None = None,
    interval: tuple[float, float] | None = None,
) -> Level:
    """A level under guidance; for the arguments see `Family.guided`."""
    if not math.isfinite(scale):
        raise ValueError(f"scale of guidance must be a finite number, got {scale}")
    scale = float(scale)  # the identity knows 2 and 2.0 as one
    null = _null(level, null, weak)
    if weak is not None:
        _refuse_other_convention(level, weak)
    times = None
    if interval is not None:
        low, high = interval
        if not 0 <= low < high:
            raise ValueError(f"interval of guidance must be noise-to-signal ratios 0 <= low < high, got {interval}")
        times = _network_times(level, low, high)
    share = 0.5 if weak is None else weak.flops / (weak.flops + level.flops)
    network = GuidedNetwork(
        level.network, scale, null, weak=None if weak is None else weak.network, interval=times, weak_share=share
    )
    guided = Level(
        level.name,
        network,
        level.schedule,
        level.shape,
        level.prediction,
        level.data,
        level.measured,
        flops=round(level.flops / (1 - share)),
        conditions=level.conditions,
        licence=level.licence,
    )
    guided.latents = level.latents
    return guided


def _null(level: Level, null: Mapping[str, Any] | None, weak: Level | None) -> Mapping[str, Any]:
    """What the null side is told. Raises ValueError where that cannot be told."""
    classes = {name: value for name, value in level.conditions.items() if isinstance(value, int)}
    if null is None:
        null = classes if weak is None else {}
    if weak is None and not null:
        told = (
            f"told {', '.join(level.conditions)}: null= says what it is told instead"
            if level.conditions
            else ("told nothing that could be left out; weak= names a weaker level instead")
        )
        raise ValueError(f"guidance of level {level.name}: it is {told}")
    for name in null:
        if name not in level.conditions:
            known = ", ".join(level.conditions) or "nothing beside x and t"
            raise ValueError(f"null= has {name!r}, but level {level.name} is told {known}")
    return null


def _refuse_other_convention(level: Level, weak: Level) -> None:
    """Raise ValueError where outputs of the two networks do not mean the same."""
    for what in ("prediction", "shape"):
        own, other = getattr(level, what), getattr(weak, what)
        if own != other:
            raise ValueError(f"weak={weak.name} has {what} {other}, level {level.name} has {own}; they must agree")
    if level.schedule.fingerprint != weak.schedule.fingerprint:
        raise ValueError(f"weak={weak.name} has another noise schedule than level {level.name}; they must agree")


def _network_times(level: Level, low: float, high: float) -> tuple[float, float]:
    """The network's own times at two noise-to-signal ratios, in rising order."""
    seen: list[float] = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        seen.append(time.item())
        return x

    asks = NetworkDenoiser(network, level.schedule, level.prediction)
    for kappa in (low, high):
        asks.predict(torch.zeros(1, *level.shape), level.schedule.time_from_kappa(kappa).view(1))
    return min(seen), max(seen)


def _output(network: nn.Module, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    output = network(x, time, **conditions)
    return getattr(output, "sample", output)
