"""Guidance: networks whose conditioned output is pushed away from an unconditioned or a weaker network's output.

    output = null + scale (conditioned - null)

Classifier-free guidance (Ho and Salimans, arXiv:2207.12598): null is the same network given "no class". Autoguidance
(Karras et al., arXiv:2406.02507): null is a smaller or less trained network with the same conditions. Restricted to an
interval of noise levels (Kynkäänniemi et al., arXiv:2404.07724) it is faster and often better. Guidance is affine in
the outputs, so a guided network is a network like any other: plans, calibrations and ledgers see one level.
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
        network: the guided network, called as `network(x, time, **conditions)`.
        scale: guidance scale; 1 is none.
        null: name -> what the null side gets instead: a label, or a row of numbers. Conditions that are not named
            stay.
        weak: the null side of autoguidance; None: the network itself.
        interval: the network's times between which guidance acts; None: always.
        weak_share: the null side's share of the FLOPs of a guided evaluation.
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
            # buffers move with the network, so that no call waits for a copy; they are not saved
            self.register_buffer(f"null_{name}", torch.as_tensor(value), persistent=False)
        self.interval, self.weak_share = interval, weak_share

    @property
    def null(self) -> dict[str, Tensor]:
        """What the null side gets instead, by name."""
        return {name: getattr(self, f"null_{name}") for name in self._told_instead}

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes this guidance from others of the same networks; plain data."""
        null = {
            name: hashlib.sha256(str(value.tolist()).encode()).hexdigest()[:16] for name, value in self.null.items()
        }
        interval = None if self.interval is None else list(self.interval)
        return {"scale": self.scale, "null": null, "weak": self.weak is not None, "interval": interval}

    def guided(self, time: Tensor) -> Tensor | slice:
        """The rows on which guidance acts; time: (B,), in the network's units."""
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
    """A level under guidance; see `Family.guided` for the arguments."""
    if not math.isfinite(scale):
        raise ValueError(f"scale of guidance must be a finite number, got {scale}")
    scale = float(scale)  # 2 and 2.0 have one identity
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
    """The conditions of the null side. Raises ValueError if they do not fit the level."""
    classes = {name: value for name, value in level.conditions.items() if isinstance(value, int)}
    if null is None:
        null = classes if weak is None else {}
    if weak is None and not null:
        told = (
            f"takes {', '.join(level.conditions)}: null= says what the null side gets instead"
            if level.conditions
            else ("takes no condition that could be left out; pass a weaker level as weak= instead")
        )
        raise ValueError(f"guidance of level {level.name}: it {told}")
    for name in null:
        if name not in level.conditions:
            known = ", ".join(level.conditions) or "nothing besides x and t"
            raise ValueError(f"null= has {name!r}, but level {level.name} takes {known}")
    return null


def _refuse_other_convention(level: Level, weak: Level) -> None:
    """Raise ValueError if the outputs of the two networks do not mean the same."""
    for what in ("prediction", "shape"):
        own, other = getattr(level, what), getattr(weak, what)
        if own != other:
            raise ValueError(f"weak={weak.name} has {what} {other}, level {level.name} has {own}; they must agree")
    if level.schedule.fingerprint != weak.schedule.fingerprint:
        raise ValueError(f"weak={weak.name} and level {level.name} have different noise schedules; they must agree")


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
