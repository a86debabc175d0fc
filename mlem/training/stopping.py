"""Stopping on SIGTERM, on all ranks together."""

from __future__ import annotations

import signal
from types import FrameType

import lightning.pytorch as pl

__all__ = ["FAILED", "STOPPED", "StopSignal"]

STOPPED = 128 + signal.SIGTERM
"""Exit status after SIGTERM, as the shell counts it."""
FAILED = 2
"""Exit status of ranks that leave the message to rank 0."""


class StopSignal:
    """SIGTERM, remembered until it is safe to end. Every rank must call `ask` at the same places.

    Lightning's own handling of SIGTERM stops in the middle of gradient accumulation and saves nothing.

    Attributes:
        stopping: whether the ranks have agreed to stop.
    """

    def __init__(self) -> None:
        self.stopping = self._received = False

    def listen(self) -> None:
        """Take SIGTERM from now on. Lightning puts the earlier handler back when the trainer is torn down."""

        def remember(number: int, frame: FrameType | None) -> None:
            self._received = True

        signal.signal(signal.SIGTERM, remember)

    def ask(self, trainer: pl.Trainer) -> None:
        """Agree to stop if any rank has had SIGTERM."""
        self.stopping = trainer.strategy.reduce_boolean_decision(self._received, all=False)

    def leave(self) -> None:
        """End the process if the ranks have agreed to."""
        if self.stopping:
            raise SystemExit(STOPPED)
