"""One PNG per sample: its path, atomic writing, and reading, of any PNG."""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from mlem.data.pictures import picture_files
from mlem.files import atomic_write

__all__ = ["is_whole", "png_tree", "read_pixels", "read_png", "sample_indices", "sample_path", "write_png"]

_FLAT = 1000
"""Samples below this index are in the folder itself, the others in one subfolder per thousand."""
_CHANNELS = {"L": 1, "RGB": 3}
_END = b"\0\0\0\0IEND\xaeB`\x82"


def sample_path(folder: Path, index: int) -> Path:
    """The path of sample `index`: `folder/00000012.png`, from 1000 on `folder/00012/00012345.png`."""
    name = f"{index:08d}.png"
    return folder / name if index < _FLAT else folder / f"{index // _FLAT:05d}" / name


def sample_indices(folder: Path) -> list[int]:
    """Indices of the samples in `folder`, sorted. Files of old versions, all in `folder` itself, are moved."""
    if not folder.is_dir():
        return []
    found = []
    for name in _names(folder, r"(\d{8,})\.png"):
        index = int(name.removesuffix(".png"))
        if name != sample_path(folder, index).name:  # a zero too many: not ours
            continue
        found.append(index)
        if index >= _FLAT:
            sample_path(folder, index).parent.mkdir(exist_ok=True)
            os.replace(folder / name, sample_path(folder, index))
    for thousand in _names(folder, r"\d{5,}"):
        for name in _names(folder / thousand, r"(\d{8,})\.png"):
            index = int(name.removesuffix(".png"))
            found += [index] if sample_path(folder, index) == folder / thousand / name else []
    return sorted(set(found))


def _names(folder: Path, pattern: str) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if re.fullmatch(pattern, entry.name)]


def write_png(path: Path, pixels: Tensor) -> str:
    """pixels: (C, H, W) uint8, C 1 or 3. Atomic; returns the SHA-256 of the file."""
    array = pixels[0].numpy() if len(pixels) == 1 else np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    encoded = io.BytesIO()
    Image.fromarray(array).save(encoded, format="PNG")
    with atomic_write(path, durable=False) as file:
        file.write(encoded.getbuffer())
    return hashlib.sha256(encoded.getbuffer()).hexdigest()


def is_whole(path: Path) -> bool:
    """Whether a PNG has every chunk with its checksum; a decoder would not check all of them."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
        return path.read_bytes().endswith(_END)
    except (OSError, SyntaxError, EOFError, ValueError, struct.error):
        return False


def read_pixels(path: Path, shape: tuple[int, int, int] | None = None) -> Tensor:
    """(C, H, W) uint8 of a grey or RGB PNG, unconverted; the high byte of 16-bit colour.

    Raises: ValueError naming a file of another kind or `shape`, with transparency, or rotated by EXIF.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            found = (_CHANNELS.get(image.mode), image.height, image.width)
            odd = " with transparency" if image.mode in _CHANNELS and image.has_transparency_data else ""
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                odd = " rotated by EXIF"
            if found[0] is None or found != (shape or found) or odd:
                wanted = "grey or RGB" if shape is None else _described(*shape)
                raise ValueError(f"{path} is {image.mode} {image.width}x{image.height}{odd}, not {wanted}; convert it")
            array = np.array(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a PNG ({error}); make it again, or leave it out") from error
    pixels = torch.from_numpy(array)
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def _described(channels: int, height: int, width: int) -> str:
    return f"{'L' if channels == 1 else 'RGB'} {width}x{height}"


def read_png(path: Path) -> Tensor:
    """(C, H, W) float32 in [-1, 1]."""
    return read_pixels(path).float() / 127.5 - 1


def png_tree(folder: Path) -> list[Path]:
    """Every PNG in `folder` and below, sorted by path, except the grid of samples.

    Hidden files and folders and links are skipped, as in the data set `folder`. Raises FileNotFoundError if there are
    none.
    """
    names = picture_files(folder, ("png",)) if folder.is_dir() else {}
    found = sorted(folder / os.fsdecode(name) for name in names)
    found = [path for path in found if path.name != "grid.png" or not (path.parent / "settings.json").exists()]
    if not found:
        raise FileNotFoundError(
            f"folder={folder} holds no PNG (links and hidden files are skipped); name a folder of images"
        )
    return found
