"""Data sets: dataclasses of options that build a source of images, before these become shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from mlem.decoder import Decoder

__all__ = ["DataSet", "Images", "Labels", "Partial", "Source", "Stored", "checked", "shape_of"]


class DataSet(ABC):
    """A data set: subclass it as a frozen dataclass in a file of `mlem.data.datasets`, which gives it its name.

    The fields are its options: `int`, `float`, `str`, `bool`, or one of them and `None`. The class docstring supplies
    the help: options from `Args:`, the one-line description from its first line. `__post_init__` raises ValueError,
    naming the option, for a value out of range.

    Attributes:
        licence: of the images, if their source states one; a name from the Hugging Face hub, or words.
    """

    licence: ClassVar[str] = ""

    @abstractmethod
    def build(self) -> Source | Stored:
        """The source of the images; a `Stored` if files must be opened first. Reads no large file."""

    @classmethod
    def example(cls, folder: Path) -> dict[str, Any]:
        """Options of a small instance for the conformance tests; writes the files it needs to `folder`."""
        return {}


@dataclass(frozen=True)
class Partial:
    """What `images(start, stop)` returns if some cannot be read.

    Args:
        pixels: of the others, in order.
        left_out: index -> reason.
    """

    pixels: np.ndarray
    left_out: dict[int, str]


Images = Callable[[int, int], np.ndarray | Partial]


@dataclass(frozen=True)
class Labels:
    """The classes of images.

    Args:
        names: of the classes, one or more; label n means names[n].
        values: `values(start, stop)` returns the labels of these images, whole numbers (stop - start,).
    """

    names: tuple[str, ...]
    values: Callable[[int, int], np.ndarray]

    def checked(self, start: int, stop: int) -> np.ndarray:
        """The labels `values(start, stop)`. Raises ValueError for a wrong type or number, or a label of no class."""
        found = self.values(start, stop)
        if found.shape != (stop - start,) or found.dtype.kind not in "iu":
            raise ValueError(
                f"labels({start}, {stop}) must be {stop - start} whole numbers, got {found.dtype} {found.shape}"
            )
        if len(found) and not 0 <= found.min() <= found.max() < len(self.names):
            raise ValueError(f"labels must be in [0, {len(self.names) - 1}], got {found.min()} to {found.max()}")
        return found


@dataclass(frozen=True)
class Source:
    """Images to prepare.

    Args:
        images: `images(start, stop)` returns (stop - start, H, W, C) uint8, C = 1 or 3; with a decoder, mean and
            standard deviation of latents, (stop - start, 2, C, H, W) float16; pickled for several processes.
        count: number of images.
        info: everything that determines the pixels, seed included: two sources with the same `info` and `count` must
            give the same images, however the range is cut.
        tolerance: how many images may be left out as unreadable, in a `Partial`.
        labels: the classes of the images, if any; determined by `info` like the pixels.
        decoder: of latents; None: for images. `info` has its fingerprint as "decoder".
    """

    images: Images
    count: int
    info: dict[str, Any]
    tolerance: int = 0
    labels: Labels | None = None
    decoder: Decoder | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty if images have no labels."""
        return () if self.labels is None else self.labels.names

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return shape_of(self.images)

    def open(self) -> Source:
        """Itself: there is nothing to open."""
        return self


@dataclass(frozen=True)
class Stored:
    """Images in files that must be opened first.

    Args:
        shape: (C, H, W); None if only the files know.
        info: what the options determine about the pixels; the opened source adds the identity of the files.
        path: the archive or folder; None if the user did not say.
        usual: what to call it then.
        read: opens a path.
        decoder: of latents, if the options give it.
    """

    shape: tuple[int, int, int] | None
    info: dict[str, Any]
    path: Path | None
    usual: str
    read: Callable[[Path], Source]
    decoder: Decoder | None = None

    def open(self) -> Source:
        """The images at `path`, which must be known. ValueError if they are not as expected."""
        if self.path is None:
            raise ValueError(f"source must be given: the path of {self.usual}")
        return self.read(self.path)


def shape_of(images: Images) -> tuple[int, int, int]:
    """(C, H, W) of image 0."""
    return _shape(checked(images, 0, 1)[0])


def _shape(batch: np.ndarray) -> tuple[int, int, int]:
    """(C, H, W) of images (n, H, W, C), or of latents (n, 2, C, H, W)."""
    if batch.ndim == 5:
        return batch.shape[2], batch.shape[3], batch.shape[4]
    return batch.shape[3], batch.shape[1], batch.shape[2]


def checked(
    images: Images, start: int, stop: int, shape: tuple[int, int, int] | None = None
) -> tuple[np.ndarray, dict[int, str]]:
    """The result of `images(start, stop)`, checked.

    Returns: (n, H, W, C) uint8, or (n, 2, C, H, W) float16, and index -> reason for the images left out.

    Raises:
        ValueError: wrong type, or not of `shape` (C, H, W).
    """
    given = images(start, stop)
    batch, left_out = (given.pixels, given.left_out) if isinstance(given, Partial) else (given, {})
    count = stop - start - len(left_out)
    pictures = batch.dtype == np.uint8 and batch.ndim == 4 and batch.shape[-1] in (1, 3)
    latents = batch.dtype == np.float16 and batch.ndim == 5 and batch.shape[1] == 2
    if len(batch) != count or not (pictures or latents):
        raise ValueError(
            f"images({start}, {stop}) must return uint8 ({count}, H, W, 1 or 3), got {batch.dtype} {batch.shape}"
        )
    if latents and not np.isfinite(batch).all():
        raise ValueError(f"images({start}, {stop}) has latents that are not finite, or beyond the range of float16")
    if shape is not None and _shape(batch) != shape:
        raise ValueError(f"images({start}, {stop}) has shape {batch.shape}, the first image was (C, H, W) = {shape}")
    return batch, left_out
