"""Any tree of PNG, JPEG and WebP files, cropped to squares of one size."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlem.data.pictures import FILTERS, SUFFIXES, centre_square, opened, picture_files, to_rgb
from mlem.data.shards.manifest import plain_folder
from mlem.data.sources import DataSet, Labels, Partial, Source, Stored

__all__ = ["Folder"]


@dataclass(frozen=True)
class Folder(DataSet):
    """The PNG, JPEG and WebP images of a folder, any sizes, cropped to squares and scaled, RGB.

    Images are (size, size, 3), in the order of their paths; other files, hidden ones and links are ignored. If every
    image is in a subfolder, the top-level subfolders are the classes.

    Args:
        source: the folder, searched recursively
        size: pixels per side
        crop: crop the central square; otherwise stretch the image to a square
        filter: how images are scaled: box, bilinear, bicubic, lanczos
        max_broken: largest share of broken images to leave out, in [0, 1)
    """

    source: str | None = None
    size: int = 64
    crop: bool = True
    filter: str = "box"
    max_broken: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be >= 1, got {self.size}")
        if self.filter not in FILTERS:
            raise ValueError(f"filter must be one of {', '.join(FILTERS)}, got {self.filter!r}")
        if not 0 <= self.max_broken < 1:
            raise ValueError(f"max_broken must be in [0, 1), got {self.max_broken}")

    def build(self) -> Stored:
        path = None if self.source is None else plain_folder(self.source)
        info = {"size": self.size, "crop": self.crop, "filter": self.filter}
        return Stored(
            (3, self.size, self.size), info, path, "FOLDER", partial(_open, info=info, max_broken=self.max_broken)
        )

    @classmethod
    def example(cls, folder: Path) -> dict[str, Any]:
        for number in range(30):
            path = folder / ("dark", "light")[number // 15] / f"{number:02d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (12, 10), (8 * number, 90, 200)).save(path)
        return {"source": str(folder), "size": 8}


def _open(root: Path, *, info: dict[str, Any], max_broken: float) -> Source:
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; name the folder that holds the images")
    sizes = picture_files(root)
    if not sizes:
        if links := _links(root):
            raise ValueError(
                f"{root} holds no images, only {links} link{'s' * (links != 1)}, and links are not followed: "
                "copy the files, or name the folder they point to"
            )
        raise ValueError(f"{root} holds no image: no file in it ends in .{', .'.join(SUFFIXES)}")
    listing = hashlib.sha256()
    for name, size in sizes.items():
        listing.update(name + b"\0%d\0" % size)
    images = partial(_images, root, list(sizes), **info)
    info, tolerance = {**info, "listing": listing.hexdigest()}, int(max_broken * len(sizes) + 1e-9)
    return Source(images, len(sizes), info, tolerance, _labels(list(sizes)))


def _labels(names: list[bytes]) -> Labels | None:
    """The top-level subfolders as classes, sorted by name; None if an image is at the top level."""
    folders = [name.partition(b"/")[0] for name in names if b"/" in name]
    if len(folders) < len(names):
        return None
    classes, values = np.unique(np.array(folders, dtype=object), return_inverse=True)
    return Labels(tuple(name.decode(errors="replace") for name in classes), lambda start, stop: values[start:stop])


def _links(root: Path) -> int:
    """Number of links below `root` to folders or to files named like images."""
    found = (path for path in root.rglob("*") if path.is_symlink())
    return sum(
        path.is_dir() or path.name.lower().endswith(tuple(f".{suffix}" for suffix in SUFFIXES)) for path in found
    )


def _images(root: Path, names: list[bytes], start: int, stop: int, *, size: int, crop: bool, filter: str) -> Partial:
    pixels, left_out = [], {}
    for i, name in enumerate(names[start:stop], start=start):
        try:
            pixels.append(_image(root / os.fsdecode(name), size, crop, filter))
        except Exception as error:  # hostile files make Pillow raise nearly anything
            why = error.strerror if isinstance(error, OSError) else error
            left_out[i] = f"{os.fsdecode(name)!r} {why}"
    return Partial(np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8), left_out)


def _image(path: Path, size: int, crop: bool, filter: str) -> np.ndarray:
    """(size, size, 3) uint8"""
    with open(path, "rb") as file, opened(file) as image:
        picture = to_rgb(image)
    if crop:
        picture = centre_square(picture, min(picture.size))
    return np.asarray(picture.resize((size, size), FILTERS[filter]))
