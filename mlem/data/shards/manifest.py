"""A prepared data set: a folder of tar shards and a manifest of what each shard must hold.

Here are the manifest and the check of folder names. `reading.py` reads shards, `writing.py` makes them.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlem.files import read_json, write_json

__all__ = ["MANIFEST", "UNFINISHED", "Manifest", "ShardRecord", "plain_folder", "same_data"]

_FORMAT = 1
MANIFEST = "manifest.json"
UNFINISHED = "manifest.unfinished.json"  # the manifest so far, during preparation or after an interruption


@dataclass(frozen=True)
class ShardRecord:
    """One finished shard: file name inside the folder, number of images, size in bytes, SHA-256 in hex."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of a prepared data set.

    Args:
        name: of the data set.
        shape: (C, H, W) of every image.
        info: everything that determines the pixels.
        count: number of images.
        shard_size: source images per shard.
        shards: the finished ones.
        left_out: key -> file and fault of each unreadable source image; not in `count`.
        classes: names of the classes, if every image has a label.
        latents: `scaling_factor` and `shift_factor` of latents, as in `Level.latents`; empty for images.
    """

    name: str
    shape: tuple[int, int, int]
    info: dict[str, Any]
    count: int
    shard_size: int
    shards: tuple[ShardRecord, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    latents: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of source images, including those left out."""
        return self.count + len(self.left_out)

    def write(self, path: Path) -> None:
        """Write to `path` atomically; for images without labels, the same bytes as in older versions."""
        plain = {"format": _FORMAT, **asdict(self)}
        later = ("classes", "latents")
        write_json(path, {key: value for key, value in plain.items() if value or key not in later})

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read and check `path`. ValueError names the file and the problem."""
        value = read_json(path)
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            found = value.get("format") if isinstance(value, dict) else type(value).__name__
            raise ValueError(
                f"{path}: format is {found!r}, but this version reads {_FORMAT}; prepare the data set again"
            )
        try:
            records = tuple(
                ShardRecord(str(r["file"]), int(r["count"]), int(r["bytes"]), str(r["sha256"])) for r in value["shards"]
            )
            channels, height, width = (int(n) for n in value["shape"])
            info, count, shard_size = dict(value["info"]), int(value["count"]), int(value["shard_size"])
            left_out = {str(key): str(why) for key, why in dict(value.get("left_out", {})).items()}
            classes = tuple(str(name) for name in list(value.get("classes", ())))
            shape = (channels, height, width)
            latents = {str(key): float(factor) for key, factor in dict(value.get("latents", {})).items()}
            if latents and not ("scaling_factor" in latents and "decoder" in info):
                raise ValueError("latents without scaling_factor or decoder")
            manifest = cls(str(value["name"]), shape, info, count, shard_size, records, left_out, classes, latents)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a manifest ({error!r}); prepare the data set again") from error
        for record in records:
            if not re.fullmatch(r"[\w-][\w.-]*\.tar", record.file):
                raise ValueError(f"{path}: {record.file!r} is not the name of a shard in this folder")
        for key in left_out:
            if not re.fullmatch(r"[0-9]{8,}", key) or int(key) >= manifest.total:
                raise ValueError(
                    f"{path}: left_out names {key!r}, none of the {manifest.total} images; restore it, or delete the "
                    "folder and prepare the data set again"
                )
        if channels not in (1, 3) and not latents:
            raise ValueError(f"{path}: shape has {channels} channels; only grey (1) and RGB (3) images are supported")
        return manifest


def same_data(folder: Path, found: Manifest, wanted: Manifest, *, shard_size: bool) -> None:
    """Reject a folder that holds other data.

    Images without labels count as the same data as with labels: older versions did not store labels.

    Args:
        folder: named in the error.
        found: the manifest in it.
        wanted: what it should hold.
        shard_size: whether to also compare the shard size, which does not change the data.

    Raises:
        ValueError: names each difference, both sides.
    """
    sides = [{"name": m.name, "shape": list(m.shape), "count": m.total, **m.info} for m in (found, wanted)]
    if found.classes:
        sides = [{**side, "classes": list(m.classes)} for side, m in zip(sides, (found, wanted), strict=True)]
    if shard_size:
        sides = [{**side, "shard_size": m.shard_size} for side, m in zip(sides, (found, wanted), strict=True)]
    there, here = (json.loads(json.dumps(side)) for side in sides)
    names = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if names:
        differences = ", ".join(f"{key} is {there.get(key)!r}, requested {here.get(key)!r}" for key in names)
        raise ValueError(f"{folder} holds other data: {differences}; choose another folder or delete this one")


def plain_folder(folder: str | os.PathLike[str]) -> Path:
    """The path `folder`, rejected if it is a URL: webdataset runs `pipe:` URLs in a shell."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", os.fspath(folder)):
        raise ValueError(f"folder {os.fspath(folder)!r} is a URL, not a folder; pass a path (./a:b for odd names)")
    return Path(folder)
