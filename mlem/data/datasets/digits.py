"""The 1,797 real 8x8 grey digits that scikit-learn carries: no network needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from mlem.data.sources import DataSet, Source

__all__ = ["COUNT", "Digits"]

COUNT = 1797


@dataclass(frozen=True)
class Digits(DataSet):
    """The 1,797 handwritten digits of scikit-learn, 8x8 grey.

    Images are (8, 8, 1); values 0 .. 16 become 0 .. 255 by round(v * 255 / 16).
    """

    def build(self) -> Source:
        return Source(_images, COUNT, {"origin": "sklearn.datasets.load_digits"})


def _images(start: int, stop: int) -> np.ndarray:
    return _pixels()[start:stop]


@cache
def _pixels() -> np.ndarray:
    """(1797, 8, 8, 1) uint8."""
    from sklearn.datasets import load_digits

    values, _ = load_digits(return_X_y=True)
    return np.rint(np.asarray(values).reshape(COUNT, 8, 8, 1) * (255 / 16)).astype(np.uint8)
