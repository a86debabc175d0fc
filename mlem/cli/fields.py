"""What the classes of the schema are made of: fields that are options, and fields that are groups of them."""

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
        kind: what its value must be.
        words: what it means.
        default: none where the choices in `configs/` give it.
        unused: the choices of `eval` that do nothing with it, and refuse it.
        name: where the option is not named as the field is.
    """
    metadata = {"kind": kind, "help": words, "unused": unused, "name": name}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def group(*classes: type, words: str = "", default: Any = MISSING) -> Any:
    """A field that is a group of options, of one of these classes."""
    metadata = {"classes": classes, "help": words}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)
