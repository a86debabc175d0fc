"""Checkpoint files that survive kills, full disks and flipped bits.

`step-00000200.ckpt` is written beside its target, fsynced and moved into place; then its SHA-256 is written beside
it. A checkpoint without a checksum was unfinished when the process died, and is ignored.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from mlem.files import atomic_write, sha256, write_text

__all__ = ["AtomicCheckpointIO", "check", "path_of", "saved", "steps_of"]


def path_of(folder: Path, step: int) -> Path:
    """The path of the checkpoint after `step` optimizer steps."""
    return folder / f"step-{step:08d}.ckpt"


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written as in the module docstring and read with `weights_only=True`."""

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
    """Return `path`. Raises ValueError if the checkpoint is damaged, naming it and the previous one."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    expected = _checksum_file(path)
    if not expected.is_file():
        raise ValueError(f"checkpoint {path} has no checksum ({expected.name}): it was never finished; use another one")
    if sha256(path).encode() != expected.read_bytes().strip():
        others = [other for other in saved(path.parent) if other != path]
        remedy = f"resume from the one before it with: resume={others[0]}" if others else "delete it to start again"
        raise ValueError(f"checkpoint {path} is damaged (its checksum differs); {remedy}")
    return path


def steps_of(path: Path, weights: Mapping[str, Tensor]) -> int:
    """Optimizer steps of the checkpoint. Raises ValueError naming up to five weights that do not fit `weights`."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found, step = checkpoint["state_dict"], int(checkpoint["global_step"])
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a training checkpoint ({why}); use another one") from error
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
