"""What the same error costs: curves of error against cost, and their ratio with a bootstrap interval.

Images are resampled, and the draws of the coins too: all images share their coins, so draws differ however many images
there are. With few draws the interval is somewhat short (about 85 percent instead of 95 with 5 to 15), and with one
it holds for these coins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Setting:
    """One point of a curve, measured in T draws of the coins: costs (T,), squared errors of N images (T, N)."""

    costs: np.ndarray
    errors: np.ndarray

    def mean(self, weights: np.ndarray, coins: np.ndarray | None = None) -> tuple[float, float]:
        """Cost and error on average over the draws. weights: (N,) of the images.

        coins: at least T numbers in [0, 1) that resample the draws; settings of as many draws resample alike.
        """
        count = len(self.costs)
        drawn = slice(None) if coins is None else (coins[:count] * count).astype(int)
        return self.costs[drawn].mean(), (self.errors[drawn] @ weights).mean() / weights.sum()

    def best(self, weights: np.ndarray) -> tuple[float, float]:
        """Cost and error of the best draw. One half of the images chooses, the other judges, and in turn.

        So the choice does not flatter itself, as it would if the images that choose also judged. Draws are never
        resampled here: a plan is memorised with its coins.
        """
        even = np.arange(len(weights)) % 2 == 0
        cost = error = 0.0
        for half in (weights * even, weights * ~even):
            chosen = (self.errors @ (weights - half)).argmin()
            cost += self.costs[chosen] * half.sum()
            error += self.errors[chosen] @ half
        return cost / weights.sum(), error / weights.sum()


@dataclass(frozen=True)
class Ratio:
    """ratio: their cost over ours at equal error, with its 95 percent interval; nan where a curve does not go there.

    cost: ours. share: how much of the bootstrap both curves reach that error in; the interval is over these.
    """

    error: float
    cost: float
    ratio: float
    low: float
    high: float
    share: float

    def to_dict(self) -> dict[str, float | None]:
        """For JSON, which has no nan: None."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


def frontier(
    settings: Sequence[Setting],
    weights: np.ndarray | None = None,
    best: bool = False,
    coins: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Logs of cost and error, both (M,), of the points that no other beats in both; cost rises, error falls.

    weights: of the images. best: of the draws of a setting take the best, not the mean. coins: as in `Setting.mean`.
    """
    weights = np.ones(settings[0].errors.shape[1]) if weights is None else weights
    points = sorted(setting.best(weights) if best else setting.mean(weights, coins) for setting in settings)
    kept: list[tuple[float, float]] = []
    for cost, error in points:
        if error > 0 and (not kept or error < kept[-1][1]):  # the reference itself, of no error, is no point
            kept.append((cost, error))
    costs, errors = np.log(np.asarray(kept).reshape(-1, 2)).T
    return costs, errors


def cost_at(
    settings: Sequence[Setting],
    error: float,
    weights: np.ndarray | None = None,
    best: bool = False,
    coins: np.ndarray | None = None,
) -> float:
    """Cost at which this error is reached, by straight lines in the logarithms; nan outside of what was measured."""
    costs, errors = frontier(settings, weights, best, coins)
    if not len(errors) or not errors.min() <= math.log(error) <= errors.max():
        return math.nan
    return float(np.exp(np.interp(-math.log(error), -errors, costs)))


def cost_ratio(
    theirs: Sequence[Setting],
    ours: Sequence[Setting],
    error: float,
    random: np.random.Generator,
    *,
    best: bool = False,
    draws: int = 400,
) -> Ratio:
    """Cost of theirs over cost of ours at this error. Images are resampled for all together: they share their noise.

    best: of our draws of the coins.
    """
    count, most = ours[0].errors.shape[1], max(len(setting.costs) for setting in (*theirs, *ours))
    cost = cost_at(ours, error, best=best)
    again = []
    for _ in range(draws):
        weights = np.bincount(random.integers(0, count, count), minlength=count)
        coins = random.random(most)
        again.append(cost_at(theirs, error, weights, coins=coins) / cost_at(ours, error, weights, best, coins))
    ratio, known = cost_at(theirs, error) / cost, np.isfinite(again)
    there = known.any() and math.isfinite(ratio)  # an interval of the luckier resamplings alone would mislead
    low, high = np.nanpercentile(again, (2.5, 97.5)) if there else (math.nan, math.nan)
    return Ratio(error, cost, ratio, float(low), float(high), float(known.mean()))
