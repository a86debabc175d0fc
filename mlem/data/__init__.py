"""Data: preparing sets of images as verified WebDataset shards, and reading them for training.

    python -m mlem.data digits --out data/digits

A data set is a module of this package with a function `source(**options) -> Source`; adding the file is enough.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable
from typing import Any

os.environ["WDS_SECURE"] = "1"  # before any import of webdataset: it would run `pipe:` addresses in a shell

from mlem.data.loading import Batch, BatchSource, held_out_batches, train_loader
from mlem.data.manifest import MANIFEST, Manifest, plain_folder, same_data
from mlem.data.shards import Shards
from mlem.data.writing import Source, write_shards

__all__ = [
    "DATASETS",
    "SHARD_SIZE",
    "Batch",
    "BatchSource",
    "Shards",
    "Source",
    "ensure",
    "held_out_batches",
    "make_source",
    "prepare",
    "train_loader",
    "write_shards",
]

SHARD_SIZE = 1000


def _discover() -> dict[str, Callable[..., Source]]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module.source for name, module in modules.items() if hasattr(module, "source")}


#: name -> the function that makes its Source from its options
DATASETS: dict[str, Callable[..., Source]] = _discover()


def make_source(name: str, **options: Any) -> Source:
    """The source of data set `name`. ValueError gives the nearest match of a wrong name or option."""
    _known("data set", name, DATASETS)
    for option in options:
        _known(f"option of {name}", option, inspect.signature(DATASETS[name]).parameters)
    return DATASETS[name](**options)


def prepare(
    name: str,
    out: str | os.PathLike[str],
    *,
    shard_size: int = SHARD_SIZE,
    progress: bool = True,
    wait: bool = False,
    **options: Any,
) -> int:
    """Prepare data set `name` in folder `out`; return the number of images that had to be made.

    Resumable, one process at a time, refused where the folder holds other data: see `write_shards`.
    """
    source = make_source(name, **options)
    info, total = source.info, source.count
    return write_shards(
        out, source.images, name=name, info=info, total=total, shard_size=shard_size, progress=progress, wait=wait
    )


def ensure(name: str, folder: str | os.PathLike[str], *, progress: bool = True, **options: Any) -> Shards:
    """Open data set `name` in `folder`, preparing it first if it is not there; processes may call this together.

    ValueError names both sides when the folder holds other data than `options` describe (defaults included).
    """
    source = make_source(name, **options)
    folder = plain_folder(folder)
    if not (folder / MANIFEST).is_file():
        prepare(name, folder, progress=progress, wait=True, **options)
    found = Manifest.read(folder / MANIFEST)
    wanted = Manifest(name, found.shape, source.info, source.count, found.shard_size)
    same_data(folder, found, wanted, shard_size=False)
    return Shards.open(folder)


def _known(what: str, name: str, names: Any) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(names) or 'none'}"
        raise ValueError(f"unknown {what} {name!r}; {hint}")
