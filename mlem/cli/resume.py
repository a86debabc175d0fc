"""Resuming a run folder: whether the options agree with it, and where to continue."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mlem.cli.schema import Train
from mlem.files import first_process, read_object, write_json
from mlem.level import Level
from mlem.training.checkpoint_files import check, saved, steps_of

__all__ = ["WORDS", "changes", "check_resume", "level_settings", "note_settings", "resume_point"]

WORDS = ("auto", "force")
"""Values of `resume` other than paths."""


def check_resume(resume: str, folders: Sequence[Path]) -> None:
    """Raise ValueError if `resume` is neither a keyword nor a checkpoint of one of these run folders."""
    if resume in WORDS:
        return
    path = Path(resume)
    if not path.is_file():
        raise ValueError(f"resume must be auto, force or the path of a checkpoint, got {resume!r}: no such file")
    if not any(_is_of(path, folder) for folder in folders):
        places = ", ".join(str(folder / "checkpoints") for folder in folders)
        raise ValueError(f"resume={path} is not a checkpoint of this run: name one in {places}, or use resume=auto")


def _is_of(path: Path, folder: Path) -> bool:
    return path.resolve().parent == (folder / "checkpoints").resolve()


def changes(resume: str, folder: Path, settings: dict[str, Any]) -> list[str]:
    """Differences from the settings of the run in `folder`. Raises ValueError if any, unless resume=force."""
    path = folder / "settings.json"
    found = _differences(read_object(path), settings) if path.exists() else []
    if found and resume != "force":
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(found)}); change them back, choose another "
            "root=, or continue anyway with resume=force"
        )
    return found


def level_settings(job: Train, level: Level, world_size: int) -> dict[str, Any]:
    """Everything that determines a level's weights: a resumed run must agree on all of it."""
    plain = job.told
    training = {key: value for key, value in plain["training"].items() if key not in ("workers", "checkpoint_every")}
    model = {
        key: value for key, value in plain["model"].items() if key not in ("name", "levels", "level_steps", "size")
    }
    return {
        "model": _without_later(model),
        "level": level.name,
        "data": {key: plain["data"][key] for key in ("source", "held_out", "options")},
        "schedule": level.schedule.to_config(),
        "seed": job.seed,
        "training": _without_later(training),
        "precision": job.trainer.precision,
        "world_size": world_size,
    }


_LATER = {
    **{"architecture": "unet", "attention": False, "conditional": False},
    **{"beta2": 0.99, "final_rate": 0.1, "flip": False, "label_dropout": 0.1, "distillation_steps": 0},
}
"""Options that older runs lack, and their implicit values."""


def _without_later(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as an older run would have written them."""
    return {key: value for key, value in settings.items() if key not in _LATER or value != _LATER[key]}


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        pairs = {key: (old.get(key, _LATER.get(key)), new.get(key, _LATER.get(key))) for key in keys}
        return [d for key, pair in pairs.items() for d in _differences(*pair, f"{name}.{key}" if name else key)]
    return [] if _same(old, new) else [f"{name}: {old} there, {new} now"]


def _same(old: Any, new: Any) -> bool:
    """Whether two settings are equal; computed numbers up to rounding."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-9, abs_tol=1e-12)
    return old == new


def resume_point(
    resume: str, folder: Path, weights: Mapping[str, Tensor], asked: tuple[str, int], changed: list[str]
) -> tuple[Path | None, int]:
    """The checkpoint to continue from, which has these weights, and its step; (None, 0) at the start.

    Args:
        resume: auto, force, or the path of a checkpoint.
        folder: of the run.
        weights: required of the checkpoint, by name and shape.
        asked: the option for the number of steps, and its value.
        changed: see `changes`.
    Raises: ValueError if the checkpoint is damaged, naming the previous one, or if nothing is left to train.
    """
    path = _checkpoint(resume, folder)
    step = 0 if path is None else steps_of(path, weights)
    option, steps = asked
    if step > steps or (changed and step == steps):
        what = f"with other settings ({'; '.join(changed)}) " if changed else ""
        raise ValueError(
            f"{path} already has {step} steps: {option}={steps} leaves nothing to train {what}on; ask for more steps, "
            "or choose another root="
        )
    return path, step


def _checkpoint(resume: str, folder: Path) -> Path | None:
    """The checkpoint `resume` if it belongs to this folder (not to another level), else the newest."""
    if resume not in WORDS and _is_of(Path(resume), folder):
        return check(Path(resume))
    complete = saved(folder / "checkpoints")
    return check(complete[0]) if complete else None


def note_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Save the settings of a starting or continuing run, once its checkpoint is accepted."""
    if first_process():
        write_json(folder / "settings.json", settings)
