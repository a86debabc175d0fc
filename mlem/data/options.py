"""The options of a data set, read from the fields of its dataclass: type, default, help."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from mlem.data.sources import DataSet

__all__ = ["Option", "Value", "check_known", "check_options", "description_of", "options_of"]

Value = str | int | float | bool | os.PathLike[str] | None
"""What an option may hold."""

_KINDS = (int, float, str, bool)
_WIDER: dict[type, tuple[type, ...]] = {float: (int,), str: (os.PathLike,)}


@dataclass(frozen=True)
class Option:
    """One option of a data set.

    Args:
        name: as in Python; with hyphens on the command line.
        kind: the type of a value other than null.
        optional: whether null is allowed.
        default: the default value, or `dataclasses.MISSING` if required.
        help: one line.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    help: str

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is dataclasses.MISSING

    @property
    def flag(self) -> str:
        """Its spelling on the command line."""
        return f"--{self.name.replace('_', '-')}"

    def written(self, value: Any) -> str:
        """The command-line words that set it to `value`."""
        if isinstance(value, bool):
            return self.flag if value else self.flag.replace("--", "--no-", 1)
        return f"{self.flag} {value}"

    def check(self, value: Any) -> None:
        """Raise ValueError unless `value` is of the option's type; an int may stand for a float, a path for a str."""
        admitted = (self.kind, *_WIDER.get(self.kind, ()), *((type(None),) if self.optional else ()))
        if not isinstance(value, admitted) or (isinstance(value, bool) and self.kind is not bool):
            names = self.kind.__name__ + (" or null" if self.optional else "")
            raise ValueError(f"{self.name} must be of type {names}, got {value!r}")


def options_of(dataset: type[DataSet]) -> dict[str, Option]:
    """The options of a data set by name, in the order of its fields.

    Raises TypeError for a class that is not a dataclass, or a field of a type that `DataSet` does not allow.
    """
    if not dataclasses.is_dataclass(dataset):
        raise TypeError(f"{dataset.__name__} must be a dataclass: put @dataclass(frozen=True) above it")
    hints, texts = get_type_hints(dataset), _arguments(dataset)
    found = {}
    for field in dataclasses.fields(dataset):
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        plain = [kind for kind in kinds if kind is not type(None)]
        if len(plain) != 1 or plain[0] not in _KINDS:
            raise TypeError(f"{dataset.__name__}.{field.name} must be int, float, str or bool, or one of them | None")
        optional = len(kinds) > 1
        found[field.name] = Option(field.name, plain[0], optional, field.default, texts.get(field.name, ""))
    return found


def check_options(name: str, dataset: type[DataSet], given: Mapping[str, Value]) -> None:
    """Raise ValueError for an unknown option of data set `name` (suggesting the nearest), or a wrong type."""
    options = options_of(dataset)
    for option, value in given.items():
        check_known(f"option of {name}", option, options)
        options[option].check(value)


def check_known(what: str, name: str, names: Iterable[str]) -> None:
    """Raise ValueError, with the nearest match, unless `name` is one of `names`."""
    if name not in (known := list(names)):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(known) or 'none'}"
        raise ValueError(f"unknown {what} {name!r}; {hint}")


def description_of(dataset: type[DataSet]) -> str:
    """The first line of the class docstring."""
    return (inspect.getdoc(dataset) or "").partition("\n")[0]


def _arguments(dataset: type[DataSet]) -> dict[str, str]:
    """`name: text` of each entry under `Args:` in the class docstring; indented lines continue the entry above."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", inspect.getdoc(dataset) or "", re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
