"""What pilot runs say of predictions: by which factor a predicted error is off, and how sure that is.

The logarithm of measured over predicted is taken for linear in the logarithms of the predicted error and of the number
of steps. The line is fitted by Bayesian regression: with few pilots it stays near a constant factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlem.networks import Reuse

__all__ = ["PILOTS", "RECOMMENDED", "REUSES", "UNKNOWN", "Factor", "correction"]

PILOTS = (
    ("ddpm", "uniform", (32, 64, 128), 0),
    ("unipc", "uniform", (8, 16, 32), 1),
    ("unipc_3", "log_snr", (16, 24, 36), 1),
)
"""Solver, grid, steps and order of held corrections of the pilot plans."""
RECOMMENDED = ("hindsight", "switch")
"""Estimators of the plans that are recommended: what most pilots are of."""
REUSES = (Reuse(2, 1), Reuse(3, 1), Reuse(5, 1))
"""Of the deep features of the largest level, where it is a UNet: what pilots are run with too."""

PRIOR = (2.0, 0.2, 0.2)
"""Standard deviations, before any pilot is seen, of the constant and of both slopes."""
SCATTER = 0.05
"""Of pilots about the line, at least."""
UNKNOWN = 1.0
"""Of a prediction without pilots."""


class Factor(NamedTuple):
    """What a predicted error is to be multiplied with, and the standard error of its logarithm."""

    factor: float
    spread: float


def correction(pilots: Sequence[Sequence[float]], error: float, steps: int) -> Factor:
    """The factor at a predicted error.

    Args:
        pilots: predicted and measured error, and where they are known standard error of the measured one and steps.
        error: predicted, > 0.
        steps: of the solver.
    """
    if not pilots:
        return Factor(1.0, UNKNOWN)
    predicted, measured = (np.log([row[k] for row in pilots]) for k in (0, 1))
    ratios = measured - predicted
    if len(pilots) < 5 or any(len(row) < 4 for row in pilots):
        # between the pilots nearest to that error on either side
        spread = float(np.std(ratios)) if len(pilots) > 1 else UNKNOWN
        return Factor(math.exp(np.interp(math.log(error), predicted, ratios)), max(SCATTER, spread))
    counts = np.log([row[3] for row in pilots])
    middle = (predicted.mean(), counts.mean())
    features = np.stack([np.ones_like(predicted), predicted - middle[0], counts - middle[1]], 1)
    precision = np.diag([deviation**-2.0 for deviation in PRIOR])
    scatter, line, covariance = SCATTER, np.zeros(3), np.eye(3)
    for _ in range(5):  # the scatter that is left tells how far the line is to be trusted
        covariance = np.linalg.inv(precision + features.T @ features / scatter**2)
        line = covariance @ features.T @ ratios / scatter**2
        left = ((ratios - features @ line) ** 2).sum() / max(1, len(pilots) - 2)
        scatter = max(SCATTER, math.sqrt(left))
    # beyond the pilots the line is not followed
    at = (
        np.clip(math.log(error), predicted.min(), predicted.max()),
        np.clip(math.log(steps), counts.min(), counts.max()),
    )
    here = np.array([1.0, at[0] - middle[0], at[1] - middle[1]])
    # the images are the same for all pilots, so that their chance does not average out
    images = float(np.mean([(row[2] / row[1]) ** 2 for row in pilots]))
    return Factor(math.exp(here @ line), math.sqrt(here @ covariance @ here + scatter**2 + images))
