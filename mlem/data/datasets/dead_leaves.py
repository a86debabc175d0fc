"""Dead leaves: opaque disks falling on each other, a standard synthetic data set with natural-image statistics.

Radii have density r^-3 between r_min and r_max, which makes images scale invariant (Lee, Mumford and Huang, "Occlusion
models for natural images", 2001). We look from below: the first disk that covers a pixel colours it, so no leaf has to
be painted over. Any size, any number of images, no network access.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlem.data.sources import DataSet, Source

__all__ = ["DeadLeaves", "dead_leaves", "nearest_disk", "power_law_radii"]

_MAX_DISKS = 10_000_000  # about 1 GB
_EXPECTED_GAPS = 0.01  # mean number of pixels per image that no disk reaches; they show the ground


@dataclass(frozen=True)
class DeadLeaves(DataSet):
    """Procedural images of overlapping disks with power-law radii, any size, RGB.

    Images are (size, size, 3).

    Args:
        size: pixels per side
        count: number of images
        seed: another seed gives other images
        r_min: smallest radius, in pixels
        r_max: largest radius, in pixels (default: half of size)
    """

    size: int = 32
    count: int = 20_000
    seed: int = 0
    r_min: float = 2.0
    r_max: float | None = None

    def __post_init__(self) -> None:
        size, r_min, r_max = self.size, self.r_min, self._r_max
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed}")
        if not 0 < r_min < r_max < math.inf:
            raise ValueError(f"radii must satisfy 0 < r_min < r_max, got r_min {r_min} and r_max {r_max}")
        if (disks := _disks(size, r_min, r_max)) > _MAX_DISKS:
            raise ValueError(
                f"r_min {r_min} and r_max {r_max} need {disks:.0e} disks per image; raise r_min or lower r_max"
            )

    def build(self) -> Source:
        info = {"size": self.size, "seed": self.seed, "r_min": float(self.r_min), "r_max": float(self._r_max)}
        return Source(partial(dead_leaves, **info), self.count, info)

    @property
    def _r_max(self) -> float:
        return self.size / 2 if self.r_max is None else self.r_max

    @classmethod
    def example(cls, folder: Path) -> dict[str, Any]:
        return {"size": 8, "count": 30}


def dead_leaves(start: int, stop: int, *, size: int, seed: int, r_min: float, r_max: float) -> np.ndarray:
    """Images start .. stop-1, (stop - start, size, size, 3) uint8; image i depends only on (seed, i) and the options.

    size, r_min, r_max: pixels.
    """
    # key, not seed: each (seed, i) has its own Philox stream
    generators = (np.random.Generator(np.random.Philox(key=np.array([seed, i], np.uint64))) for i in range(start, stop))
    return np.stack([_image(rng, size, r_min, r_max) for rng in generators])


def power_law_radii(u: np.ndarray, r_min: float, r_max: float) -> np.ndarray:
    """Radii with density proportional to r^-3 on [r_min, r_max] from uniform `u` in [0, 1), by inverting the CDF."""
    return (r_min**-2 - u * (r_min**-2 - r_max**-2)) ** -0.5


def _image(rng: np.random.Generator, size: int, r_min: float, r_max: float) -> np.ndarray:
    """One image, (size, size, 3) uint8."""
    disks = _disks(size, r_min, r_max)
    # centres reach r_max beyond the image, so that every pixel has the same distribution
    x, y = rng.random((2, disks)) * (size + 2 * r_max) - r_max
    r = power_law_radii(rng.random(disks), r_min, r_max)
    colours = (rng.random((disks + 1, 3)) * 256).astype(np.uint8)
    return colours[nearest_disk(x, y, r, size)].reshape(size, size, 3)  # -1 takes the last colour: the ground


def _disks(size: int, r_min: float, r_max: float) -> int:
    """Disks that leave _EXPECTED_GAPS pixels uncovered: one covers a pixel with probability pi E[r^2] / side^2."""
    mean_square = 2 * math.log(r_max / r_min) / (r_min**-2 - r_max**-2)
    covers = math.pi * mean_square / (size + 2 * r_max) ** 2
    return math.ceil(math.log(size**2 / _EXPECTED_GAPS) / -math.log1p(-covers))


def nearest_disk(x: np.ndarray, y: np.ndarray, r: np.ndarray, size: int) -> np.ndarray:
    """The first disk that covers each pixel's centre, (size * size,) int64, row by row; -1 if there is none.

    Work grows with the area of the disks, not with disks x pixels: each disk is cut into rows, each row into pixels.

    x, y, r: (disks,), centres and radii in pixels; the centre of pixel (row, column) is (column + 0.5, row + 0.5).
    """
    disk, row = _runs(*_centres_within(y, r, size))
    dy = row + 0.5 - y[disk]
    half = np.sqrt(np.maximum(r[disk] ** 2 - dy**2, 0))
    span, column = _runs(*_centres_within(x[disk], half, size))
    pixel = row[span] * size + column
    nearest = np.full(size * size, -1)
    nearest[pixel[::-1]] = disk[span][::-1]  # for repeated pixels the last assignment wins: the first disk
    return nearest


def _centres_within(centre: np.ndarray, reach: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last pixel whose centre is within `reach` of `centre` along one axis; last < first if none is."""
    first = np.maximum(np.ceil(centre - reach - 0.5), 0).astype(np.int64)
    last = np.minimum(np.floor(centre + reach - 0.5), size - 1).astype(np.int64)
    return first, last


def _runs(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (k, value) with first[k] <= value <= last[k], in order, as two arrays."""
    lengths = np.maximum(last - first + 1, 0)
    run = np.repeat(np.arange(len(lengths)), lengths)
    begins = np.cumsum(lengths) - lengths
    return run, np.arange(len(run)) + (first - begins)[run]
