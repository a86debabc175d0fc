"""A progress bar for work that is usually short: it appears only after a second."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from mlem.files import first_process

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Waiting"]

PATIENCE = 1.0
"""Seconds before the bar appears."""


class Waiting:
    """A bar on standard error, in the first process only: `with Waiting("what is done", parts) as waiting`.

    Args:
        text: description of the work.
        total: number of parts.
    """

    def __init__(self, text: str, total: int) -> None:
        self._text, self._total, self._done = text, total, 0
        self._begin = time.monotonic()
        self._shown: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> Waiting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown is not None:
            self._shown[0].stop()

    def advance(self) -> None:
        """Count one part as done."""
        self._done += 1
        if self._shown is None and time.monotonic() - self._begin > PATIENCE and first_process():
            self._shown = self._bar()
        if self._shown is not None:
            bar, task = self._shown
            bar.update(task, completed=self._done, refresh=True)

    def _bar(self) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bar = Progress(*columns, console=Console(stderr=True))
        bar.start()
        return bar, bar.add_task(self._text, total=self._total)
