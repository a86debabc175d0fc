"""Lightning callbacks named in a config: the only entries built by name, and only from allowed modules."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["build_callbacks", "refuse_targets"]

ALLOWED = ("mlem", "torch", "lightning", "torchmetrics", "diffusers")
"""Modules from which a `_target_` may come."""


def refuse_targets(plain: dict[str, Any]) -> None:
    """Raise ValueError for a `_target_` anywhere but in `callbacks`, or from a module that is not allowed."""
    more = plain.get("allow")
    allowed = (*ALLOWED, *(more if isinstance(more, list) else ()))
    for place, target in _targets(plain):
        if not re.fullmatch(r"callbacks\[\d+\]", place):
            raise ValueError(f"{place}._target_={target}: only entries of callbacks are built by name; leave it out")
        package = str(target).split(".")[0]
        if package not in allowed:
            raise ValueError(
                f"{place}._target_={target} is not from {', '.join(allowed)}; if you trust it, add allow=[{package}]"
            )


def _targets(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield place, node["_target_"]
        for key, value in node.items():
            yield from _targets(value, f"{place}.{key}" if place else str(key))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _targets(value, f"{place}[{number}]")


def build_callbacks(entries: Sequence[Any], allow: Sequence[str] = ()) -> list[Any]:
    """The Lightning callbacks named by these entries of `callbacks`.

    Args:
        entries: each {_target_: module.Class, option: value}.
        allow: further modules from which a class may come.
    Raises: ValueError for anything but a Callback class, or for options that it does not take.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback

    refuse_targets({"callbacks": list(entries), "allow": list(allow)})
    built = []
    for entry in entries:
        if not isinstance(entry, dict) or "_target_" not in entry:
            raise ValueError(f"callbacks: an entry must be {{_target_: module.Class, option: value}}, got {entry}")
        target, options = str(entry["_target_"]), {key: value for key, value in entry.items() if key != "_target_"}
        module, _, name = target.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name, None)
        except (ImportError, ValueError) as error:
            raise ValueError(f"callbacks: cannot import {target} ({error}); correct the name") from error
        if not (inspect.isclass(found) and issubclass(found, Callback)):
            raise ValueError(f"callbacks: {target} is not a Lightning Callback class; correct the name")
        try:
            built.append(found(**options))
        except (TypeError, MisconfigurationException) as error:
            raise ValueError(f"callbacks: {target}: {error}") from error
    return built
