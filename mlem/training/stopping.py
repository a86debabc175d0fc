"""Stopping on SIGTERM and on Ctrl-C, on all ranks together."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from mlem.training.lightning_internals import started_by_lightning

__all__ = ["FAILED", "STOPPED", "StopSignal", "Stopping", "stop_if_told"]

STOPPED = 128 + signal.SIGTERM
"""Exit status after SIGTERM, by shell convention; after Ctrl-C it is 128 + SIGINT."""
FAILED = 2
"""Exit status of ranks that leave the message to rank 0."""


class StopSignal:
    """SIGTERM or Ctrl-C, remembered until it is safe to stop. Every rank must call `ask` at the same places.

    Lightning's own handling of SIGTERM stops in the middle of gradient accumulation and saves nothing; its handling of
    Ctrl-C stops anywhere.

    Attributes:
        stopping: the signal for which the ranks have agreed to stop; 0 for none.
    """

    def __init__(self) -> None:
        self.stopping = self._received = 0

    def listen(self) -> None:
        """Handle the signals from now on. Lightning restores the earlier handlers at teardown."""

        def remember(number: int, frame: FrameType | None) -> None:
            if number == self._received == signal.SIGINT:
                raise KeyboardInterrupt  # pressed twice: stop at once, without saving
            self._received = number

        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell starts its jobs in the background
                signal.signal(number, remember)

    def ask(self, trainer: pl.Trainer) -> None:
        """Agree to stop if any rank got a signal."""
        self.stopping = self._received
        if trainer.world_size > 1:
            received = torch.tensor(self._received, device=trainer.strategy.root_device)
            self.stopping = int(trainer.strategy.reduce(received, reduce_op="max"))  # type: ignore[arg-type]

    def leave(self, trainer: pl.Trainer) -> None:
        """End the process if the ranks agreed to."""
        if self.stopping:
            # Lightning kills rank 0, which has more to do, if a rank it started exits with another status
            quiet = not trainer.is_global_zero and started_by_lightning(trainer)
            raise SystemExit(0 if quiet else 128 + self.stopping)


class Stopping(pl.Callback):
    """Ends validations and tests on SIGTERM and Ctrl-C: they have nothing to save.

    Raises: SystemExit, on every rank.
    """

    def __init__(self) -> None:
        self._stop, self._batches = StopSignal(), 0

    def stop_if_told(self, trainer: pl.Trainer) -> None:
        """End the run if any rank got a signal; every rank must call it."""
        self._stop.ask(trainer)
        self._stop.leave(trainer)

    def _listen_in(self, trainer: pl.Trainer, batches: list[int | float]) -> None:
        self._stop.leave(trainer)
        self._stop.listen()
        shared = torch.tensor(batches[0], device=trainer.strategy.root_device)
        # ranks may differ by one batch, and must ask together
        self._batches = int(trainer.strategy.reduce(shared, reduce_op="min"))  # type: ignore[arg-type]

    def _at_batch(self, trainer: pl.Trainer, batch_idx: int) -> None:
        if batch_idx < self._batches:
            self.stop_if_told(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen_in(trainer, trainer.num_val_batches)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._at_batch(trainer, batch_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop_if_told(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen_in(trainer, trainer.num_test_batches)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._at_batch(trainer, batch_idx)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop_if_told(trainer)


def stop_if_told(trainer: pl.Trainer) -> None:
    """End a long evaluation if any rank got a signal; every rank must call it."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    for callback in callbacks:
        if isinstance(callback, Stopping):
            callback.stop_if_told(trainer)
