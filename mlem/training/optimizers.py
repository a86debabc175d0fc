"""Options of optimizers across a resume."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["renew_options"]


def renew_options(
    optimizer: Optimizer, scheduler: LambdaLR, learning_rate: float, **options: float | tuple[float, float]
) -> None:
    """Set the optimizer's options: after a resume it has those of the checkpoint.

    Args:
        scheduler: of the same optimizer; its rates are reset too.
        learning_rate: before the scheduler's factor.
        options: others, such as weight_decay.
    """
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group.update(options, initial_lr=learning_rate, lr=learning_rate * factor(scheduler.last_epoch))
    scheduler.base_lrs = [learning_rate] * len(scheduler.base_lrs)
