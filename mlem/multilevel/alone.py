"""The error of the largest level alone, between and beyond the measured numbers of steps."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mlem.multilevel.calibration import Calibration
from mlem.multilevel.correction import LENGTHS, OTHERS, UNKNOWN, tail

__all__ = ["Alone", "error_alone"]

BETWEEN = 0.08
"""Standard deviation of the logarithm of an error about the line between two measured numbers of steps."""


class Alone(NamedTuple):
    """A mean squared error, and the standard deviation of its logarithm over sets of as many other images."""

    error: float
    spread: float


def error_alone(calibration: Calibration, name: str, steps: int) -> Alone | None:
    """The error of a solver on a grid, as measured, or by a power law between measurements.

    The law is that of the means without the worst images; the share of these is that of all measurements near by.

    Args:
        calibration: of the family.
        name: "solver/grid", with the kind of reuse as suffix, if any.
        steps: of the solver.

    Returns: None if it was not measured.
    """
    measured, stderr = calibration.discretisation.get(name), calibration.stderr.get(name)
    if measured is None:
        return None
    counts = sorted(measured)
    kept = calibration.trimmed.get(name, measured)
    distances = np.log(np.divide(counts, steps)) / LENGTHS[1]
    heavy = tail([measured[count] for count in counts], [kept[count] for count in counts], distances)
    near = counts[int(np.abs(distances).argmin())]
    images = OTHERS * stderr[near] / measured[near] if stderr else UNKNOWN
    apart = 0.0 if steps in measured else BETWEEN
    return Alone(_power_law(kept, steps) * heavy.factor, math.hypot(images, heavy.spread, apart))


def _power_law(points: dict[int, float], steps: int) -> float:
    """Between two measured step counts, and beyond them, a straight line in the logarithms."""
    counts = sorted(points)
    high = min(max(1, sum(count < steps for count in counts)), len(counts) - 1)
    a, b = counts[high - 1], counts[high]
    slope = math.log(points[b] / points[a]) / math.log(b / a)
    return points[a] * (steps / a) ** slope
