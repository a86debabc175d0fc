"""Data sets, one file each: a file that defines a `DataSet` is found by its name."""

from __future__ import annotations

import importlib
import pkgutil

from mlem.data.sources import DataSet

__all__ = ["DATASETS"]


def _dataset_in(module: str) -> type[DataSet]:
    """The one `DataSet` that a module defines."""
    found = [
        value
        for value in vars(importlib.import_module(module)).values()
        if isinstance(value, type) and issubclass(value, DataSet) and value.__module__ == module
    ]
    if len(found) != 1:
        raise TypeError(f"{module} must define one subclass of DataSet, found {len(found)}")
    return found[0]


DATASETS: dict[str, type[DataSet]] = {
    module.name: _dataset_in(f"{__name__}.{module.name}")
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name)
    if not module.name.startswith("_")
}
"""Name -> the dataclass of its options, in alphabetical order."""
