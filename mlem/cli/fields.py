"""The fields of schema classes: options, and groups of options."""

from __future__ import annotations

import copy
from dataclasses import MISSING, field
from typing import Any

from mlem.cli.values import Kind

__all__ = ["group", "option"]


def option(
    kind: Kind, words: str = "", default: Any = MISSING, unused: tuple[str, ...] = (), name: str | None = None
) -> Any:
    """A field that is an option.

    Args:
        kind: of its value.
        words: the help text.
        default: missing if the choices in `configs/` give it.
        unused: the choices of `eval` that do not use it and reject it.
        name: of the option, if different from the field's.
    """
    metadata = {"kind": kind, "help": words, "unused": unused, "name": name}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def group(*classes: type, words: str = "", default: Any = MISSING) -> Any:
    """A field that is a group of options of one of these classes."""
    metadata = {"classes": classes, "help": words}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)
