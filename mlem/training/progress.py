"""Readable progress: a bar in a terminal, one line per epoch in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar

from mlem.training.lightning_internals import in_training

__all__ = ["BarProgress", "LineProgress", "announced", "make_progress"]

Item = TypeVar("Item")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def announced(items: Sequence[Item], what: str, shown: bool) -> Iterator[Item]:
    """Iterate over the items, printing after each how many are done and the time left."""
    begin = time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        if shown:
            left = (time.perf_counter() - begin) / done * (len(items) - done)
            print(f"{what}: {done} of {len(items)} batches, {_clock(left)} left", flush=True)


class _Speed:
    """Images per second and time left since training (re)started."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None

    def read(self, trainer: pl.Trainer, batch_size: int) -> tuple[float, str] | None:
        """None before the second reading."""
        now = time.perf_counter()
        if self._start is None:
            self._start = (now, trainer.global_step)
            return None
        seconds, steps = now - self._start[0], trainer.global_step - self._start[1]
        if steps < 1:
            return None
        left = (trainer.max_steps - trainer.global_step) * seconds / steps
        return steps * batch_size / seconds, _clock(left)


class BarProgress(RichProgressBar):
    """Lightning's bar, with images/s and the time left to the last step (not just to the end of the epoch)."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(leave=True)
        self._batch_size, self._speed = batch_size, _Speed()

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        items = dict(super().get_metrics(trainer, pl_module))
        items.pop("v_num", None)
        if trainer.training and (speed := self._speed.read(trainer, self._batch_size)):
            items |= {"images/s": f"{speed[0]:.0f}", "left": speed[1]}
        return items


class LineProgress(ProgressBar):
    """One line per epoch."""

    def __init__(self, batch_size: int, name: str) -> None:
        super().__init__()
        self._batch_size, self._name, self._speed = batch_size, name, _Speed()

    def disable(self) -> None:
        """Lightning disables the bar on all ranks but 0; `is_global_zero` is checked below."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._speed.read(trainer, self._batch_size)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and in_training(trainer):
            self._print(trainer)

    def _print(self, trainer: pl.Trainer) -> None:
        metrics, speed = trainer.callback_metrics, self._speed.read(trainer, self._batch_size)
        parts = [f"{self._name}: step {trainer.global_step}/{trainer.max_steps}"]
        parts += [f"{key} {float(metrics[key]):.4f}" for key in ("train/loss", "val/error") if key in metrics]
        parts += [f"{speed[0]:.0f} images/s", f"{speed[1]} left"] if speed else []
        print(", ".join(parts), flush=True)


def make_progress(batch_size: int, name: str) -> ProgressBar:
    """A bar in a terminal, otherwise lines. batch_size: over all ranks."""
    return BarProgress(batch_size) if sys.stdout.isatty() else LineProgress(batch_size, name)
