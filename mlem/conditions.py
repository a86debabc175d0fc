"""Conditions: what networks are told of a sample beside x and t, such as its class or an embedding of its text.

A condition belongs to a sample, like its noise: users give a function of the index, and a batch gets its rows. A level
describes what it is told, name -> the number of classes, whose labels are 0 .. n - 1 and, for "no class", n; or the
shape of a row of numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor

__all__ = ["ConditionSource", "Conditions", "Described", "blank", "conditions_of", "described", "of_labels", "rows_of"]

Conditions: TypeAlias = dict[str, Tensor]
"""Name of an argument of the network -> (B, ...), a row for each sample."""

ConditionSource: TypeAlias = Callable[[Tensor], Mapping[str, Any]]
"""source(indices): indices (B,) int64 -> name -> (B, ...). Where levels are told different things, the name of a level
-> such a mapping of its own."""

Described: TypeAlias = dict[str, "int | tuple[int | None, ...]"]
"""Name -> number of classes, or shape of a row, None for any size, such as the number of tokens."""

_TOKENS = 77
"""What stands for any size where something is counted or timed: the tokens of CLIP."""


class _Level(Protocol):
    """What is known of a level that is told something."""

    @property
    def name(self) -> str: ...
    @property
    def conditions(self) -> Described: ...


def described(conditions: Mapping[str, Any] | None) -> Described:
    """A checked description. Raises ValueError unless it is names, with numbers of classes or shapes."""
    found: Described = {}
    for name, value in (conditions or {}).items():
        numbers = [value] if isinstance(value, int) else value
        whole = isinstance(numbers, Sequence) and all(
            n is None or (isinstance(n, int) and n > 0) for n in cast(Sequence[Any], numbers)
        )
        if not whole or isinstance(value, bool) or not str(name).isidentifier():
            raise ValueError(
                f"conditions[{name!r}] must be a number of classes or the shape of a row, such as 10 or (None, 768), "
                f"got {value!r}"
            )
        found[name] = value if isinstance(value, int) else tuple(value)
    return found


def blank(conditions: Described, rows: int, device: torch.device, dtype: torch.dtype) -> Conditions:
    """Conditions of no sample in particular, for counting and timing: first classes, and zeros."""
    return {
        name: torch.zeros(rows, dtype=torch.int64, device=device)
        if isinstance(value, int)
        else torch.zeros(rows, *(size or _TOKENS for size in value), device=device, dtype=dtype)
        for name, value in conditions.items()
    }


def of_labels(conditions: Described, batch: Mapping[str, Tensor]) -> Conditions:
    """What a level that is told classes, or nothing, is told of the images of a batch.

    Args:
        conditions: as the level describes them; where there is one class, it is that of every image.
        batch: of a data set, with "label" (B,) where images have labels.

    Raises:
        ValueError: images have no labels, or the level is told something else.
    """
    told: Conditions = {}
    for name, classes in conditions.items():
        if classes != 1 and (isinstance(classes, tuple) or "label" not in batch):
            raise ValueError(f"the network is told {name}, which the images of this data set do not have")
        told[name] = torch.zeros_like(batch["index"]) if classes == 1 else batch["label"]
    return told


def conditions_of(levels: Sequence[_Level], source: ConditionSource | None, indices: Tensor) -> list[Conditions]:
    """What each level is told of the samples with these indices.

    Args:
        levels: that are told.
        source: of the conditions. None: classes take turns, sample i being of class i modulo their number.
        indices: (B,), int64; conditions are put on their device.

    Raises:
        ValueError: a condition is missing, or no level is told it; it has other rows or another shape than its level
            says, or a label out of range.
    """
    if source is None:
        return [_in_turn(level, indices) for level in levels]
    given = source(indices)
    if not isinstance(given, Mapping):
        raise ValueError(f"conditions= must give a mapping, name -> tensor with a row for each index, got {given!r}")
    names = [level.name for level in levels]
    own = {name: value for name, value in given.items() if isinstance(value, Mapping)}
    common = {name: value for name, value in given.items() if name not in own}
    known = {name for level in levels for name in level.conditions}
    for name in common:
        if name not in known:
            told = ", ".join(sorted(known)) or "nothing beside x and t: Level(..., conditions={...}) says what"
            raise ValueError(f"conditions= gives {name!r}, but level {names[-1]} is told {told}")
    told = [{**common, **cast(Mapping[str, Any], own.get(level.name, {}))} for level in levels]
    return [
        {name: _checked(level.name, name, value, one, indices) for name, value in level.conditions.items()}
        for level, one in zip(levels, told, strict=True)
    ]


def rows_of(path: str | os.PathLike[str]) -> ConditionSource:
    """Conditions from a safetensors file: tensors NAME, or LEVEL/NAME, with rows that samples take in turn.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or a tensor has no rows.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"conditions={path} does not exist; it must be a safetensors file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"conditions={path} is not a whole safetensors file ({error})") from error
    for name, value in tensors.items():
        if not value.dim() or not len(value):
            raise ValueError(f"conditions={path}: {name} has no rows")

    def source(indices: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in tensors.items():
            rows = value[indices.cpu() % len(value)]
            level, _, condition = name.rpartition("/")
            (found.setdefault(level, {}) if level else found)[condition] = rows
        return found

    return source


def _in_turn(level: _Level, indices: Tensor) -> Conditions:
    for name, value in level.conditions.items():
        if not isinstance(value, int):
            raise ValueError(
                f"level {level.name} is told {name}, rows of shape {value}: pass conditions=, a function of the indices"
            )
    return {name: indices % value for name, value in level.conditions.items() if isinstance(value, int)}


def _checked(
    level: str, name: str, due: int | tuple[int | None, ...], given: Mapping[str, Any], indices: Tensor
) -> Tensor:
    """A condition of one level, on the device of the indices."""
    if name not in given:
        raise ValueError(
            f"level {level} is told {name}, which conditions= does not give; it gives {', '.join(given) or 'nothing'}"
        )
    value = torch.as_tensor(given[name])
    shape = (len(indices),) if isinstance(due, int) else (len(indices), *due)
    if value.dim() != len(shape) or any(size not in (None, own) for size, own in zip(shape, value.shape, strict=True)):
        raise ValueError(f"conditions[{name!r}] of level {level} must have shape {shape}, got {tuple(value.shape)}")
    if isinstance(due, int):
        if value.is_floating_point():
            raise ValueError(f"conditions[{name!r}] of level {level} must be whole numbers, got {value.dtype}")
        # a check on another device would make the host wait for it
        if value.device.type == "cpu" and len(value) and not 0 <= int(value.min()) <= int(value.max()) <= due:
            raise ValueError(
                f"conditions[{name!r}] of level {level} must be in [0, {due}], {due} for no class; got "
                f"{int(value.min())} to {int(value.max())}"
            )
        value = value.long()
    return value.to(indices.device)
