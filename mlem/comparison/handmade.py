"""Handmade plans, for any family and any number of evaluations, without calibration."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from mlem.arguments import check_whole
from mlem.family import Family
from mlem.multilevel.choices import ESTIMATORS
from mlem.multilevel.plan import Plan

__all__ = ["Forecast", "Handmade", "Windows", "handmade", "level_name"]

SMALLEST, LARGEST = "smallest", "largest"
"""Stand for levels in any family."""


def level_name(family: Family, name: str) -> str:
    """The level called `name`, or "smallest" or "largest". Raises ValueError for an unknown one."""
    known = {SMALLEST: family.names[0], LARGEST: family.names[-1]}
    return family.level(name if name in family.names else known.get(name, name)).name


class Handmade(ABC):
    """The layout of a plan."""

    @property
    @abstractmethod
    def detail(self) -> str:
        """Its options, in words."""

    @abstractmethod
    def plan(self, family: Family, evaluations: int) -> Plan:
        """The plan for this many evaluations. Raises ValueError for levels that the family lacks."""


@dataclass(frozen=True)
class Windows(Handmade):
    """Levels one after another: T-Stitch (arXiv:2402.14167) if the small one is first; in the middle, arXiv:2512.24724.

    Args:
        windows: name of a level, or "smallest" or "largest", and its share of the evaluations, in order.

    Raises:
        ValueError: shares that are not positive or do not add up to 1.
    """

    windows: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        shares = [share for _, share in self.windows]
        if not shares or min(shares) <= 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise ValueError(f"the shares of running must be above 0 and add up to 1, got {shares}")

    @property
    def detail(self) -> str:
        return " + ".join(f"{share:g} {name}" for name, share in self.windows)

    def plan(self, family: Family, evaluations: int) -> Plan:
        names = [level_name(family, name) for name, _ in self.windows]
        ends = [round(evaluations * end) for end in accumulate(share for _, share in self.windows)]
        counts = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        used = [name for name in family.names if name in names]
        running = [used.index(name) for name, count in zip(names, counts, strict=True) for _ in range(count)]
        return Plan.switching(running, used)


@dataclass(frozen=True)
class Forecast(Handmade):
    """The largest level alone, its output extrapolated in between: TaylorSeer, arXiv:2503.06923, on the output.

    Args:
        every: N: it runs at evaluations 0, N, 2 N, ..
        order: of the polynomial.

    Raises:
        ValueError: a number is out of range.
    """

    every: int
    order: int = 1

    def __post_init__(self) -> None:
        check_whole("every of forecast", self.every)
        if self.order not in (orders := ESTIMATORS["forecast"].orders):
            raise ValueError(f"order of forecast must be one of {', '.join(map(str, orders))}, got {self.order!r}")

    @property
    def detail(self) -> str:
        return f"every {self.every}, order {self.order}"

    def plan(self, family: Family, evaluations: int) -> Plan:
        running = [row % self.every == 0 for row in range(evaluations)]
        return Plan.forecast(running, family.names[-1], order=self.order)


def handmade(options: dict[str, Any]) -> Handmade:
    """The plan described by `running` or `forecast` of a config. Raises ValueError for other data."""
    if "running" in options:
        return Windows(tuple(_window(window) for window in _list(options["running"])))
    given = options["forecast"]
    if not isinstance(given, dict) or not {"every"} <= {*given} <= {"every", "order"}:
        raise ValueError(f"forecast must be {{every: n}}, optionally with order: n, got {given}")
    return Forecast(**given)


def _list(given: Any) -> Sequence[Any]:
    if not isinstance(given, list):
        raise ValueError(f"running must be a list of [level, share], got {given}")
    return given


def _window(given: Any) -> tuple[str, float]:
    fits = isinstance(given, list) and len(given) == 2 and isinstance(given[0], str)
    if not fits or type(given[1]) not in (int, float):
        raise ValueError(f"running must be a list of [level, share], such as [xs, 0.5], got {given}")
    return given[0], float(given[1])
