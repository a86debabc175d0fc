"""Cost at equal error: curves of error against cost, and their ratio with a bootstrap interval.

Images are resampled, and also the replicates of the coins: all images share their coins, so replicates differ however
many images there are. With few replicates the interval is somewhat short (about 85 percent instead of 95 with 5 to
15), and with one it is for these coins only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlem.files import damaged

__all__ = ["Advantage", "Ratio", "Setting", "cost_at", "cost_ratio", "frontier"]


@dataclass(frozen=True, eq=False)
class Setting:
    """One point of a curve, measured in T replicates of the coins.

    Attributes:
        costs: (T,).
        errors: squared errors of N images, (T, N).
    """

    costs: np.ndarray
    errors: np.ndarray

    def mean(self, weights: np.ndarray, coins: np.ndarray | None = None) -> tuple[float, float]:
        """Cost and error, averaged over replicates.

        Args:
            weights: of the images, (N,).
            coins: at least T numbers in [0, 1) that resample the replicates; settings of equal T resample alike.
        """
        count = len(self.costs)
        drawn = slice(None) if coins is None else (coins[:count] * count).astype(int)
        return self.costs[drawn].mean(), (self.errors[drawn] @ weights).mean() / weights.sum()

    def best(self, weights: np.ndarray) -> tuple[float, float]:
        """Cost and error of the best replicate, chosen by one half of the images and evaluated on the other, both ways.

        Choosing and evaluating on the same images would be biased. Replicates are never resampled here: a plan is
        memorised with its coins.
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
    """Their cost over ours at equal error. NaN if a curve does not reach that error.

    Attributes:
        error: mean squared error at which costs are compared.
        cost: ours.
        ratio: theirs over ours.
        low: beginning of the 95 percent interval of the ratio.
        high: its end.
        share: of bootstrap samples in which both curves reach the error; the interval is over these.
    """

    error: float
    cost: float
    ratio: float
    low: float
    high: float
    share: float

    @property
    def known(self) -> bool:
        """Whether both curves reach the error."""
        return not math.isnan(self.ratio)

    def to_dict(self) -> dict[str, float | None]:
        """For JSON, which has no NaN: None."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> Ratio:
        """The ratio from `to_dict`; missing values are NaN."""
        values = {name: plain.get(name) for name in ("error", "cost", "ratio", "low", "high", "share")}
        return Ratio(**{name: math.nan if value is None else float(value) for name, value in values.items()})


@dataclass(frozen=True)
class Advantage:
    """Cost of single levels over that of a sampler with a plan, at equal error: an entry of `summary.json`.

    Attributes:
        sampler: its name.
        solver: its solver.
        coins: "mean" over replicates, "best of N" or "one draw".
        mse: the error.
        against: "COST, RIVAL" -> the ratio. COST: time or FLOPs. RIVAL: the largest level, or any.
    """

    sampler: str
    solver: str
    coins: str
    mse: float
    against: Mapping[str, Ratio]

    @property
    def known(self) -> bool:
        """Whether any ratio is."""
        return any(ratio.known for ratio in self.against.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        against = {name: ratio.to_dict() for name, ratio in self.against.items()}
        about = {"sampler": self.sampler, "solver": self.solver, "coins": self.coins, "mse": self.mse}
        return about | {"against": against}

    @staticmethod
    def from_dict(plain: Mapping[str, Any], where: str = "summary.json") -> Advantage:
        """The advantage from `to_dict`. Raises ValueError naming `where` for other data."""
        with damaged(where):
            against = {name: Ratio.from_dict(ratio) for name, ratio in plain["against"].items()}
            return Advantage(plain["sampler"], plain["solver"], plain["coins"], float(plain["mse"]), against)


def frontier(
    settings: Sequence[Setting],
    weights: np.ndarray | None = None,
    best: bool = False,
    coins: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Logs of cost and error, both (M,), of the Pareto-optimal points; cost rises, error falls.

    Args:
        weights: of the images; None: equal.
        best: take the best replicate of a setting, not the mean.
        coins: as in `Setting.mean`.
    """
    weights = np.ones(settings[0].errors.shape[1]) if weights is None else weights
    points = sorted(setting.best(weights) if best else setting.mean(weights, coins) for setting in settings)
    kept: list[tuple[float, float]] = []
    for cost, error in points:
        if error > 0 and (not kept or error < kept[-1][1]):  # skip the reference itself, which has no error
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
    """Cost at which this error is reached, by straight lines in the logarithms; NaN outside the measured range."""
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
    """Their cost over ours at this error. Images are resampled for both together, as they share their noise.

    Args:
        random: of the bootstrap.
        best: count our best replicate, not the mean.
        draws: of the bootstrap.
    """
    count, most = ours[0].errors.shape[1], max(len(setting.costs) for setting in (*theirs, *ours))
    cost = cost_at(ours, error, best=best)
    again = []
    for _ in range(draws):
        weights = np.bincount(random.integers(0, count, count), minlength=count)
        coins = random.random(most)
        again.append(cost_at(theirs, error, weights, coins=coins) / cost_at(ours, error, weights, best, coins))
    ratio, known = cost_at(theirs, error) / cost, np.isfinite(again)
    there = known.any() and math.isfinite(ratio)  # an interval over only the luckier resamplings would mislead
    low, high = np.nanpercentile(again, (2.5, 97.5)) if there else (math.nan, math.nan)
    return Ratio(error, cost, ratio, float(low), float(high), float(known.mean()))
