"""What a run cost: the ledger of network evaluations (NFE), seconds and FLOPs, and the meter around each network."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mlem.files import damaged
from mlem.guidance import GuidedNetwork
from mlem.networks import deep_cache_in

__all__ = ["Ledger", "LevelLedger", "Meter", "Network"]

Network: TypeAlias = Callable[..., Any]
"""network(x, t, **conditions): a tensor, or an object with `.sample`, as diffusers' networks return."""


@dataclass
class LevelLedger:
    """What one level cost.

    calls: network evaluations (NFE), one per image and call. expected_calls: their mean over the coins of a plan.
    seconds: in the network. flops: floating-point operations.
    """

    calls: int = 0
    expected_calls: float = 0.0
    seconds: float = 0.0
    flops: float = 0.0


@dataclass
class Ledger:
    """What a run cost, summed over its images.

    levels: by name. wall_seconds: wall-clock time of the run, networks included. images: number of images.
    """

    levels: dict[str, LevelLedger] = field(default_factory=dict[str, LevelLedger])
    wall_seconds: float = 0.0
    images: int = 0
    rounds: float = 0.0
    """Sequential NFE per image, on average: fewer than `evaluations` if calls run in parallel."""

    @property
    def evaluations(self) -> float:
        """NFE per sample, summed over levels."""
        return sum(level.calls for level in self.levels.values()) / max(self.images, 1)

    @property
    def network_seconds(self) -> float:
        """Seconds in networks, summed over levels."""
        return sum(level.seconds for level in self.levels.values())

    def add(self, other: Ledger) -> None:
        """Add the cost of another run."""
        rounds = self.rounds * self.images + other.rounds * other.images
        self.rounds = rounds / max(self.images + other.images, 1)
        self.wall_seconds += other.wall_seconds
        self.images += other.images
        for name, cost in other.levels.items():
            own = self.levels.setdefault(name, LevelLedger())
            for key, value in vars(cost).items():
                setattr(own, key, getattr(own, key) + value)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        totals = {"evaluations": self.evaluations, "network_seconds": self.network_seconds}
        own = {"images": self.images, "wall_seconds": self.wall_seconds, "rounds": self.rounds}
        return own | totals | {"levels": {name: dict(vars(cost)) for name, cost in self.levels.items()}}

    @staticmethod
    def from_dict(plain: Mapping[str, Any], where: str = "the ledger") -> Ledger:
        """The ledger described by `to_dict`. Raises ValueError naming `where` for other data."""
        with damaged(where):
            levels = {
                name: LevelLedger(**{key: _number(value) for key, value in cost.items()})
                for name, cost in plain["levels"].items()
            }
            rounds = _number(plain.get("rounds", 0.0))
            return Ledger(levels, _number(plain["wall_seconds"]), _number(plain["images"]), rounds)


def _number(value: Any) -> Any:
    """Return `value`, an int or a float. Raises TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is not a number")
    return value


class Meter:
    """Counts the calls of a network, or of a denoiser without one, and the seconds spent in it.

    Calls never wait for a device; only `collect` does. A guided network counts as the two it calls; a call on reused
    features counts as one, with its own FLOPs.

    Attributes:
        images: rows evaluated since the last `collect`.
    """

    def __init__(self, network: Network, flops: float) -> None:
        self.network, self._flops = network, flops
        self.images, self._twice, self._saved, self._seconds = 0, 0, 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._cache = deep_cache_in(network)

    def begin(self) -> None:
        """Begin a trajectory: features of the previous one are not reused."""
        if self._cache is not None:
            self._cache.start()

    def __call__(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Any:
        output = self._timed(x, t, conditions)
        self.images += x.shape[0]
        if isinstance(self.network, GuidedNetwork):
            self._twice += self.network.evaluations(t)
        if self._cache is not None:
            self._saved += len(x) * (1 - self._cache.share)
        return output

    def _timed(self, x: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Any:
        if x.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            output = self.network(x, t, **conditions)
            end.record()
            self._events.append((start, end))
            return output
        begin = time.perf_counter()
        output = self.network(x, t, **conditions)
        self._seconds += time.perf_counter() - begin
        return output

    def collect(self) -> LevelLedger:
        """The cost since the last `collect`; waits for the GPU."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        flops = self.images * self._flops
        if isinstance(self.network, GuidedNetwork):
            share = self.network.weak_share
            flops = self._flops * (self.images * (1 - share) + self._twice * share)
        if self._cache is not None:
            flops -= self._flops * self._saved
        calls = self.images + self._twice
        cost = LevelLedger(calls, calls, self._seconds, flops)
        self.images, self._twice, self._saved, self._seconds, self._events = 0, 0, 0.0, 0.0, []
        return cost
