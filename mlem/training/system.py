"""Speed and memory of a training, as metrics, for those who look at `metrics.jsonl` and not at W&B's own figures."""

from __future__ import annotations

import resource
import sys
import time

import lightning.pytorch as pl
import torch


class SystemFigures(pl.Callback):
    """Logs, at each validation in training, what rank 0 measures.

    system/images_per_second: of all ranks together, since the validation before, the validation itself left out.
    system/memory_gib, system/gpu_memory_gib: the most that this process held so far.
    batch_size: images in a step, all ranks together.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # not at the start of an epoch, which a run that is resumed within one never sees
        self._start = time.perf_counter(), trainer.global_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter(), trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        begin, step = self._start
        if step == trainer.global_step:  # a validation that is made up for after a resume
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
