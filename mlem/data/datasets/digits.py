"""The 1,797 real 8x8 grey digits that ship with scikit-learn: no network access needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from mlem.data.sources import DataSet, Labels, Source

__all__ = ["COUNT", "Digits"]

COUNT = 1797


@dataclass(frozen=True)
class Digits(DataSet):
    """The 1,797 handwritten digits of scikit-learn, 8x8 grey.

    Images are (8, 8, 1); values 0 .. 16 become 0 .. 255 by round(v * 255 / 16). The classes are the digits.
    """

    def build(self) -> Source:
        info = {"origin": "sklearn.datasets.load_digits"}
        return Source(_images, COUNT, info, labels=Labels(tuple("0123456789"), _labels))


def _images(start: int, stop: int) -> np.ndarray:
    return _digits()[0][start:stop]


def _labels(start: int, stop: int) -> np.ndarray:
    return _digits()[1][start:stop]


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 8, 8, 1) uint8 and labels (1797,)."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    return np.rint(np.asarray(values).reshape(COUNT, 8, 8, 1) * (255 / 16)).astype(np.uint8), np.asarray(labels)
