"""When training saves and stops: every few steps, before each validation, at the end, on a signal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint

from mlem.training.checkpoint_files import path_of, saved
from mlem.training.lightning_internals import keep_fit_open, restore_fit_limit, set_epochs_done, validate_within_fit
from mlem.training.stopping import FAILED, Stopping

__all__ = ["Checkpoints"]


class Checkpoints(Stopping, Checkpoint):
    """Saves every few optimizer steps, before each validation and at the end; keeps the last two.

    On SIGTERM and Ctrl-C it saves and stops. During validation it stops at once: the checkpoint was saved before.
    Weights that are not finite are not saved.

    Args:
        folder: of the checkpoints.
        every: optimizer steps between checkpoints, at least 1.
        rate: the learning-rate option with its value, for the message when training diverges.
        pending: validate before the first step: the interrupted run had not validated its last step.

    Raises:
        FloatingPointError: in training, when weights are not finite.
        SystemExit: after SIGTERM and Ctrl-C.
    """

    def __init__(self, folder: Path, every: int, rate: str = "training.learning_rate", pending: bool = False) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"training.checkpoint_every must be >= 1, got {every}")
        self.folder, self.every, self._rate, self._pending = folder, every, rate, pending
        self._last_step = -1
        self._earlier, self._begin = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training seconds, earlier processes included, without work lost in a kill."""
        return self._earlier + time.perf_counter() - self._begin

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = state_dict["seconds"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pending = trainer.strategy.broadcast(self._pending)  # ranks may see different states of a shared disk
        if self._pending:
            keep_fit_open(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step
        self._stop.listen()
        set_epochs_done(trainer)
        if self._pending:
            restore_fit_limit(trainer)
            validate_within_fit(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._stop.leave(trainer)  # not at once after saving: Lightning logs the step first

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, ends_epoch = trainer.global_step, batch_idx + 1 == trainer.num_training_batches
        if step == self._last_step:  # still accumulating gradients
            return
        self._last_step = step
        # ranks must agree, which costs a message, so not at every step
        if trainer.world_size == 1 or step % 5 == 0 or ends_epoch:
            self._stop.ask(trainer)
        if self._stop.stopping or ends_epoch or step % self.every == 0 or step == trainer.max_steps:
            self._check_finite(trainer, pl_module)
            self._save(trainer, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop.leave(trainer)

    def _check_finite(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        finite = torch.stack([torch.isfinite(weights).all() for weights in pl_module.parameters()]).all()
        if trainer.strategy.reduce_boolean_decision(bool(finite), all=True):
            return
        if not trainer.is_global_zero:  # rank 0 reports it
            raise SystemExit(FAILED)
        kept = saved(self.folder)
        remedy = f"{kept[0]} is kept: resume=force continues from it" if kept else "there is no earlier checkpoint"
        raise FloatingPointError(
            f"training diverged: at step {trainer.global_step} the weights are not finite; lower {self._rate}; {remedy}"
        )

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        trainer.save_checkpoint(path_of(self.folder, step))
        if trainer.is_global_zero:
            for old in saved(self.folder)[2:]:
                trainer.strategy.remove_checkpoint(old)
