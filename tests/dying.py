"""Callbacks that harm their run: they end it in mid-course, or spoil its weights."""

from __future__ import annotations

import os
import signal
import time

import lightning.pytorch as pl
import torch


class Dying(pl.Callback):
    """SIGKILL after step `at`, when W&B has had time to write what it was told."""

    def __init__(self, at: int) -> None:
        self._at = at

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: object) -> None:
        if trainer.global_step == self._at:
            time.sleep(3)
            os.kill(os.getpid(), signal.SIGKILL)


class Spoiling(pl.Callback):
    """The weights are infinite after step `at`."""

    def __init__(self, at: int) -> None:
        self._at = at

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object) -> None:
        if trainer.global_step == self._at:
            next(pl_module.parameters()).data.view(-1)[0] = torch.inf


class Ending(pl.Callback):
    """In the hook `hook`, after step `at`: SIGTERM, or without `signalled` an error."""

    def __init__(self, hook: str, at: int, signalled: bool = False) -> None:
        self._at, self._signalled = at, signalled
        setattr(self, hook, self._end)

    def _end(self, trainer: pl.Trainer, *rest: object) -> None:
        if trainer.global_step != self._at or trainer.state.fn != "fit":
            return
        if not self._signalled:
            raise RuntimeError("the end")
        os.kill(os.getpid(), signal.SIGTERM)
