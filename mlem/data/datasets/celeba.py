"""CelebA from the official aligned images: faces, cut to the middle and scaled down (Liu et al., 2015)."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from mlem.data.archives import checked_md5, located
from mlem.data.pictures import FILTERS, centre_square, opened, to_rgb
from mlem.data.sources import DataSet, Source, Stored

__all__ = ["ARCHIVE", "CROP", "HEIGHT", "MD5", "ORIGIN", "PARTITION", "SPLITS", "WIDTH", "CelebA"]

ARCHIVE, PARTITION = "img_align_celeba.zip", "list_eval_partition.txt"
ORIGIN = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (Google Drive: there is no stable direct address)"
MD5 = {ARCHIVE: "00d2c5bc6d35e252742224ab0c1e8fcb", PARTITION: "d32c9cbf5e040fd4025c592c306e6668"}
SPLITS = {"train": "0", "valid": "1", "test": "2"}
WIDTH, HEIGHT, CROP = 178, 218, 140
_MAX_BYTES = 2**20  # per image; the official ones have about 7 kB


@dataclass(frozen=True)
class CelebA(DataSet):
    """The 202,599 aligned faces of CelebA, the middle 140x140 pixels scaled down by a box filter, RGB.

    Images are (size, size, 3), in the order of the partition file.

    Args:
        source: img_align_celeba.zip, or the folder that holds it
        partition: list_eval_partition.txt (default: beside the archive)
        split: train (162,770 images), valid (19,867) or test (19,962)
        size: pixels per side, scaled from the 140 in the middle
        download: only says where to get the files: they have no stable direct address
        any_checksum: accept other files of the same format
    """

    licence = "for non-commercial research only"

    source: str | None = None
    partition: str | None = None
    split: str = "train"
    size: int = 64
    download: bool = False
    any_checksum: bool = False

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if not 1 <= self.size <= CROP:
            raise ValueError(f"size must be in [1, {CROP}], got {self.size}")
        if self.download:
            raise ValueError(f"download: get {ARCHIVE} and {PARTITION} by hand from {ORIGIN}, and pass --source")

    def build(self) -> Stored:
        path = None if self.source is None else located(self.source, ARCHIVE)
        info = {"split": self.split, "size": self.size}
        read = partial(_open, partition=self.partition, info=info, any_checksum=self.any_checksum)
        return Stored((3, self.size, self.size), info, path, ARCHIVE, read)


def _open(path: Path, *, partition: str | None, info: dict[str, Any], any_checksum: bool) -> Source:
    listed = path.with_name(PARTITION) if partition is None else Path(partition)
    md5 = {
        name: checked_md5(file, MD5[name], origin=ORIGIN, any_checksum=any_checksum)
        for name, file in ((PARTITION, listed), (ARCHIVE, path))
    }
    faces = _Faces(path, _names(listed, info["split"]), info["size"])
    faces.check()
    return Source(faces.images, len(faces.names), {**info, "md5": md5[ARCHIVE], "partition_md5": md5[PARTITION]})


def _names(path: Path, split: str) -> list[str]:
    """The images of a split: lines of the partition file are `000001.jpg 0`."""
    names = []
    for number, line in enumerate(path.read_text(encoding="ascii", errors="replace").splitlines(), start=1):
        match = re.fullmatch(r"(\w[\w-]*\.jpg)\s+([012])\s*", line)
        if match is None and line.strip():
            raise ValueError(f"{path}: line {number} is not like '000001.jpg 0': {line[:80]!r}; get it from {ORIGIN}")
        if match is not None and match[2] == SPLITS[split]:
            names.append(match[1])
    if not names:
        raise ValueError(f"{path} lists no image of split {split!r}; choose another split")
    return names


class _Faces:
    """The images `names` of an archive; can be pickled, and opens the archive when first read."""

    def __init__(self, path: Path, names: list[str], size: int) -> None:
        self.path, self.names, self.size = path, names, size

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "names": self.names, "size": self.size}

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path} is not a whole zip file ({error}); get it again from {ORIGIN}") from error

    def check(self) -> None:
        """Raise ValueError if an image of the list is not in the archive."""
        held = set(self._zip.namelist())
        if missing := [name for name in self.names if f"img_align_celeba/{name}" not in held]:
            raise ValueError(f"{self.path} has no img_align_celeba/{missing[0]} ({len(missing)} of the list missing)")

    def images(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, size, size, 3) uint8"""
        return np.stack([self._image(f"img_align_celeba/{name}") for name in self.names[start:stop]])

    def _image(self, member: str) -> np.ndarray:
        try:
            if (size := self._zip.getinfo(member).file_size) > _MAX_BYTES:
                raise ValueError(f"has {size} bytes, an image at most {_MAX_BYTES}")
            with opened(io.BytesIO(self._zip.read(member))) as image:
                if image.size != (WIDTH, HEIGHT):
                    found = f"{image.width} x {image.height}"
                    raise ValueError(f"is {found}, aligned images are {WIDTH} x {HEIGHT}")
                face = centre_square(to_rgb(image), CROP)
            return np.asarray(face.resize((self.size, self.size), FILTERS["box"]))
        except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{self.path}: {member} {error}; get the archive again from {ORIGIN}") from error
