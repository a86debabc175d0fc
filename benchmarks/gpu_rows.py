"""The rows of `gpu.py`, saved immediately: existing rows are not measured again, and a call ends in time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from multilevel_runs import write_rows

from mlem.provenance import provenance

__all__ = ["Clock", "Job", "OutOfTime", "Rows"]

_FAILURES = (RuntimeError, ValueError, FloatingPointError)
"""Failures of one row: out of memory, failed compilation or capture, no plan at that cost, non-finite samples."""


class OutOfTime(Exception):
    """The next measurement would not end in time."""


class Clock:
    """The time limit of a call: minutes from now; None: unlimited. Its first piece of work always begins."""

    def __init__(self, minutes: float | None) -> None:
        self._end, self._begun = math.inf if minutes is None else time.monotonic() + 60 * minutes, False

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def begin(self, seconds: float) -> None:
        """Begin work of about this many seconds. Raises OutOfTime if it would not end in time."""
        if self._begun and seconds > self.left:
            raise OutOfTime
        self._begun = True


@dataclass(frozen=True)
class Job:
    """One row to be measured.

    Attributes:
        piece, key: its identity.
        work: returns its values.
        seconds: least time needed.
    """

    piece: str
    key: Sequence[str | int]
    work: Callable[[], dict[str, Any]]
    seconds: float = 0.0


class Rows:
    """The file.

    Args:
        out: its path.
        about: machine and settings. Raises SystemExit if the file has others.
    """

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self.out, self.about = out, about
        kept = json.loads(out.read_text()) if out.exists() else {"about": about, "rows": []}
        if kept["about"] != about:
            raise SystemExit(f"{out} holds other measurements ({kept['about']}); move it away, or choose another --out")
        self.rows: list[dict[str, Any]] = kept["rows"]

    def find(self, piece: str, key: Sequence[str | int]) -> dict[str, Any] | None:
        """The row, if it is there."""
        return next((row for row in self.rows if row["piece"] == piece and row["key"] == list(key)), None)

    def of(self, piece: str) -> list[dict[str, Any]]:
        """The rows of a piece that did not fail."""
        return [row for row in self.rows if row["piece"] == piece and "failed" not in row]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The rows that failed."""
        return [row for row in self.rows if "failed" in row]

    def measure(self, jobs: Iterable[Job], clock: Clock) -> None:
        """Add the rows that are missing. Raises OutOfTime."""
        for job in jobs:
            if self.find(job.piece, job.key) is None:
                # the longest of its kind so far
                clock.begin(max([job.seconds, *(row["took"] for row in self.rows if row["piece"] == job.piece)]))
                self._add(job)

    def write(self, **results: Any) -> None:
        """Write the file: machine and settings, results if any, and one line per row."""
        write_rows(self.out, {"about": self.about, **results, "rows": self.rows})

    def _add(self, job: Job) -> None:
        begin, values = time.monotonic(), dict[str, Any]()
        try:
            values = job.work()
        except _FAILURES as error:
            values = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        took = round(time.monotonic() - begin, 2)
        about = {"piece": job.piece, "key": list(job.key), "took": took, "commit": provenance()["commit"]}
        self.rows.append(about | values)
        self.write()
        words = values.get("failed") or ", ".join(f"{name} {_short(value)}" for name, value in values.items())
        print(f"{job.piece} {' '.join(map(str, job.key))}: {words}", flush=True)
        if "failed" in values and torch.cuda.is_available():
            torch.zeros(1, device="cuda").item()  # raises if the GPU is no longer usable in this process


def _short(value: Any) -> str:
    """For a line on the screen."""
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.4g}"
    return f"{value:.4g}" if isinstance(value, float) else ".." if isinstance(value, (dict, list)) else str(value)
