"""Pixels of every mode, depth and kind of transparency that a PNG, JPEG or WebP can have, as `docs/data.md` says."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from mlem.data.pictures import opened, to_rgb

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
COLOURS = (b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120]))


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def png(width: int, depth: int, kind: int, row: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of one row. more: chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def clear(*values: int) -> tuple[bytes, bytes]:
    return b"tRNS", words(*values)


TABLE: dict[str, tuple[bytes, list[Any]]] = {
    "1 bit": (png(2, 1, GREY, b"\x40"), [0, 255]),
    "1 bit, white transparent": (png(2, 1, GREY, b"\x40", clear(1)), [0, 255]),
    "1 bit, black transparent": (png(2, 1, GREY, b"\x40", clear(0)), [255, 255]),
    "2 bits": (png(4, 2, GREY, b"\x1b"), [0, 85, 170, 255]),
    "2 bits, one transparent": (png(4, 2, GREY, b"\x1b", clear(2)), [0, 85, 255, 255]),
    "4 bits": (png(2, 4, GREY, b"\x3a"), [51, 170]),
    "4 bits, one transparent": (png(2, 4, GREY, b"\x3a", clear(3)), [255, 170]),
    "8 bits": (png(3, 8, GREY, b"\0\x07\xff"), [0, 7, 255]),
    "8 bits, one transparent": (png(3, 8, GREY, b"\0\x07\xff", clear(7)), [0, 255, 255]),
    "16 bits": (png(4, 16, GREY, words(0, 255, 256, 0x1234)), [0, 0, 1, 0x12]),
    "16 bits, one transparent": (png(3, 16, GREY, words(0x1234, 0x1235, 0), clear(0x1234)), [255, 0x12, 0]),
    "grey and alpha": (png(3, 8, GREY_ALPHA, bytes([0, 255, 100, 128, 50, 0])), [0, 177, 255]),
    "grey and alpha, 16 bits": (png(2, 16, GREY_ALPHA, words(0x1234, 0xFFFF, 0x6400, 0x8000)), [0x12, 177]),
    "palette": (png(4, 2, PALETTE, b"\x1b", COLOURS), [(10, 20, 30), (40, 50, 60), (70, 80, 90), (100, 110, 120)]),
    "palette, half transparent": (
        png(4, 2, PALETTE, b"\x1b", COLOURS, (b"tRNS", bytes([255, 128, 0]))),
        [(10, 20, 30), (147, 152, 157), 255, (100, 110, 120)],
    ),
    "palette, one transparent": (
        png(2, 1, PALETTE, b"\x40", COLOURS, (b"tRNS", bytes([255, 0]))),
        [(10, 20, 30), 255],
    ),
    "colour": (png(1, 8, RGB, bytes([1, 2, 3])), [(1, 2, 3)]),
    "colour, one transparent": (png(2, 8, RGB, bytes([1, 2, 3, 4, 5, 6]), clear(4, 5, 6)), [(1, 2, 3), 255]),
    "colour, 16 bits": (png(1, 16, RGB, words(0x1234, 0xFF80, 1)), [(0x12, 0xFF, 0)]),
    "colour, 16 bits, one transparent": (
        png(2, 16, RGB, words(0x1234, 0x5678, 0x9ABC, 1, 2, 3), clear(0x1234, 0x5678, 0x9ABC)),
        [255, (0, 0, 0)],
    ),
    "colour and alpha": (png(2, 8, RGBA, bytes([10, 20, 30, 128, 1, 2, 3, 0])), [(132, 137, 142), 255]),
    "colour and alpha, 16 bits": (png(1, 16, RGBA, words(0x6400, 0x6400, 0x6400, 0x8000)), [177]),
}


def read(data: bytes) -> np.ndarray:
    """(pixels, 3)"""
    with opened(io.BytesIO(data)) as image:
        return np.asarray(to_rgb(image)).reshape(-1, 3)


@pytest.mark.parametrize("kind", TABLE)
def test_pixels_are_what_the_documentation_says(kind: str) -> None:
    data, expected = TABLE[kind]
    assert read(data).tolist() == [[one] * 3 if isinstance(one, int) else list(one) for one in expected]


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
def test_jpegs_of_every_mode(mode: str) -> None:
    """Even colours, which JPEG keeps to a unit or two."""
    colour = {"L": 90, "RGB": (200, 30, 60), "CMYK": (10, 200, 30, 40), "YCbCr": (100, 90, 160)}[mode]
    expected = {
        "L": (90,) * 3,
        "RGB": (200, 30, 60),
        "CMYK": tuple((255 - c) * (255 - 40) / 255 for c in (10, 200, 30)),
        "YCbCr": (100 + 1.402 * 32, 100 - 0.344136 * -38 - 0.714136 * 32, 100 + 1.772 * -38),
    }[mode]
    Image.new(mode, (16, 16), colour).save(file := io.BytesIO(), "JPEG", quality=100)
    assert np.abs(read(file.getvalue()) - np.array(expected)).max() <= 3


@pytest.mark.skipif(not features.check("webp"), reason="this Pillow reads no WebP")
@pytest.mark.parametrize(
    ("mode", "colour", "expected"), [("RGB", (1, 2, 3), (1, 2, 3)), ("RGBA", (10, 20, 30, 128), (132, 137, 142))]
)
def test_webp(mode: str, colour: tuple[int, ...], expected: tuple[int, ...]) -> None:
    Image.new(mode, (4, 4), colour).save(file := io.BytesIO(), "WEBP", lossless=True, exact=True)
    assert read(file.getvalue()).tolist() == [list(expected)] * 16
