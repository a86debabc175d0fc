"""The correction of predictions by pilot runs: a factor on predicted errors, with its uncertainty.

The logarithm of measured over predicted, both without the worst images, is a Gaussian process in the logarithms of the
predicted error and of the number of steps: a line, which with few pilots stays near a constant factor, and a bend. The
sizes of the bend and of the pilots' scatter are averaged over, weighted by evidence (Rasmussen and Williams, Gaussian
Processes for Machine Learning, chapters 2 and 5). Reuse of features adds a separate error, whose share rises where the
rest is small.

What happens to one image in a hundred is seen in one measurement and not in the next, so the share of the worst images
in a mean is that of similar measurements together: see `tail`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlem.networks import Reuse

__all__ = [
    "LENGTHS",
    "OTHERS",
    "PILOTS",
    "RECOMMENDED",
    "REUSES",
    "UNKNOWN",
    "Factor",
    "correction",
    "reuse_factor",
    "tail",
]

PILOTS = (
    ("ddpm", "uniform", (32, 64, 128), 0),
    ("unipc", "uniform", (8, 16, 32), 1),
    ("unipc_3", "log_snr", (16, 24, 36), 1),
)
"""Solver, grid, steps and order of held corrections of the pilot plans."""
RECOMMENDED = ("hindsight", "switch")
"""Estimators of recommended plans, and of most pilots."""
REUSES = (Reuse(2, 1), Reuse(3, 1), Reuse(5, 1), Reuse(10, 1))
"""Kinds of reuse with which pilots also run, if the largest level is a UNet: in turn, until one does not pay."""

PRIOR = (2.0, 0.2, 0.2)
"""Prior standard deviations of the constant and of both slopes."""
LENGTHS = (1.5, 0.7)
"""Correlation lengths of the bend, in both logarithms."""
BENDS = (0.3, 1.0)
"""Candidate standard deviations of the bend."""
SCATTERS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Candidate standard deviations of pilots around it."""
OTHERS = math.sqrt(2)
"""Standard deviation of the difference between the means of two equal sets of images, in standard errors of one."""
UNKNOWN = 1.0
"""Standard deviation of a prediction without pilots."""


Floats = NDArray[np.float64]


class Factor(NamedTuple):
    """The factor on a predicted error, and the standard deviation of its logarithm, over as many other images."""

    factor: float
    spread: float


def correction(pilots: Sequence[Sequence[float]], error: float, steps: int) -> Factor:
    """The factor at a predicted error.

    Args:
        pilots: predicted and measured error, and, if known, standard error of the measured one, steps, and its trimmed
            mean.
        error: predicted, > 0.
        steps: of the solver.
    """
    if not pilots:
        return Factor(1.0, UNKNOWN)
    if all(len(row) > 4 for row in pilots):
        places = np.log([[row[0], row[3]] for row in pilots])
        heavy = tail(
            [row[1] for row in pilots], [row[4] for row in pilots], (places - np.log([error, steps])) / LENGTHS
        )
        found = correction([[row[0], row[4], *row[2:4]] for row in pilots], error, steps)
        return Factor(found.factor * heavy.factor, math.hypot(found.spread, heavy.spread))
    predicted, measured = (np.log([row[k] for row in pilots]) for k in (0, 1))
    ratios = measured - predicted
    if len(pilots) < 5 or any(len(row) < 4 for row in pilots):
        # between the pilots closest to that error on either side
        spread = float(np.std(ratios)) if len(pilots) > 1 else UNKNOWN
        return Factor(math.exp(np.interp(math.log(error), predicted, ratios)), max(SCATTERS[0], spread))
    process = _process(tuple(predicted.tolist()), tuple(row[3] for row in pilots), tuple(ratios.tolist()))
    mean, variance = process.at(error, steps)
    # all pilots share their images, so that error does not average out
    images = OTHERS**2 * float(np.mean([(row[2] / row[1]) ** 2 for row in pilots]))
    return Factor(math.exp(mean), math.sqrt(variance + images))


def tail(means: Sequence[float], trimmed: Sequence[float], distances: Floats) -> Factor:
    """Mean over trimmed mean, and the standard deviation of its logarithm, of measurements near by.

    Args:
        means: (N,), over images.
        trimmed: (N,), without the worst images.
        distances: (N,) or (N, D), of each measurement, in correlation lengths.
    """
    ratios = np.divide(means, trimmed)
    squares = np.square(distances.reshape(len(ratios), -1)).sum(1)
    weights = np.exp((squares.min() - squares) / 2)  # far from all, the nearest
    weights /= weights.sum()
    factor = float(weights @ ratios)
    return Factor(factor, math.sqrt(weights @ np.square(np.log(ratios / factor))))


def reuse_factor(pilots: Sequence[Sequence[float]], error: float) -> Factor:
    """The factor of reused features on an error.

    Interpolated between the closest pilots on either side; the factor never rises with the error, and below all pilots
    the resulting error is constant.

    Args:
        pilots: predicted error without reuse, and the factor, in ascending order of the error.
        error: predicted without reuse, > 0.
    """
    places, added = (np.log([row[k] for row in pilots]) for k in (0, 1))
    added = np.maximum.accumulate(np.maximum(added, 0.0)[::-1])[::-1]
    at = math.log(error)
    below = max(0.0, places[0] - at) if added[0] > 0 else 0.0
    right = min(int(np.searchsorted(places, at)), len(places) - 1)
    apart = added[max(right - 1, 0)] - added[right]
    return Factor(math.exp(np.interp(at, places, added) + below), max(SCATTERS[0], (apart + below) / 2))


@lru_cache(256)
def _process(predicted: tuple[float, ...], steps: tuple[float, ...], ratios: tuple[float, ...]) -> _Process:
    """Of pilots: logarithms of predicted errors, numbers of steps, and logarithms of measured over predicted."""
    return _Process(np.stack([predicted, np.log(steps)], 1), np.array(ratios))


class _Process:
    """The Gaussian process through the ratios of P pilots, for each of H pairs of bend and scatter.

    Args:
        places: (P, 2), the logarithms of predicted error and steps.
        ratios: (P,).
    """

    def __init__(self, places: Floats, ratios: Floats) -> None:
        self._places, self._middle = places, places.mean(0)
        bends, self._scatters = np.array([*itertools.product(BENDS, SCATTERS)]).T
        self._squares = bends**2
        noise = (self._scatters**2)[:, None, None] * np.eye(len(places))
        self._roots = np.linalg.cholesky(self._kernel(places, places) + noise)  # (H, P, P)
        self._white = np.linalg.solve(self._roots, ratios[:, None])[..., 0]  # (H, P)
        determinants = np.log(np.diagonal(self._roots, axis1=1, axis2=2)).sum(1)
        evidence = -(self._white**2).sum(1) / 2 - determinants
        weights = np.exp(evidence - evidence.max())
        self._weights: Floats = weights / weights.sum()

    def at(self, error: float, steps: int) -> tuple[float, float]:
        """Mean and variance of the logarithm of measured over predicted, averaged over the pairs by evidence."""
        # beyond the pilots the line is not followed
        here = np.clip(np.log([[error, steps]]), self._places.min(0), self._places.max(0))
        seen = np.linalg.solve(self._roots, self._kernel(self._places, here))[..., 0]  # (H, P)
        means = (self._white * seen).sum(1)
        variances = self._kernel(here, here)[:, 0, 0] - (seen**2).sum(1) + self._scatters**2
        mean = float(self._weights @ means)
        return mean, float(self._weights @ (np.maximum(variances, self._scatters**2) + (means - mean) ** 2))

    def _kernel(self, one: Floats, other: Floats) -> Floats:
        """Covariances without scatter: (N, 2), (M, 2) -> (H, N, M)."""
        line = PRIOR[0] ** 2 + ((one - self._middle) * np.square(PRIOR[1:])) @ (other - self._middle).T
        apart = ((one[:, None] - other[None]) / LENGTHS) ** 2
        return line + self._squares[:, None, None] * np.exp(-apart.sum(2) / 2)
