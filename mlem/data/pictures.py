"""Image files: checked by their header, then converted to 8-bit RGB of the requested size.

Here are safe opening of PNG, JPEG and WebP, the conversions, crops and scaling that all data sets share, and the walk
over a tree of image files. Independent of archives and shards.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

__all__ = ["FILTERS", "SUFFIXES", "centre_square", "opened", "picture_files", "to_rgb"]

SUFFIXES = ("png", "jpg", "jpeg", "webp")
_MAX_PIXELS = 64 * 2**20
_GREY_STEPS = {"L;2": 85, "L;4": 17}
"""One unit of 2-bit and of 4-bit grey, in 8 bits."""
FILTERS = {name.lower(): Image.Resampling[name] for name in ("BOX", "BILINEAR", "BICUBIC", "LANCZOS")}


def picture_files(root: Path, suffixes: Sequence[str] = SUFFIXES) -> dict[bytes, int]:
    """The image files in `root` and its subfolders: path below `root` -> size, sorted by path.

    Hidden files and folders (names with a leading dot), links and special files are left out.
    """
    found: dict[bytes, int] = {}
    endings = tuple(f".{suffix}".encode() for suffix in suffixes)
    top = os.fsencode(root)
    folders = [top]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                if entry.name.lower().endswith(endings) and entry.is_file(follow_symlinks=False):
                    found[os.path.relpath(entry.path, top)] = entry.stat(follow_symlinks=False).st_size
    return dict(sorted(found.items()))


@contextmanager
def opened(file: BinaryIO) -> Generator[Image.Image, None, None]:
    """The PNG, JPEG or WebP in `file`, pixels not yet decoded; use it inside the block.

    ValueError says what is wrong with the file, to follow its name: too large, another format, broken.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's advice on odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"has more than {_MAX_PIXELS} pixels ({error})") from error
    except UnidentifiedImageError as error:  # its text contains a memory address
        raise ValueError("cannot be decoded as PNG, JPEG or WebP (it is none of them)") from error
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        raise ValueError(f"cannot be decoded as PNG, JPEG or WebP ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright.

    Rotated as EXIF says; the high byte of 16 bits; CMYK by Pillow's formula, without colour profiles; transparent
    pixels are laid over white, a transparent colour of 16 bits per channel by its high bytes; grey is repeated three
    times; the first frame of several.
    """
    _scale_transparent_colour(image)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16-bit grey; Pillow itself takes the high byte of 16-bit colour
        grey = np.asarray(image)
        high = (grey >> 8).astype(np.uint8)
        if (transparent := image.info.get("transparency")) is not None:
            high[grey == transparent] = 255
        image = Image.fromarray(high)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _scale_transparent_colour(image: Image.Image) -> None:
    """Scale the transparent colour to 8 bits: Pillow converts pixels of 2, 4 and 16 bits, but not this."""
    raw = str(image.tile[0].args) if isinstance(image, ImageFile) and image.tile else ""
    transparent = image.info.get("transparency")
    if raw in _GREY_STEPS and isinstance(transparent, int):
        image.info["transparency"] = transparent * _GREY_STEPS[raw]
    elif raw == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def centre_square(image: Image.Image, side: int) -> Image.Image:
    """The central `side` x `side` pixels; if the rest is odd, one more is cut on the right and at the bottom."""
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
