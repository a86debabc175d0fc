"""Preparing and opening data sets by name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlem.data.datasets import DATASETS
from mlem.data.options import Value, check_known, check_options, options_of
from mlem.data.shards.manifest import MANIFEST, Manifest, plain_folder, same_data
from mlem.data.shards.writing import write_shards
from mlem.data.sources import Source, Stored
from mlem.decoder import Decoder

if TYPE_CHECKING:
    from mlem.data.shards.reading import Shards

__all__ = ["SHARD_SIZE", "classes_of", "count_of", "decoder_of", "ensure", "make_source", "prepare", "size_of"]

SHARD_SIZE = 1000
"""Default number of images per shard."""


def make_source(name: str, **options: Value) -> Source | Stored:
    """Build the source of data set `name`, not opened.

    Raises:
        ValueError: a wrong name or option (suggests the nearest match), or a value of wrong type or out of range.
    """
    check_known("data set", name, DATASETS)
    check_options(name, DATASETS[name], options)
    return DATASETS[name](**options).build()


def prepare(
    name: str,
    out: str | os.PathLike[str],
    *,
    shard_size: int = SHARD_SIZE,
    workers: int = 1,
    progress: bool = True,
    wait: bool = False,
    **options: Value,
) -> int:
    """Prepare data set `name` in folder `out`; return how many images had to be made.

    Resumable, one call at a time, rejected if the folder holds other data: see `write_shards`.

    Args:
        name: of the data set.
        out: folder to write.
        shard_size: images per shard.
        workers: processes that prepare images.
        progress: whether to show a bar.
        wait: whether to wait for another call on the same folder instead of failing.
        options: of the data set.
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
        labels=source.labels,
        decoder=source.decoder,
        tolerance=source.tolerance,
        workers=workers,
        progress=progress,
        wait=wait,
    )


def ensure(name: str, folder: str | os.PathLike[str], *, progress: bool = True, **options: Value) -> Shards:
    """Open data set `name` in `folder`, preparing it first if missing; safe to call from several processes.

    Raises:
        ValueError: the folder holds other data than `options` describe, defaults included (names both sides); source
            files are compared only if they still exist.
    """
    made = make_source(name, **options)
    folder = plain_folder(folder)
    if not (folder / MANIFEST).is_file():
        prepare(name, folder, shard_size=SHARD_SIZE, workers=1, progress=progress, wait=True, **options)
    found = Manifest.read(folder / MANIFEST)
    if isinstance(made, Stored) and (made.path is None or not made.path.exists()):
        wanted = replace(found, name=name, shape=made.shape or found.shape, info=found.info | made.info)
    else:
        source = made.open()
        wanted = Manifest(name, found.shape, source.info, source.count, found.shard_size, classes=source.classes)
    same_data(folder, found, wanted, shard_size=False)
    from mlem.data.shards.reading import Shards

    return Shards.open(folder)


def count_of(name: str, folder: str | os.PathLike[str], **options: Value) -> int:
    """Number of images of data set `name`: in `folder` if prepared, else in its source."""
    made = make_source(name, **options)
    folder = plain_folder(folder)
    if isinstance(made, Stored) and (folder / MANIFEST).is_file():
        return Manifest.read(folder / MANIFEST).count
    return _opened(made, name, folder, options).count


def size_of(name: str, folder: str | os.PathLike[str], **options: Value) -> tuple[int, int, int]:
    """(C, H, W) of the images of data set `name`: from its source, or from `folder` if only the files know."""
    made = make_source(name, **options)
    folder = plain_folder(folder)
    if made.shape is None and (folder / MANIFEST).is_file():
        return Manifest.read(folder / MANIFEST).shape
    return made.shape or _opened(made, name, folder, options).shape


def decoder_of(name: str, folder: str | os.PathLike[str], **options: Value) -> Decoder | None:
    """The decoder of data set `name`, if it holds latents: the one in `folder`, else that of its options."""
    made = make_source(name, **options)
    folder = plain_folder(folder)
    if (folder / MANIFEST).is_file():
        found = Manifest.read(folder / MANIFEST)
        return Decoder.beside(folder, found.info["decoder"]) if found.latents else None
    return made.decoder


def classes_of(name: str, folder: str | os.PathLike[str], **options: Value) -> tuple[str, ...]:
    """Names of the classes of data set `name`: in `folder` if prepared, else in its source.

    Raises:
        ValueError: its images have no labels; the message says why.
    """
    made = make_source(name, **options)
    folder = plain_folder(folder)
    if (folder / MANIFEST).is_file():
        classes = Manifest.read(folder / MANIFEST).classes
        why = f"{folder} was prepared without labels"
        if isinstance(made, Source) and made.classes:
            why = f"{why}: make them with: python -m mlem.data {name} --out {folder}"
    else:
        classes = _opened(made, name, folder, options).classes
        why = f"data set {name} has no labels"
    if not classes:
        raise ValueError(why)
    return classes


def _opened(made: Source | Stored, name: str, folder: Path, given: dict[str, Value]) -> Source:
    """Open a source. ValueError gives the command to prepare it if the user did not say where it is."""
    if isinstance(made, Stored) and made.path is None:
        options = options_of(DATASETS[name])
        words = [options[key].written(value) for key, value in given.items() if value != options[key].default]
        raise ValueError(
            f"{folder} holds no data, and no source of {name} is given; prepare it: "
            + " ".join([f"python -m mlem.data {name} --source {made.usual} --out {folder}", *words])
        )
    return made.open()
