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
from collections.abc import Iterator, Sequence
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
REUSES = (Reuse(2, 1), Reuse(3, 1), Reuse(5, 1))
"""Kinds of reuse with which pilots also run, if the largest level is a UNet."""

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
    places = np.stack([predicted, np.log([row[3] for row in pilots])], 1)
    # beyond the pilots the line is not followed
    here = np.clip(np.log([[error, steps]]), places.min(0), places.max(0))
    evidence, means, variances = np.array([*_fits(places, ratios, here)]).T
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    mean = float(weights @ means)
    variance = float(weights @ (variances + (means - mean) ** 2))
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


def _fits(places: Floats, ratios: Floats, here: Floats) -> Iterator[tuple[float, float, float]]:
    """For each bend and scatter, the log evidence of the ratios, and the mean and variance here.

    places: (P, 2). ratios: (P,). here: (1, 2).
    """
    middle = places.mean(0)

    def kernel(one: Floats, other: Floats, bend: float) -> Floats:
        line = PRIOR[0] ** 2 + ((one - middle) * np.square(PRIOR[1:])) @ (other - middle).T
        apart = ((one[:, None] - other[None]) / LENGTHS) ** 2
        return line + bend**2 * np.exp(-apart.sum(2) / 2)

    for bend, scatter in itertools.product(BENDS, SCATTERS):
        covariance = kernel(places, places, bend) + scatter**2 * np.eye(len(places))
        root = np.linalg.cholesky(covariance)
        white, seen = np.linalg.solve(root, ratios), np.linalg.solve(root, kernel(places, here, bend))
        evidence = -white @ white / 2 - np.log(np.diag(root)).sum()
        variance = kernel(here, here, bend).item() - (seen**2).sum() + scatter**2
        yield float(evidence), (white @ seen).item(), float(max(variance, scatter**2))
