"""A level whose network reuses its deep features, for one sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mlem.guidance import GuidedNetwork
from mlem.level import Level
from mlem.networks import DeepCache, Reuse
from mlem.solvers import GridPoint

if TYPE_CHECKING:
    from mlem.multilevel.plan import Plan

__all__ = ["ReusingLevel", "can_reuse", "reusing", "whole_calls"]


class ReusingLevel(NamedTuple):
    """A level with a memory, not a function of (x, t), and the part that keeps features.

    Args:
        level: to be sampled alone, one trajectory after another.
        cache: its DeepCache, which must `start` each trajectory.
    """

    level: Level
    cache: DeepCache


def reusing(level: Level, reuse: Reuse) -> ReusingLevel:
    """The level with a network that reuses features (DeepCache); under guidance, the guided network.

    Raises ValueError for a network whose features cannot be reused.
    """
    guided = level.network if isinstance(level.network, GuidedNetwork) else None
    if guided is None:
        cache = network = DeepCache(level.network, reuse, level.shape, level.conditions)
    elif guided.weak is not None or guided.interval is not None:
        raise ValueError(
            f"level {level.name} is guided by a weaker one, or in an interval: leave out reuse, or weak= and interval="
        )
    else:
        cache = DeepCache(guided.network, reuse, level.shape, level.conditions)
        network = GuidedNetwork(cache, guided.scale, guided.null)
    return ReusingLevel(level.through(network), cache)


def can_reuse(level: Level, reuse: Reuse) -> bool:
    """Whether the level's network is one whose features can be reused like this."""
    try:
        reusing(level, reuse)
    except ValueError:
        return False
    return True


def whole_calls(reuse: Reuse, rows: Sequence[GridPoint], plan: Plan | None = None) -> int:
    """How many calls run the whole network, of a level alone at these evaluations or of the last level of a plan."""
    runs = [1] * len(rows) if plan is None else plan.runs[:, -1].tolist()
    return reuse.whole_at(row.kappa for row, times in zip(rows, runs, strict=True) for _ in range(times))
