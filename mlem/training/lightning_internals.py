"""All uses of undocumented parts of Lightning.

Each function says why it is needed and which public API would replace it. Written for Lightning 2.6.
"""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

__all__ = [
    "average_of",
    "averaged_state",
    "in_training",
    "keep_fit_open",
    "log_at_last_step",
    "restore_fit_limit",
    "set_epochs_done",
    "started_by_lightning",
    "validate_within_fit",
]


def in_training(trainer: pl.Trainer) -> bool:
    """Whether a validation hook runs within `fit`, not in `validate` or the sanity check.

    `trainer.validating` is true in both. Would be replaced by: a public `trainer.fitting`.
    """
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def average_of(trainer: pl.Trainer) -> WeightAveraging:
    """The weight averaging among the trainer's callbacks. Would be replaced by: a typed `trainer.callbacks`."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return next(callback for callback in callbacks if isinstance(callback, WeightAveraging))


def averaged_state(callback: WeightAveraging) -> dict[str, Tensor]:
    """The averaged weights of the LightningModule, by its own names.

    The callback only exposes them by swapping them into the module in validation. Would be replaced by: a public
    accessor of its averaged model.
    """
    averaged = callback._average_model  # pyright: ignore[reportPrivateUsage]
    assert averaged is not None
    return averaged.module.state_dict()


def log_at_last_step(trainer: pl.Trainer) -> None:
    """Let `validate` after `fit` log at the trainer's step.

    Loggers get the loop's own count, which is one short when there was nothing left to train. Would be replaced by: a
    `step` argument for what `validate` logs.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step  # pyright: ignore[reportPrivateUsage]


def keep_fit_open(trainer: pl.Trainer) -> None:
    """Let `fit` reach `on_train_start` even if all steps are done; otherwise it returns. Undo: `restore_fit_limit`.

    Would be replaced by: `trainer.fit_loop.max_steps` with a setter, or a hook before the loop is skipped.
    """
    trainer.fit_loop.epoch_loop.max_steps += 1


def restore_fit_limit(trainer: pl.Trainer) -> None:
    """Undo `keep_fit_open`."""
    trainer.fit_loop.epoch_loop.max_steps -= 1


def set_epochs_done(trainer: pl.Trainer) -> None:
    """Set the epoch from the step: a resume at the end of an epoch makes Lightning lose count.

    Would be replaced by: checkpoints that count for the epoch they end, or a setter of `current_epoch`.
    """
    batches = trainer.global_step * trainer.accumulate_grad_batches
    trainer.fit_loop.epoch_progress.current.completed = batches // int(trainer.num_training_batches)


def started_by_lightning(trainer: pl.Trainer) -> bool:
    """Whether rank 0 started the other ranks of this machine and watches them.

    Would be replaced by: a public `trainer.strategy.cluster_environment` of every strategy.
    """
    return isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)


def validate_within_fit(trainer: pl.Trainer) -> None:
    """Run the validation that belongs to the steps done so far, as `fit` does at the end of an epoch.

    `trainer.validate` may not be called within `fit`, and a resumed `fit` begins with the next step. Would be replaced
    by: a public `validate` within `fit`, or a resume that repeats an interrupted validation.
    """
    epochs, loop = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    epochs.completed -= 1  # it belongs to the epoch before
    trainer.validating = True
    loop.run()
    trainer.training = True
    epochs.completed += 1
