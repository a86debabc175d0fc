"""`fastest.json`: error and seconds of every rival on one family, and of mlem's recommendations.

This is the file as dataclasses, with queries. `rivals.py` has the rivals, `coupled.py` the measurement.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlem.files import check_format, damaged, read_object, write_record

__all__ = ["NAME", "RECOMMENDED", "Advice", "Alternative", "Fastest", "Measured", "advice_from_json"]

NAME = "fastest.json"
RECOMMENDED = "recommended"
"""The rival name of mlem's own recommendations."""
FORMAT = 1
_REMEDY = "measure it again: python sample.py eval=rivals"


@dataclass(frozen=True)
class Measured:
    """Measurements of one sampler.

    Args:
        group: the rival, such as "T-Stitch"; "recommended" is mlem's recommendation for each target.
        solver: its name, with its options.
        grid: name of the time grid.
        steps: of the solver.
        detail: distinguishes it within the group, such as "every 3, order 2"; may be empty.
        seconds: mean wall-clock time per image.
        mse: mean squared error per pixel to the many-step run of the largest level from the same noise.
        mse_stderr: standard error of `mse` over images.
        calls: name of a level -> its network calls per image.
    """

    group: str
    solver: str
    grid: str
    steps: int
    detail: str
    seconds: float
    mse: float
    mse_stderr: float
    calls: Mapping[str, float]

    @property
    def multilevel(self) -> bool:
        """Whether more than one level ran."""
        return sum(count > 0 for count in self.calls.values()) > 1


@dataclass(frozen=True)
class Alternative:
    """Predictions for one sampler.

    Args:
        text: solver, steps, grid and levels, in words.
        mse: predicted mean squared error.
        interval: 95 percent interval of `mse`.
        seconds: predicted wall-clock time per image.
    """

    text: str
    mse: float
    interval: tuple[float, float]
    seconds: float


@dataclass(frozen=True)
class Advice(Alternative):
    """What mlem recommends for one target.

    Args:
        target: the requested mean squared error.
        why: one line.
        options: of `sample`, as plain data: solver, steps, grid, and level or the levels of a plan.
        alternatives: the best of other kinds, best first.
    """

    target: float
    why: str
    options: Mapping[str, Any]
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Fastest:
    """The results of a run of all rivals.

    Args:
        about: family, its source, kind, images, batch_size, machine, reference, and a caption.
        rows: all measurements.
        recommendation: for the middle one of the targets; None if there is none.
        targets: mean squared errors at which seconds are compared, falling.
    """

    about: Mapping[str, Any]
    rows: tuple[Measured, ...]
    recommendation: Advice | None
    targets: tuple[float, ...]

    def best(self, target: float, groups: Sequence[str] | None = None) -> Measured | None:
        """The fastest row with a measured error of at most `target`; None if there is none.

        Args:
            groups: to consider; None: all.
        """
        good = [row for row in self.rows if row.mse <= target and (groups is None or row.group in groups)]
        return min(good, key=lambda row: row.seconds, default=None)

    @property
    def groups(self) -> list[str]:
        """The rivals with a row, in the order of the rows."""
        return list(dict.fromkeys(row.group for row in self.rows))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        write_record(path, {"format": FORMAT} | asdict(self))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Fastest:
        """The result written by `save`. Raises ValueError naming the file for other data."""
        where, plain = os.fspath(path), read_object(path)
        check_format(plain, FORMAT, where, _REMEDY)
        with damaged(where, _REMEDY):
            advice = plain["recommendation"]
            return Fastest(
                dict(plain["about"]),
                tuple(Measured(**row) for row in plain["rows"]),
                None if advice is None else advice_from_json(advice),
                tuple(map(float, plain["targets"])),
            )


def advice_from_json(plain: Mapping[str, Any]) -> Advice:
    """Advice from a file. Raises KeyError, TypeError or ValueError for other data."""
    others = tuple(Alternative(**_with_interval(other)) for other in plain["alternatives"])
    return replace(Advice(**_with_interval(plain)), alternatives=others)


def _with_interval(plain: Mapping[str, Any]) -> dict[str, Any]:
    low, high = plain["interval"]
    return dict(plain) | {"interval": (float(low), float(high))}
