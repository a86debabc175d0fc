"""Data: preparing sets of images as verified WebDataset shards, and reading them for training.

    python -m mlem.data digits --out data/digits

A data set is a module of this package with a function `source(**options)` that returns a `Source`, or a `Stored` one
that must be opened first; adding the file is enough.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

os.environ["WDS_SECURE"] = "1"  # before any import of webdataset: it would run `pipe:` addresses in a shell

from mlem.data.manifest import MANIFEST, Manifest, plain_folder, same_data
from mlem.data.sources import Source, Stored
from mlem.data.writing import write_shards

if TYPE_CHECKING:
    from mlem.data.loading import Batch as Batch
    from mlem.data.loading import BatchSource as BatchSource
    from mlem.data.loading import held_out_batches as held_out_batches
    from mlem.data.loading import train_loader as train_loader
    from mlem.data.shards import Shards as Shards

__all__ = [
    "DATASETS",
    "SHARD_SIZE",
    "Batch",
    "BatchSource",
    "Shards",
    "Source",
    "Stored",
    "count_of",
    "ensure",
    "held_out_batches",
    "make_source",
    "prepare",
    "train_loader",
    "write_shards",
]

SHARD_SIZE = 1000
_HOMES = {
    "Batch": "loading",
    "BatchSource": "loading",
    "Shards": "shards",
    "held_out_batches": "loading",
    "train_loader": "loading",
}


def __getattr__(name: str) -> object:
    # torch takes seconds to import, which the processes that prepare images need not wait for
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def _discover() -> dict[str, Callable[..., Source | Stored]]:
    names = sorted({module.name for module in pkgutil.iter_modules(__path__)} - {"__main__", *_HOMES.values()})
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module.source for name, module in modules.items() if hasattr(module, "source")}


#: name -> the function that makes its Source from its options
DATASETS: dict[str, Callable[..., Source | Stored]] = _discover()


def make_source(name: str, **options: Any) -> Source | Stored:
    """The source of data set `name`, not opened.

    ValueError gives the nearest match of a wrong name or option, and names an option that is of another type.
    """
    _known("data set", name, DATASETS)
    parameters = inspect.signature(DATASETS[name], eval_str=True).parameters
    for option, value in options.items():
        _known(f"option of {name}", option, parameters)
        _check_type(option, value, get_args(parameters[option].annotation)[0])
    return DATASETS[name](**options)


def prepare(
    name: str,
    out: str | os.PathLike[str],
    *,
    shard_size: int = SHARD_SIZE,
    workers: int = 1,
    progress: bool = True,
    wait: bool = False,
    **options: Any,
) -> int:
    """Prepare data set `name` in folder `out` with `workers` processes; return how many images had to be made.

    Resumable, one call at a time, refused where the folder holds other data: see `write_shards`.
    """
    out = plain_folder(out)
    made = make_source(name, **options)
    source = _opened(made, name, out, options)
    return write_shards(
        out,
        source.images,
        name=name,
        info=source.info,
        total=source.count,
        shard_size=shard_size,
        shape=made.shape,
        tolerance=source.tolerance,
        workers=workers,
        progress=progress,
        wait=wait,
    )


def ensure(name: str, folder: str | os.PathLike[str], *, progress: bool = True, **options: Any) -> Shards:
    """Open data set `name` in `folder`, preparing it first if it is not there; processes may call this together.

    ValueError names both sides when the folder holds other data than `options` describe (defaults included); files
    that were the source are compared if they are still there, and need not be.
    """
    made = make_source(name, **options)
    folder = plain_folder(folder)
    if not (folder / MANIFEST).is_file():
        prepare(name, folder, progress=progress, wait=True, **options)
    found = Manifest.read(folder / MANIFEST)
    if isinstance(made, Stored) and (made.path is None or not made.path.exists()):
        wanted = replace(found, name=name, shape=made.shape, info=found.info | made.info)
    else:
        source = made.open()
        wanted = Manifest(name, found.shape, source.info, source.count, found.shard_size)
    same_data(folder, found, wanted, shard_size=False)
    from mlem.data.shards import Shards

    return Shards.open(folder)


def count_of(name: str, folder: str | os.PathLike[str], **options: Any) -> int:
    """How many images data set `name` has: those in `folder` where it is prepared, else those of its source."""
    made = make_source(name, **options)
    folder = plain_folder(folder)
    if isinstance(made, Stored) and (folder / MANIFEST).is_file():
        return Manifest.read(folder / MANIFEST).count
    return _opened(made, name, folder, options).count


def _opened(made: Source | Stored, name: str, folder: Path, options: dict[str, Any]) -> Source:
    """Open a source. ValueError gives the command to prepare it when the user did not say where it is."""
    if isinstance(made, Stored) and made.path is None:
        usual = {key: option.default for key, option in inspect.signature(DATASETS[name]).parameters.items()}
        given = "".join(f" {_flag(key, value)}" for key, value in options.items() if value != usual[key])
        raise ValueError(
            f"{folder} holds no data, and where {name} comes from is not said; prepare it: "
            f"python -m mlem.data {name} --source {made.usual} --out {folder}{given}"
        )
    return made.open()


def _flag(option: str, value: Any) -> str:
    name = option.replace("_", "-")
    return f"--{name} {value}" if not isinstance(value, bool) else f"--{name}" if value else f"--no-{name}"


def _check_type(option: str, value: Any, annotation: Any) -> None:
    kinds = get_args(annotation) or (annotation,)
    wider = {float: (int,), str: (os.PathLike,)}
    admitted = (*kinds, *(more for kind in kinds for more in wider.get(kind, ())))
    if not isinstance(value, admitted) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{option} must be of type {names}, got {value!r}")


def _known(what: str, name: str, names: Any) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(names) or 'none'}"
        raise ValueError(f"unknown {what} {name!r}; {hint}")
