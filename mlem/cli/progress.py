"""Progress: a bar in a terminal; for sampling, also an occasional line in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

__all__ = ["SamplingProgress", "WorkProgress"]

EVERY = 30.0
"""Seconds between two lines in a log file."""


class SamplingProgress:
    """Images done, images/s and time left over all ranks; called by rank 0 with the number it made.

    Ranks have equal shares and run at the same pace, so rank 0 reports for all. done: images that existed before.
    """

    def __init__(self, total: int, done: int, world_size: int, shown: bool) -> None:
        watched = sys.stdout.isatty()
        columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), disable=not (shown and watched))
        self._task = self._bar.add_task("sampling", total=total, completed=done, speed="")
        self._total, self._before, self._done, self._world_size = total, done, done, world_size
        self._begin = self._printed = time.perf_counter()
        self._prints = shown and not watched

    def __enter__(self) -> SamplingProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, images: int) -> None:
        self._done = min(self._done + images * self._world_size, self._total)
        now = time.perf_counter()
        speed = (self._done - self._before) / max(now - self._begin, 1e-9)
        self._bar.update(self._task, completed=self._done, speed=f"{speed:.1f} images/s")
        if self._prints and now - self._printed > EVERY:
            self._printed = now
            minutes = (self._total - self._done) / max(speed, 1e-9) / 60
            left = f"{self._done} of {self._total} images, {speed:.1f} images/s, {minutes:.1f} minutes left"
            print(f"sampling: {left}", flush=True)


class WorkProgress:
    """A progress bar in evaluations of the largest level. total: 0 for no bar."""

    def __init__(self, total: float) -> None:
        columns = (TextColumn("samplers"), BarColumn(), TaskProgressColumn())
        self._bar = Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), disable=not total)
        self._task = self._bar.add_task("samplers", total=total)

    def __enter__(self) -> Callable[[float], None]:
        self._bar.start()
        return lambda cost: self._bar.advance(self._task, cost)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
