"""Training speed and memory as metrics in `metrics.jsonl`; W&B has its own."""

from __future__ import annotations

import resource
import sys
import time

import lightning.pytorch as pl
import torch

from mlem.training.lightning_internals import in_training

__all__ = ["SystemFigures"]


class SystemFigures(pl.Callback):
    """Logs speed and memory, measured by rank 0, at each validation in training.

    system/images_per_second covers all ranks, since the previous validation and without its time; system/memory_gib
    and system/gpu_memory_gib are the peak of this process so far.

    Args:
        batch_size: images per step, over all ranks.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # not at the start of an epoch: a run resumed within one never sees it
        self._start = time.perf_counter(), trainer.global_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter(), trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or not in_training(trainer):
            return
        begin, step = self._start
        if step == trainer.global_step:  # a validation that was pending when the run was resumed
            return
        images = (trainer.global_step - step) * self._batch_size
        values = {"system/images_per_second": images / (time.perf_counter() - begin), "system/memory_gib": _memory()}
        device = trainer.strategy.root_device
        if device.type == "cuda":
            values["system/gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        for logger in trainer.loggers:
            logger.log_metrics(values, max(0, trainer.global_step - 1))


def _memory() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
