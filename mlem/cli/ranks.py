"""The processes of a run: starting, gathering results, and ending together."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from mlem.cli.errors import USAGE
from mlem.cli.schema import Trainer

__all__ = [
    "all_gather",
    "fail_together",
    "launch",
    "leave",
    "new_fabric",
    "on_devices",
    "several",
    "world_size_of",
]


def on_devices(trainer: Trainer, make: Callable[..., Any]) -> Any:
    """`make(accelerator=..., devices=..., ...)`: a Trainer or Fabric. Raises ValueError if that is not available."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    given = trainer.place()
    try:
        return make(**given)
    except (MisconfigurationException, ValueError, TypeError) as error:
        options = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"trainer: {str(error).splitlines()[0]} ({options})") from error


def new_fabric(trainer: Trainer) -> Any:
    """Lightning's Fabric on these devices, not yet launched. Raises ValueError if they do not exist."""
    from lightning.fabric import Fabric

    return on_devices(trainer, Fabric)


def launch(fabric: Any) -> None:
    """Start the other ranks of an unlaunched Fabric; they end when their parent does."""
    fabric.launch()
    if not fabric.is_global_zero:
        end_with_parent()


def world_size_of(trainer: Trainer, batch_size: int, accumulate: int) -> int:
    """The number of ranks. Raises ValueError if the batch cannot be split evenly."""
    from lightning.pytorch import Trainer as LightningTrainer

    quiet = partial(LightningTrainer, logger=False, enable_checkpointing=False)
    world_size = on_devices(trainer, quiet).world_size
    if batch_size % (world_size * accumulate):
        raise ValueError(
            f"training.batch_size must be a multiple of ranks x accumulate = {world_size} x {accumulate}, got "
            f"{batch_size}"
        )
    return world_size


def all_gather(mine: Any) -> list[Any]:
    """The arguments of all ranks, in order, on every rank."""
    from torch import distributed

    if not distributed.is_initialized():
        return [mine]
    gathered = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, mine)
    return gathered


def fail_together(failure: Exception | None) -> None:
    """If any rank failed, end all: rank 0 raises its own or the first failure, the others exit silently."""
    from torch import distributed

    failures = [message for message in all_gather(None if failure is None else str(failure)) if message is not None]
    if failures and distributed.is_initialized() and distributed.get_rank() > 0:
        raise SystemExit(USAGE)
    if failures:
        raise failure or ValueError(failures[0])


def end_with_parent() -> None:
    """End this process when its parent dies, which a sampling rank would otherwise notice only at the end."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def several() -> bool:
    """Whether this process belongs to a torch process group."""
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def leave() -> None:
    """Close torch's process group while Python is running: its threads may abort an exiting process.

    See https://github.com/pytorch/pytorch/issues/190489.
    """
    if several():
        sys.modules["torch.distributed"].destroy_process_group()
