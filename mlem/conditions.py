"""Conditions: what networks take besides x and t, such as a class or a text embedding.

A condition belongs to a sample, like its noise: users pass a function of the index, and a batch gets its rows. A level
describes its conditions as name -> number of classes n, with labels 0 .. n - 1 and n for "no class", or name -> shape
of a row of numbers.
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
"""Argument of the network -> (B, ...), one row per sample."""

ConditionSource: TypeAlias = Callable[[Tensor], Mapping[str, Any]]
"""source(indices): indices (B,) int64 -> name -> (B, ...); or, where levels take different conditions, name of a
level -> such a mapping."""

Described: TypeAlias = dict[str, "int | tuple[int | None, ...]"]
"""Name -> number of classes, or shape of a row, with None for any size, such as the number of tokens."""

_TOKENS = 77
"""Stands for any size in counts and timings: the tokens of CLIP."""


class _Level(Protocol):
    """A level that takes conditions."""

    @property
    def name(self) -> str: ...
    @property
    def conditions(self) -> Described: ...


def described(conditions: Mapping[str, Any] | None) -> Described:
    """The checked description. Raises ValueError unless it maps names to numbers of classes or shapes."""
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
    """Placeholder conditions for counting and timing: first classes, and zeros."""
    return {
        name: torch.zeros(rows, dtype=torch.int64, device=device)
        if isinstance(value, int)
        else torch.zeros(rows, *(size or _TOKENS for size in value), device=device, dtype=dtype)
        for name, value in conditions.items()
    }


def of_labels(conditions: Described, batch: Mapping[str, Tensor]) -> Conditions:
    """Conditions of the images of a batch, for a level that takes classes or nothing.

    Args:
        conditions: as the level describes them; a single class applies to every image.
        batch: from a data set, with "label" (B,) if images have labels.

    Raises:
        ValueError: images have no labels, or the level takes something else.
    """
    told: Conditions = {}
    for name, classes in conditions.items():
        if classes != 1 and (isinstance(classes, tuple) or "label" not in batch):
            raise ValueError(f"the network takes {name}, which the images of this data set do not have")
        told[name] = torch.zeros_like(batch["index"]) if classes == 1 else batch["label"]
    return told


def conditions_of(levels: Sequence[_Level], source: ConditionSource | None, indices: Tensor) -> list[Conditions]:
    """Conditions of each level for the samples with these indices.

    Args:
        levels: in order.
        source: of the conditions. None: sample i has class i modulo the number of classes.
        indices: (B,), int64; conditions are moved to their device.

    Raises:
        ValueError: a condition is missing or no level takes it, it has the wrong number of rows or shape, or a label is
            out of range.
    """
    if source is None:
        return [_in_turn(level, indices) for level in levels]
    given = source(indices)
    if not isinstance(given, Mapping):
        raise ValueError(f"conditions= must return a mapping, name -> tensor with one row per index, got {given!r}")
    names = [level.name for level in levels]
    own = {name: value for name, value in given.items() if isinstance(value, Mapping)}
    common = {name: value for name, value in given.items() if name not in own}
    known = {name for level in levels for name in level.conditions}
    for name in common:
        if name not in known:
            told = ", ".join(sorted(known)) or "nothing besides x and t; declare it: Level(..., conditions={...})"
            raise ValueError(f"conditions= gives {name!r}, but level {names[-1]} takes {told}")
    told = [{**common, **cast(Mapping[str, Any], own.get(level.name, {}))} for level in levels]
    return [
        {name: _checked(level.name, name, value, one, indices) for name, value in level.conditions.items()}
        for level, one in zip(levels, told, strict=True)
    ]


def rows_of(path: str | os.PathLike[str]) -> ConditionSource:
    """Conditions from a safetensors file: tensors NAME, or LEVEL/NAME, whose rows samples use in turn.

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
                f"level {level.name} takes {name}, rows of shape {value}: pass conditions=, a function of the indices"
            )
    return {name: indices % value for name, value in level.conditions.items() if isinstance(value, int)}


def _checked(
    level: str, name: str, due: int | tuple[int | None, ...], given: Mapping[str, Any], indices: Tensor
) -> Tensor:
    """A condition of one level, on the device of the indices."""
    if name not in given:
        raise ValueError(
            f"level {level} takes {name}, which conditions= does not give; it gives {', '.join(given) or 'nothing'}"
        )
    value = torch.as_tensor(given[name])
    shape = (len(indices),) if isinstance(due, int) else (len(indices), *due)
    if value.dim() != len(shape) or any(size not in (None, own) for size, own in zip(shape, value.shape, strict=True)):
        raise ValueError(f"conditions[{name!r}] of level {level} must have shape {shape}, got {tuple(value.shape)}")
    if isinstance(due, int):
        if value.is_floating_point():
            raise ValueError(f"conditions[{name!r}] of level {level} must be whole numbers, got {value.dtype}")
        # checking on another device would make the host wait for it
        if value.device.type == "cpu" and len(value) and not 0 <= int(value.min()) <= int(value.max()) <= due:
            raise ValueError(
                f"conditions[{name!r}] of level {level} must be in [0, {due}], {due} meaning no class; got "
                f"{int(value.min())} to {int(value.max())}"
            )
        value = value.long()
    return value.to(indices.device)
