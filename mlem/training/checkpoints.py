"""Checkpoints that survive kills, full disks and flipped bits, and stopping on a signal.

`step-00000200.ckpt` is written beside its target, fsynced and moved into place; then its SHA-256 is written beside
it. A checkpoint without its checksum was being written when the process died, and does not count.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from mlem.files import atomic_write, sha256, write_text

STOPPED = 128 + signal.SIGTERM
"""Exit status after SIGTERM, as the shell counts it."""
FAILED = 2
"""Exit status of the ranks that leave what went wrong to rank 0."""


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written as the module docstring says, and read with `weights_only=True`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        with atomic_write(path) as file:
            torch.save(checkpoint, file)
        write_text(_checksum_file(path), sha256(path) + "\n")

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        check(Path(path))
        return torch.load(path, map_location=map_location, weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        # the checksum first: a checkpoint without one does not count
        _checksum_file(Path(path)).unlink(missing_ok=True)
        Path(path).unlink(missing_ok=True)


def saved(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, newest first."""
    return sorted((path for path in folder.glob("step-*.ckpt") if _checksum_file(path).exists()), reverse=True)


def check(path: Path) -> Path:
    """`path` itself. Raises ValueError when the checkpoint is damaged, naming it and the one before it."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    expected = _checksum_file(path)
    if not expected.is_file():
        raise ValueError(f"checkpoint {path} has no checksum ({expected.name}): it was never finished; use another one")
    if sha256(path) != expected.read_text().strip():
        others = [other for other in saved(path.parent) if other != path]
        remedy = f"resume from the one before it with: resume={others[0]}" if others else "delete it to start again"
        raise ValueError(f"checkpoint {path} is damaged (its checksum differs); {remedy}")
    return path


class Checkpoints(Checkpoint):
    """Saves every `every` optimizer steps and at the end, keeps the last two, and saves and stops on SIGTERM.

    (Lightning's own handling of SIGTERM stops in the middle of gradient accumulation and saves nothing.)

    Weights that are not finite are not saved: FloatingPointError, which names `rate`, the option of the learning rate
    with its value.
    """

    def __init__(self, folder: Path, every: int, rate: str = "training.learning_rate") -> None:
        if every < 1:
            raise ValueError(f"training.checkpoint_every must be >= 1, got {every}")
        self.folder, self.every, self._rate = folder, every, rate
        self._signalled = False
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def remember(number: int, frame: Any) -> None:
            self._signalled = True

        self._last_step = trainer.global_step
        # Lightning puts the earlier handler back when the trainer is torn down
        signal.signal(signal.SIGTERM, remember)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last_step:  # still accumulating gradients
            return
        self._last_step = step
        stop = self._must_stop(trainer, step)
        if stop or step % self.every == 0 or step == trainer.max_steps:
            self._check_finite(trainer, pl_module)
            self._save(trainer, step)
        if stop:
            raise SystemExit(STOPPED)

    def _must_stop(self, trainer: pl.Trainer, step: int) -> bool:
        if trainer.world_size == 1:
            return self._signalled
        # ranks must agree; asking costs a message, so not at every step
        return step % 5 == 0 and trainer.strategy.reduce_boolean_decision(self._signalled, all=False)

    def _check_finite(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        finite = torch.stack([torch.isfinite(weights).all() for weights in pl_module.parameters()]).all()
        if trainer.strategy.reduce_boolean_decision(bool(finite), all=True):
            return
        if not trainer.is_global_zero:  # rank 0 says it
            raise SystemExit(FAILED)
        kept = saved(self.folder)
        remedy = f"{kept[0]} is kept: resume=force goes on from it" if kept else "no checkpoint came before"
        raise FloatingPointError(
            f"training diverged: at step {trainer.global_step} the weights are not finite; lower {self._rate}; {remedy}"
        )

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        trainer.save_checkpoint(self.folder / f"step-{step:08d}.ckpt")
        if trainer.is_global_zero:
            for old in saved(self.folder)[2:]:
                trainer.strategy.remove_checkpoint(old)
