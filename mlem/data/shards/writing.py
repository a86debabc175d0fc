"""Preparing a data set: images in chunks -> WebDataset tar shards and a manifest, resumable, reproducible bytewise.

A shard appears whole or not at all; the manifest comes last. Images come from a function of the index range, so
existing shards are not made again, and memory does not grow with the data set.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from mlem.data.shards.arrays import MEMBER, array_bytes
from mlem.data.shards.manifest import MANIFEST, UNFINISHED, Manifest, ShardRecord, plain_folder, same_data
from mlem.data.shards.parallel import in_order
from mlem.data.sources import Images, Labels, checked, shape_of
from mlem.files import atomic_write, sha256, writing

if TYPE_CHECKING:
    from mlem.decoder import Decoder

__all__ = ["write_shards"]

_CHUNK = 64  # images taken from the source at once
_MOST = 10**8  # images; the list of chunks is in memory
_CHUNK_BYTES = 4 * 2**20  # limit on the pixels of a chunk

_Encoded = tuple[dict[str, bytes], dict[str, str]]
"""PNGs, or arrays, by key; file and fault, by key, of images left out."""


def write_shards(
    folder: str | os.PathLike[str],
    images: Images,
    *,
    name: str,
    info: dict[str, Any],
    total: int,
    shard_size: int,
    shape: tuple[int, int, int] | None = None,
    labels: Labels | None = None,
    tolerance: int = 0,
    decoder: Decoder | None = None,
    workers: int = 1,
    progress: bool = True,
    wait: bool = False,
) -> int:
    """Write images 0 .. total-1 into `folder` as shards; return how many had to be made.

    Complete existing shards are kept, so an interrupted call continues; damaged shards, and (with a message) shards
    written without their labels, are remade. The bytes depend neither on interruptions nor on the number of processes.

    Args:
        folder: to write; one call at a time.
        images: as in `Source`.
        name: of the data set.
        info: everything that determines the pixels; a folder with other data is rejected.
        total: number of images.
        shard_size: images per shard.
        shape: (C, H, W); None: that of image 0.
        labels: the classes of all images; None: they have no labels.
        tolerance: how many images may be unreadable; they are left out and listed in the manifest.
        decoder: of latents, stored beside them; None: for images.
        workers: processes that call `images`.
        progress: whether to show a bar.
        wait: whether to wait for another call on this folder instead of failing.

    Raises:
        ValueError: the folder holds other data or is in use, an option is out of range, or too many images cannot be
            read.
    """
    if total < 1 or shard_size < 1:
        raise ValueError(f"count and shard_size must be >= 1, got {total} and {shard_size}")
    if total > _MOST:
        raise ValueError(f"count must be at most {_MOST}, got {total}")
    if workers < 1:
        raise ValueError(f"workers must be >= 1, got {workers}")
    folder = plain_folder(folder)
    classes = () if labels is None else labels.names
    shape, info = shape or shape_of(images), json.loads(json.dumps(info))
    latents = {} if decoder is None else decoder.latents
    wanted = Manifest(name, shape, info, total, shard_size, classes=classes, latents=latents)
    with _lock(folder, wait):
        state = _finished(folder, wanted)
        if decoder is not None:
            decoder.save(folder / "decoder")
        there = {record.file: record.count for record in state.shards}
        shards = [_chunks(start, wanted) for start in range(0, total, shard_size)]
        shards = [chunks for chunks in shards if _file_of(chunks[0][0], wanted) not in there]
        todo = sum(stop - start for chunks in shards for start, stop in chunks)
        _tolerate(state, tolerance)
        with (
            _bar(name, total, total - todo, progress) as advance,
            closing(in_order(partial(_encode, images, wanted.shape), chain(*shards), workers)) as encoded,
        ):
            for chunks in shards:
                state = _write_shard(folder, state, chunks, encoded, labels, tolerance, advance)
                state.write(folder / UNFINISHED)
        state.write(folder / MANIFEST)
        (folder / UNFINISHED).unlink(missing_ok=True)
    return state.count - sum(there.values())


def _file_of(i: int, manifest: Manifest) -> str:
    """The shard that holds image `i` of the source."""
    return f"shard-{i // manifest.shard_size:06d}.tar"


def _key(i: int) -> str:
    return f"{i:08d}"


def _chunks(start: int, manifest: Manifest) -> list[tuple[int, int]]:
    """The shard that begins with image `start`, in ranges (first, last + 1) that are encoded at once."""
    step = min(_CHUNK, max(1, _CHUNK_BYTES // int(np.prod(manifest.shape))))
    stop = min(start + manifest.shard_size, manifest.total)
    return [(first, min(first + step, stop)) for first in range(start, stop, step)]


def _finished(folder: Path, wanted: Manifest) -> Manifest:
    """`wanted` with the shards in `folder` that can be kept; starts the unfinished manifest if there is none.

    Shards without the wanted labels are not kept: their manifests are removed, with a message.
    """
    for leftover in folder.glob(".*.tmp"):  # left by a killed preparation
        leftover.unlink()
    records: dict[str, ShardRecord] = {}
    left_out: dict[str, str] = {}
    started = [folder / file for file in (UNFINISHED, MANIFEST) if (folder / file).exists()]
    if not started and (foreign := sorted(folder.glob("*.tar"))):
        raise ValueError(f"{folder} holds {foreign[0].name} but no {MANIFEST}; choose an empty folder")
    for path in [*started]:
        found = Manifest.read(path)
        same_data(folder, found, wanted, shard_size=True)
        if found.classes != wanted.classes:
            print(f"{folder} was prepared without labels: its shards are made again, with labels", file=sys.stderr)
            path.unlink()
            started.remove(path)
            continue
        records |= {record.file: record for record in found.shards}
        left_out |= found.left_out
    if not started:
        wanted.write(folder / UNFINISHED)
    state = wanted
    size = wanted.shard_size
    sizes = {_file_of(i, wanted): min(size, wanted.total - i) for i in range(0, wanted.total, size)}
    for record in records.values():
        faults = {key: why for key, why in left_out.items() if _file_of(int(key), wanted) == record.file}
        due = sizes.get(record.file, 0) - len(faults)
        if record.count == due and _whole(folder / record.file, record):
            state = _with_shard(state, record, faults)
    return state


def _whole(path: Path, record: ShardRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.bytes and sha256(path) == record.sha256


def _with_shard(state: Manifest, record: ShardRecord, left_out: dict[str, str]) -> Manifest:
    shards = sorted([*state.shards, record], key=lambda one: one.file)
    together = dict(sorted((state.left_out | left_out).items()))
    return replace(state, shards=tuple(shards), left_out=together, count=state.total - len(together))


def _write_shard(
    folder: Path,
    state: Manifest,
    chunks: list[tuple[int, int]],
    encoded: Iterable[_Encoded],
    labels: Labels | None,
    tolerance: int,
    advance: Callable[[int], None],
) -> Manifest:
    """Write the shard of `chunks`, whose images come next in `encoded`; return `state` with it."""
    path = folder / _file_of(chunks[0][0], state)
    count, left_out = 0, {}
    with _tar(path) as write:
        kind = MEMBER if state.latents else "png"
        for (first, last), (members, faults) in zip(chunks, encoded, strict=False):
            left_out |= faults
            _tolerate(replace(state, left_out=state.left_out | left_out, count=state.count - len(left_out)), tolerance)
            cls = {} if labels is None else _members(labels, first, last)
            for key, member in members.items():
                write({"__key__": key, kind: member} | cls.get(key, {}))
            count += len(members)
            advance(last - first)
    return _with_shard(state, ShardRecord(path.name, count, path.stat().st_size, sha256(path)), left_out)


def _members(labels: Labels, start: int, stop: int) -> dict[str, dict[str, bytes]]:
    """Key -> the member with the label of an image, named as in WebDataset."""
    values = labels.checked(start, stop)
    return {_key(i): {"cls": b"%d" % value} for i, value in enumerate(values, start)}


def _tolerate(state: Manifest, tolerance: int) -> None:
    """Raise ValueError if more than `tolerance` images had to be left out."""
    if (broken := len(state.left_out)) > tolerance:
        named = "; ".join(list(state.left_out.values())[:3])
        more = f"; and {broken - 3} more" if broken > 3 else ""
        raise ValueError(
            f"{broken} broken of {state.total} images, {tolerance} allowed: {named}{more}; repair or remove them, "
            "or allow a share with --max-broken"
        )


@contextmanager
def _tar(path: Path) -> Generator[Callable[[dict[str, Any]], Any], None, None]:
    """The function that adds a sample to the shard `path`, which appears when the block ends without an error."""
    from webdataset.writer import TarWriter

    with (
        atomic_write(path) as file,
        TarWriter(
            cast(BinaryIO, file), user="mlem", group="mlem", mtime=0, encoder=False, format=tarfile.USTAR_FORMAT
        ) as tar,
    ):
        yield tar.write


def _encode(images: Images, shape: tuple[int, int, int], start: int, stop: int) -> _Encoded:
    pixels, left_out = checked(images, start, stop, shape)
    keys = [_key(i) for i in range(start, stop) if i not in left_out]
    encode = array_bytes if pixels.ndim == 5 else _png
    return dict(zip(keys, map(encode, pixels), strict=True)), {_key(i): why for i, why in left_out.items()}


def _png(pixels: np.ndarray) -> bytes:
    """(H, W, C) uint8 as the bytes of a lossless PNG without any metadata."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


@contextmanager
def _lock(folder: Path, wait: bool) -> Generator[None, None, None]:
    """Hold the folder's preparation lock; the system releases it however the process ends."""
    with writing(folder / ".lock"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
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
def _bar(name: str, total: int, done: int, shown: bool) -> Generator[Callable[[int], None], None, None]:
    """A progress bar on stderr; yields the function that advances it by a number of images."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _SpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(name, total=total, completed=done)
        yield lambda count: bar.advance(task, count)
