"""Picture files: judged by their header, then made into 8-bit RGB of the size that is asked for.

Lives here: opening PNG, JPEG and WebP without trusting them, the conversions, crops and scaling that every data set
shares. Knows nothing of archives, folders or shards.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["FILTERS", "SUFFIXES", "centre_square", "opened", "to_rgb"]

SUFFIXES = ("png", "jpg", "jpeg", "webp")
_MAX_PIXELS = 64 * 2**20
FILTERS = {name.lower(): Image.Resampling[name] for name in ("BOX", "BILINEAR", "BICUBIC", "LANCZOS")}


@contextmanager
def opened(file: BinaryIO) -> Generator[Image.Image, None, None]:
    """The PNG, JPEG or WebP in `file`, with no pixel unpacked yet; ask for pixels inside the block.

    ValueError says what is wrong with the file, to be put after its name: too large, no such picture, broken.
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
    except UnidentifiedImageError as error:  # whose text holds an address in memory
        raise ValueError("cannot be decoded as PNG, JPEG or WebP (it is none)") from error
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        raise ValueError(f"cannot be decoded as PNG, JPEG or WebP ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright.

    Turned as EXIF says; the high byte of 16 bits; CMYK by Pillow's formula, without colour profiles; what is
    transparent is laid over white; grey three times; the first frame of several.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16-bit grey; Pillow itself takes the high byte of 16-bit colour
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def centre_square(image: Image.Image, side: int) -> Image.Image:
    """The `side` x `side` pixels in the middle; one more is cut on the right and below where the rest is odd."""
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
