"""Reading a prepared data set: every shard is verified before the first image is used, then read by random access.

Plain sequential tar reading ends cleanly at about a third of all truncation points, so a damaged shard would silently
shorten the epoch. Here bytes, SHA-256 and count are compared with the manifest first, and nothing is ever unpacked or
unpickled: members are pixels, or latents (`.npy`, float16) if the manifest says so, labels (`.cls`, a whole number as
text) if it names classes, or small side files that are ignored.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlem.data.pictures import SUFFIXES as IMAGE_SUFFIXES
from mlem.data.pictures import opened
from mlem.data.shards import order
from mlem.data.shards.arrays import MEMBER, array_of
from mlem.data.shards.manifest import MANIFEST, UNFINISHED, Manifest, ShardRecord, plain_folder
from mlem.decoder import Decoder
from mlem.files import atomic_write, sha256
from mlem.noise import NoiseStream

__all__ = ["SUFFIXES", "Shards", "decode"]

SUFFIXES = (*IMAGE_SUFFIXES, "json", "txt", "cls")
_INDEX = ".index.npz"  # result of a verification, with the sizes and times of the files
_OPEN_FILES = 32
_LABEL_BYTES = 16
_KEPT_BYTES = 64 * 2**20
"""Data sets up to this size, decoded, stay in memory as they are read."""
_REMEDY = "prepare the data set again: only damaged shards are remade"


class Shards:
    """A verified data set with random access; make one with `Shards.open`.

    Can be pickled and forked: files are opened on first use and read by position.
    """

    def __init__(self, folder: Path, manifest: Manifest, index: dict[str, np.ndarray]) -> None:
        self._files: dict[int, int] = {}
        self._kept: dict[int, np.ndarray] = {}
        self.folder = folder
        self.manifest = manifest
        self._index = index
        #: (len(self),) the shard that holds each image
        self.shard_of = np.repeat(np.arange(len(manifest.shards)), [record.count for record in manifest.shards])

    @classmethod
    def open(cls, folder: str | os.PathLike[str], verify: bool = True) -> Shards:
        """Open the data set in `folder`, which must be a plain path.

        Each shard's bytes, SHA-256 and count are compared with the manifest, and its members with the rules in
        `_scan`. A successful verification is cached beside the shards (if writable) until a shard's size, time or
        checksum changes. `verify=False` only skips the checksums.

        Raises FileNotFoundError if there is no data set or a shard is missing, ValueError if one is damaged.
        """
        folder = plain_folder(folder)
        if not (folder / MANIFEST).is_file():
            if (folder / UNFINISHED).is_file():
                raise FileNotFoundError(f"the data set in {folder} is unfinished; run its preparation again to go on")
            raise FileNotFoundError(f"no data set in {folder} ({MANIFEST} is missing); make one: python -m mlem.data")
        manifest = Manifest.read(folder / MANIFEST)
        if not manifest.count or manifest.count != sum(record.count for record in manifest.shards):
            held = sum(record.count for record in manifest.shards)
            raise ValueError(f"{folder / MANIFEST}: count is {manifest.count}, its shards hold {held}; {_REMEDY}")
        stamp = json.dumps([_stamp(folder, record) for record in manifest.shards] + [*manifest.classes])
        index = _remembered(folder, stamp)
        if index is None:
            if verify:
                for record in manifest.shards:
                    _verify(folder / record.file, record)
            index = _build_index(folder, manifest)
            if verify:
                _remember(folder, stamp, index)
        return cls(folder, manifest, index)

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.manifest.shape

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, one per label; empty if images have no labels."""
        return self.manifest.classes

    def labels(self, indices: Iterable[int]) -> Tensor:
        """The labels at `indices`, (n,) int64 in [0, len(classes)). ValueError if images have none."""
        if not self.classes:
            raise ValueError(f"the images of {self.folder} have no labels")
        return torch.from_numpy(self._index["labels"][np.asarray([*indices], dtype=np.int64)])

    def key(self, i: int) -> str:
        """The name of image `i` inside its shard, unique in the data set."""
        return str(self._index["keys"][i])

    def read(self, i: int) -> Tensor:
        """Image `i`, (C, H, W) uint8 in [0, 255]. ValueError names the shard and the key of a broken image.

        For latents, mean and standard deviation, unscaled: (2, C, H, W) float16.
        """
        stored = torch.from_numpy(self._stored(i).copy())
        return stored if self.manifest.latents else stored.permute(2, 0, 1).contiguous()

    def images(self, indices: Iterable[int], positions: Iterable[int] | None = None, seed: int = 0) -> Tensor:
        """The images at `indices`, (n, C, H, W) float32 in [-1, 1]: x / 127.5 - 1.

        For latents, `(mean + deviation * noise - shift_factor) * scaling_factor`, with noise keyed by seed and position
        in training; by default one fixed draw each.
        """
        indices = [int(i) for i in indices]
        stored = torch.from_numpy(np.stack([self._stored(i) for i in indices]))
        if not (latents := self.manifest.latents):
            return stored.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(127.5).sub_(1)
        keys = torch.tensor(indices if positions is None else [*positions])
        noise = NoiseStream(seed, "latents").normal(keys, [0], self.shape, torch.float32)[0]
        mean, deviation = stored.float().unbind(1)
        return (mean + deviation * noise - latents.get("shift_factor", 0.0)) * latents["scaling_factor"]

    @cached_property
    def decoder(self) -> Decoder | None:
        """The decoder of latents; None for images."""
        return Decoder.beside(self.folder, self.manifest.info["decoder"]) if self.manifest.latents else None

    def split(self, held_out: int) -> tuple[np.ndarray, np.ndarray]:
        """Sorted (training, held-out) indices: a fixed choice, the same for every run. See `order.split`."""
        return order.split(len(self), held_out)

    def close(self) -> None:
        """Close the files; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_kept": {}}

    def _stored(self, i: int) -> np.ndarray:
        """Image `i`, (H, W, C) uint8; of latents, (2, C, H, W) float16. Not to be changed."""
        if (known := self._kept.get(i)) is not None:
            return known
        found = self._read(i)
        if found.nbytes * len(self) <= _KEPT_BYTES:
            self._kept[i] = found
        return found

    def _read(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.folder} has no image {i}; it holds images 0 to {len(self) - 1}")
        shard = int(self.shard_of[i])
        data = os.pread(self._file(shard), int(self._index["sizes"][i]), int(self._index["offsets"][i]))
        try:
            return array_of(data, (2, *self.shape)) if self.manifest.latents else decode(data, self.shape)
        except ValueError as error:
            path = self.folder / self.manifest.shards[shard].file
            raise ValueError(f"{path}: image {self.key(i)!r} {error}; {_REMEDY}") from error

    def _file(self, shard: int) -> int:
        """A descriptor of shard number `shard`. Only read by position, so a forked worker may share it."""
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.folder / self.manifest.shards[shard].file, os.O_RDONLY)
        return self._files[shard]


def decode(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """PNG, JPEG or WebP bytes of an 8-bit grey or RGB image of `shape` (C, H, W), as (H, W, C) uint8.

    The header is checked before any pixel is decoded. ValueError says what is wrong, to follow a name.
    """
    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    with opened(io.BytesIO(data)) as image:
        if (image.mode, image.height, image.width) != (mode, height, width):
            found = f"{image.mode} {image.height} x {image.width}"
            raise ValueError(f"is {found}, the manifest says {mode} {height} x {width}")
        return np.array(image).reshape(height, width, channels)


def _stamp(folder: Path, record: ShardRecord) -> list[Any]:
    """The state that a verification depends on; changes with the file or the manifest."""
    try:
        stat = (folder / record.file).stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder / record.file} is missing; {_REMEDY}") from None
    return [record.file, stat.st_size, stat.st_mtime_ns, record.sha256, record.count]


def _verify(path: Path, record: ShardRecord) -> None:
    size = path.stat().st_size
    if size != record.bytes:
        raise ValueError(f"{path} has {size} bytes, the manifest says {record.bytes}; {_REMEDY}")
    if (found := sha256(path)) != record.sha256:
        raise ValueError(f"{path} has SHA-256 {found[:12]}..., the manifest says {record.sha256[:12]}...; {_REMEDY}")


def _build_index(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """`keys` (N,) strings, `offsets` and `sizes` (N,) int64: the place of each image in its shard; `labels` (N,).

    Without classes there are no labels, (0,).
    """
    home: dict[str, str] = {}
    places: list[tuple[int, int]] = []
    labels: list[int] = []
    for record in manifest.shards:
        samples = _scan(folder / record.file, (MEMBER,) if manifest.latents else IMAGE_SUFFIXES)
        if len(samples) != record.count:
            found = f"holds {len(samples)} images that can be read, the manifest says {record.count}"
            raise ValueError(f"{folder / record.file} {found}; {_REMEDY}")
        for key, places_of in samples.items():
            if key in home:
                raise ValueError(f"{folder / record.file}: key {key!r} is also in {home[key]}; keys must be unique")
            home[key] = record.file
            places.append(places_of["image"])
        if manifest.classes:
            labels += _labels(folder / record.file, samples, len(manifest.classes))
    offsets, sizes = np.array(places, dtype=np.int64).T.copy()
    index = {"keys": np.array(list(home)), "offsets": offsets, "sizes": sizes}
    return index | {"labels": np.array(labels, dtype=np.int64)}


def _labels(path: Path, samples: dict[str, dict[str, tuple[int, int]]], classes: int) -> list[int]:
    """The label of each image of a shard. ValueError if one is missing, not a whole number, or of no class."""
    found: list[int] = []
    with open(path, "rb") as file:
        for key, places in samples.items():
            if "cls" not in places:
                raise ValueError(f"{path}: key {key!r} has no cls member, the manifest names classes; {_REMEDY}")
            offset, size = places["cls"]
            file.seek(offset)
            text = file.read(min(size, _LABEL_BYTES))
            if size > _LABEL_BYTES or not re.fullmatch(rb"[0-9]+\s*", text) or int(text) >= classes:
                raise ValueError(
                    f"{path}: key {key!r} has label {text!r}, the manifest has classes 0 to {classes - 1}; {_REMEDY}"
                )
            found.append(int(text))
    return found


def _scan(path: Path, images: tuple[str, ...] = IMAGE_SUFFIXES) -> dict[str, dict[str, tuple[int, int]]]:
    """Read a shard's headers: key -> kind of a member -> its (offset, size), in the order of the file.

    images: the suffixes of an image. Rejected, naming shard and key: members that are not plain files or lead outside,
    suffixes not in SUFFIXES (such as pickles), a key that is repeated or interleaved with others, members that only
    some samples have.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    current = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, kind = _key_and_kind(path, member, images)
                if (key != current and key in samples) or kind in samples.get(key, ()):
                    raise ValueError(f"{path}: key {key!r} is duplicate or interleaved with others ({member.name!r})")
                samples.setdefault(key, {})[kind] = (member.offset_data, member.size)
                current = key
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a whole tar file ({error}); {_REMEDY}") from error
    kinds = {"image"}.union(*samples.values())
    for key, sample in samples.items():
        if missing := kinds - sample.keys():
            raise ValueError(f"{path}: key {key!r} has no {sorted(missing)[0]} member; write the shard again with it")
    return samples


def _key_and_kind(path: Path, member: tarfile.TarInfo, images: tuple[str, ...]) -> tuple[str, str]:
    """Key and suffix of a member, split at the first dot of the name as webdataset does; images are all "image"."""
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise ValueError(f"{path}: member {member.name!r} is a link, folder or device; only plain files are read")
    folders, _, name = member.name.rpartition("/")
    if member.name.startswith("/") or "\\" in member.name or ".." in member.name.split("/"):
        raise ValueError(f"{path}: member {member.name!r} leads outside the shard; refused")
    stem, _, suffix = name.partition(".")
    known = (*images, *SUFFIXES[len(IMAGE_SUFFIXES) :])
    if suffix.lower() not in known:
        raise ValueError(f"{path}: member {member.name!r} is not one of .{' .'.join(known)}; refused")
    kind = "image" if suffix.lower() in images else suffix.lower()
    return f"{folders}/{stem}" if folders else stem, kind


def _remembered(folder: Path, stamp: str) -> dict[str, np.ndarray] | None:
    """The index of the last verification, if it was for exactly these files."""
    try:
        with open(folder / _INDEX, "rb") as file, np.load(file, allow_pickle=False) as saved:
            index = {name: saved[name] for name in ("keys", "offsets", "sizes", "labels")}
            return index if saved["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _remember(folder: Path, stamp: str, index: dict[str, np.ndarray]) -> None:
    try:
        with atomic_write(folder / _INDEX) as file:
            keys, offsets, sizes, labels = (index[name] for name in ("keys", "offsets", "sizes", "labels"))
            np.savez(file, stamp=np.array(stamp), keys=keys, offsets=offsets, sizes=sizes, labels=labels)
    except OSError:  # a read-only folder: the next open verifies again
        return
