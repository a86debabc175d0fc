"""Preparing a data set: images in chunks -> WebDataset tar shards and a manifest, resumable, the same to the byte.

A shard appears whole or not at all; the manifest comes last. The images come from a function of the index range, so
shards that are already there are not made again, and memory does not grow with the data set.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from mlem.data.manifest import MANIFEST, UNFINISHED, Manifest, ShardRecord, plain_folder, same_data
from mlem.files import atomic_write, sha256

Images = Callable[[int, int], np.ndarray]

_CHUNK_BYTES = 4 * 2**20  # pixels asked from the source at a time


@dataclass(frozen=True)
class Source:
    """Images to be prepared: `images(start, stop)` gives (stop - start, H, W, C) uint8, C = 1 or 3.

    `info` holds the parameters that decide the pixels, seed included: two sources with the same `info` and `count`
    must give the same images, however the range is cut.
    """

    images: Images
    count: int
    info: dict[str, Any]


def write_shards(
    folder: str | os.PathLike[str],
    images: Images,
    *,
    name: str,
    info: dict[str, Any],
    total: int,
    shard_size: int,
    progress: bool = True,
    wait: bool = False,
) -> int:
    """Write images 0 .. total-1 into `folder` as shards of `shard_size` images; return how many had to be made.

    Shards that are already there and whole are kept, so an interrupted call goes on and a damaged shard is remade;
    the bytes do not depend on interruptions. One process at a time: a second one is refused, or with `wait` waits
    for the first. ValueError when the folder holds other data or an option is out of range.
    """
    if total < 1 or shard_size < 1:
        raise ValueError(f"count and shard_size must be >= 1, got {total} and {shard_size}")
    folder = plain_folder(folder)
    _, height, width, channels = _checked(images, 0, 1).shape
    wanted = Manifest(name, (channels, height, width), json.loads(json.dumps(info)), total, shard_size)
    with _lock(folder, wait):
        records = _finished(folder, wanted)
        kept = sum(record.count for record in records.values())
        with _bar(name, total, kept, progress) as advance:
            for number in range(-(-total // shard_size)):
                file = f"shard-{number:06d}.tar"
                if file not in records:
                    start = number * shard_size
                    stop = min(start + shard_size, total)
                    records[file] = _write_shard(folder / file, images, start, stop, wanted.shape, advance)
                    replace(wanted, shards=_in_order(records)).write(folder / UNFINISHED)
        replace(wanted, shards=_in_order(records)).write(folder / MANIFEST)
        (folder / UNFINISHED).unlink(missing_ok=True)
    return total - kept


def _in_order(records: dict[str, ShardRecord]) -> tuple[ShardRecord, ...]:
    return tuple(records[file] for file in sorted(records))


def _finished(folder: Path, wanted: Manifest) -> dict[str, ShardRecord]:
    """The shards in `folder` that can be kept, by file name; starts the unfinished manifest if there is none."""
    for leftover in folder.glob(".*.tmp"):  # of a killed preparation
        leftover.unlink()
    records = {}
    started = [folder / file for file in (UNFINISHED, MANIFEST) if (folder / file).exists()]
    for path in started:
        found = Manifest.read(path)
        same_data(folder, found, wanted, shard_size=True)
        records |= {record.file: record for record in found.shards}
    if not started:
        if foreign := sorted(folder.glob("*.tar")):
            raise ValueError(f"{folder} holds {foreign[0].name} but no {MANIFEST}; choose an empty folder")
        wanted.write(folder / UNFINISHED)
    return {file: record for file, record in records.items() if _whole(folder / file, record)}


def _whole(path: Path, record: ShardRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.bytes and sha256(path) == record.sha256


def _write_shard(
    path: Path, images: Images, start: int, stop: int, shape: tuple[int, int, int], advance: Callable[[int], None]
) -> ShardRecord:
    from webdataset.writer import TarWriter

    chunk = max(1, _CHUNK_BYTES // int(np.prod(shape)))
    with (
        atomic_write(path) as file,
        TarWriter(
            cast(BinaryIO, file), user="mlem", group="mlem", mtime=0, encoder=False, format=tarfile.USTAR_FORMAT
        ) as tar,
    ):
        for first in range(start, stop, chunk):
            last = min(first + chunk, stop)
            for i, pixels in enumerate(_checked(images, first, last, shape), start=first):
                tar.write({"__key__": f"{i:08d}", "png": _png(pixels)})
            advance(last - first)
    return ShardRecord(path.name, stop - start, path.stat().st_size, sha256(path))


def _checked(images: Images, start: int, stop: int, shape: tuple[int, int, int] | None = None) -> np.ndarray:
    """`images(start, stop)`, checked: (stop - start, H, W, C) uint8, with `shape` (C, H, W) if that is given."""
    batch = images(start, stop)
    if batch.dtype != np.uint8 or batch.ndim != 4 or len(batch) != stop - start or batch.shape[-1] not in (1, 3):
        raise ValueError(
            f"images({start}, {stop}) must give uint8 ({stop - start}, H, W, 1 or 3), got {batch.dtype} {batch.shape}"
        )
    if shape is not None and batch.shape[1:] != (shape[1], shape[2], shape[0]):
        raise ValueError(f"images({start}, {stop}) has shape {batch.shape}, the first image was (C, H, W) = {shape}")
    return batch


def _png(pixels: np.ndarray) -> bytes:
    """(H, W, C) uint8 as the bytes of a lossless PNG without any metadata."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


@contextmanager
def _lock(folder: Path, wait: bool) -> Iterator[None]:
    """Hold the folder's preparation lock; the system frees it however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is being prepared by another process; wait for it to end") from None
        yield


class _SpeedColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "", style="progress.data.speed")


@contextmanager
def _bar(name: str, total: int, done: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; gives the function that advances it by a number of images."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _SpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(name, total=total, completed=done)
        yield lambda count: bar.advance(task, count)
