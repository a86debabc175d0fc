"""Kinds of option values: each in words and as a test."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "ANY",
    "BOOL",
    "COUNT",
    "DEVICES",
    "ERRORS",
    "FRACTION",
    "INDICES",
    "LIST",
    "NUMBER",
    "OPTIONS",
    "SAMPLES",
    "SEED",
    "SHARE",
    "SIZES",
    "TEXT",
    "TWO_NUMBERS",
    "Kind",
    "list_of_whole",
    "number",
    "one_of",
    "parse_indices",
    "text",
    "whole",
    "written",
]


COUNT = 10**9
"""Upper bound of counts; sample indices stay below it (`mlem.noise.USER_INDICES`)."""
SAMPLES = 10**7
"""Most indices per command."""
SEED = 2**63 - 1
"""The largest seed: torch takes 64 bits, with a sign."""


@dataclass(frozen=True)
class Kind:
    """`NAME must be WORDS, got VALUE` unless `holds(value)`. In words, {name} stands for the option's name."""

    words: str
    holds: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError naming the option, what it must be and its value."""
        if not self.holds(value):
            raise ValueError(f"{name} must be {self.words.format(name=name)}, got {value!r}")

    def or_null(self) -> Kind:
        """The same kind, or null."""
        return Kind(f"{self.words}, or null", lambda value: value is None or self.holds(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


@dataclass(frozen=True)
class _Bounded(Kind):
    """Whole numbers, one or a list, with their own message above `most`."""

    most: int

    def check(self, name: str, value: Any) -> None:
        numbers: list[Any] = value if isinstance(value, list) else [value]
        for number in numbers:
            if _is_whole(number) and number > self.most:
                raise ValueError(f"{name} must be at most {self.most}, got {number}")
        super().check(name, value)


def whole(least: int, most: int = COUNT) -> Kind:
    """A whole number from `least` to `most`."""
    return _Bounded(f"a whole number >= {least}", lambda value: _is_whole(value) and least <= value <= most, most)


def list_of_whole(least: int, most: int = COUNT) -> Kind:
    """A list of one or more whole numbers from `least` to `most`."""

    def holds(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(_is_whole(n) and least <= n <= most for n in value)

    return _Bounded(f"a list of whole numbers >= {least}", holds, most)


def number(*, above: float | None = None, least: float | None = None) -> Kind:
    """A finite number above a bound, or at least it."""
    if above is not None:
        return Kind(f"a number > {above:g}", lambda value: _is_finite(value) and value > above)
    assert least is not None
    return Kind(f"a number >= {least:g}", lambda value: _is_finite(value) and value >= least)


def one_of(*choices: str) -> Kind:
    """One of these names."""
    return Kind(f"one of {', '.join(choices)}", lambda value: value in choices)


def text(*, null: bool = False) -> Kind:
    """Non-empty text; null=True: or null."""
    return Kind("text", lambda value: (isinstance(value, str) and bool(value)) or (null and value is None))


def _are_devices(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_whole(n) and n >= 0 for n in value)
    return value in ("auto", -1) or (_is_whole(value) and value >= 1)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _are_indices(value: Any) -> bool:
    try:
        return bool(_ranges(value))
    except ValueError:
        return False


ANY = Kind("anything", lambda value: True)
BOOL = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number", _is_number)
TEXT = text()
ERRORS = Kind(
    "a list of numbers > 0, as in {name}=[1e-2,1e-3], or []",
    lambda value: isinstance(value, list) and all(_is_finite(one) and one > 0 for one in value),
)
TWO_NUMBERS = Kind(
    "a list of two numbers, as in {name}=[0.2,5]",
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_finite, value)),
)
CHECKED = Kind(
    f"a number of images from 2 to {COUNT}, or 0 for none",
    lambda value: _is_whole(value) and value != 1 and 0 <= value <= COUNT,
)
SHARE = Kind("in (0, 1]", lambda value: _is_finite(value) and 0 < value <= 1)
FRACTION = Kind("in [0, 1)", lambda value: _is_finite(value) and 0 <= value < 1)
LIST = Kind("a list, as in {name}=[...]", lambda value: isinstance(value, list))
OPTIONS = Kind("options, as in {name}.OPTION=VALUE", lambda value: isinstance(value, dict))
DEVICES = Kind("a whole number >= 1, a list of device numbers, or auto", _are_devices)
SIZES = Kind("a list of one or more sizes, such as [xs,s]", _are_sizes)
INDICES = Kind(f"ranges such as 0-63 or 0-9,20, of at most {SAMPLES} indices below {COUNT}", _are_indices)


def parse_indices(value: Any, name: str) -> Sequence[int]:
    """`"0-63"` as a range, `"0-9,20"` as a list of whole numbers. Raises ValueError naming the option."""
    if not INDICES.holds(value):
        raise ValueError(f"{name} must be {INDICES.words}, got {value}")
    ranges = _ranges(value)
    ordered = sorted(ranges, key=lambda one: one.start)
    if any(after.start < before.stop for before, after in itertools.pairwise(ordered)):
        raise ValueError(f"{name} contains an index twice: {value}")
    return ranges[0] if len(ranges) == 1 else [*itertools.chain(*ranges)]


def _ranges(value: Any) -> list[range]:
    """Raises ValueError for anything else, or values out of bounds."""
    found: list[range] = []
    for part in str(value).replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(part)
        found.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    if sum(map(len, found)) > SAMPLES or max(one.stop for one in found) > COUNT:
        raise ValueError(value)
    return found


def written(value: Any) -> str:
    """A value as written on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
