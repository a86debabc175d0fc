"""Checkpoints that survive kills, full disks and flipped bits, and stopping on a signal.

`step-00000200.ckpt` is written beside its target, fsynced and moved into place; then its SHA-256 is written beside
it. A checkpoint without its checksum was being written when the process died, and does not count.
"""

from __future__ import annotations

import pickle
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

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


def steps_of(path: Path, weights: Mapping[str, Tensor]) -> int:
    """Optimizer steps of the checkpoint. Raises ValueError when it has not these weights, naming up to five."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found, step = checkpoint["state_dict"], int(checkpoint["global_step"])
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{path} is not the checkpoint of a training ({why}); use another one") from error
    there, here = ({name: list(one.shape) for name, one in named.items()} for named in (found, weights))
    wrong = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if wrong:
        told = ", ".join(
            f"{name} {there.get(name, 'missing')} there, {here.get(name, 'none')} now" for name in wrong[:5]
        )
        raise ValueError(
            f"checkpoint {path} does not fit the model: {told}{', ..' if wrong[5:] else ''}; give the model options "
            "that it was trained with, or choose another root="
        )
    return step


def renew_options(optimizer: Optimizer, scheduler: LambdaLR, learning_rate: float, **options: float) -> None:
    """Give the optimizer these options: after a resume under other ones it has those of the checkpoint."""
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group.update(options, initial_lr=learning_rate, lr=learning_rate * factor(scheduler.last_epoch))
    scheduler.base_lrs = [learning_rate] * len(scheduler.base_lrs)


class Checkpoints(Checkpoint):
    """Saves every `every` optimizer steps, before each validation and at the end; keeps the last two.

    On SIGTERM it saves and stops, within a validation too: what is to be validated was saved before. (Lightning's own
    handling of SIGTERM stops in the middle of gradient accumulation and saves nothing.)

    pending: a run is resumed that was stopped before its last step had been validated, which is made up for first: in
    Lightning a resumed run begins with the next step.

    Checkpoints keep the seconds of training so far, so that `seconds` counts all processes of a run, but for what was
    lost in a kill.

    Weights that are not finite are not saved: FloatingPointError, which names `rate`, the option of the learning rate
    with its value.
    """

    def __init__(self, folder: Path, every: int, rate: str = "training.learning_rate", pending: bool = False) -> None:
        if every < 1:
            raise ValueError(f"training.checkpoint_every must be >= 1, got {every}")
        self.folder, self.every, self._rate, self._pending = folder, every, rate, pending
        self._signalled = self._stopping = False
        self._last_step = -1
        self._earlier, self._begin = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of training so far: of the processes before, and since this was made."""
        return self._earlier + time.perf_counter() - self._begin

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = state_dict["seconds"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pending = trainer.strategy.broadcast(self._pending)  # ranks may see different states of a shared disk
        if self._pending:  # a run that has all its steps would end before `on_train_start`
            trainer.fit_loop.epoch_loop.max_steps += 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step
        self._listen()
        # a resume at the end of an epoch makes Lightning lose count
        trainer.fit_loop.epoch_progress.current.completed = _epochs_done(trainer)
        if self._pending:
            trainer.fit_loop.epoch_loop.max_steps -= 1
            _validate(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._leave()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, ends_epoch = trainer.global_step, batch_idx + 1 == trainer.num_training_batches
        if step == self._last_step:  # still accumulating gradients
            return
        self._last_step = step
        # ranks must agree; asking costs a message, so not at every step
        if trainer.world_size == 1 or step % 5 == 0 or ends_epoch:
            self._ask(trainer)
        if self._stopping or ends_epoch or step % self.every == 0 or step == trainer.max_steps:
            self._check_finite(trainer, pl_module)
            self._save(trainer, step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave()
        self._listen()  # here too: the finished network is validated outside of training
        batches = torch.tensor(trainer.num_val_batches[0], device=trainer.strategy.root_device)
        # ranks may differ by one batch, and must ask together
        self._batches = int(trainer.strategy.reduce(batches, reduce_op="min"))  # type: ignore[arg-type]

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx < self._batches:
            self.stop_if_told(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop_if_told(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave()

    def stop_if_told(self, trainer: pl.Trainer) -> None:
        """Within a validation: end the run if any rank has had SIGTERM; every rank must call it."""
        self._ask(trainer)
        self._leave()

    def _listen(self) -> None:
        def remember(number: int, frame: Any) -> None:
            self._signalled = True

        # Lightning puts the earlier handler back when the trainer is torn down
        signal.signal(signal.SIGTERM, remember)

    def _ask(self, trainer: pl.Trainer) -> None:
        self._stopping = trainer.strategy.reduce_boolean_decision(self._signalled, all=False)

    def _leave(self) -> None:
        """End the run if it must stop: not at once when it has saved, but when Lightning has logged that step."""
        if self._stopping:
            raise SystemExit(STOPPED)

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


def stop_if_told(trainer: pl.Trainer) -> None:
    """Within a long evaluation in training: end the run if any rank has had SIGTERM; every rank must call it."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Checkpoints):
            callback.stop_if_told(trainer)


def _epochs_done(trainer: pl.Trainer) -> int:
    return trainer.global_step * trainer.accumulate_grad_batches // int(trainer.num_training_batches)


def _validate(trainer: pl.Trainer) -> None:
    """The validation after the steps done so far, as Lightning runs it at the end of an epoch."""
    epochs, loop = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    epochs.completed -= 1  # it belongs to the epoch before
    trainer.validating = True
    loop.run()
    trainer.training = True
    epochs.completed += 1
