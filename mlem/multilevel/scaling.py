"""The scaling law of a family: how fast the error of levels falls with their cost ([J, Fig. 2], arXiv:2603.24594).

**Which gamma.** [J, Thm 1] supposes `|f^k - f| <= 2^-k` at a cost of `2^(gamma k)`: the root-mean-square error falls
as cost^(-1/gamma), the mean squared error as cost^(-2/gamma). What is measured, the mean squared error of the noise
estimate, has a floor, since the noise cannot be known from x_t: `E|f^k - z|^2 = floor + E|f^k - f*|^2` with f* the
conditional mean. So the law fitted here is

    error_k = floor + A cost_k^(-2/gamma),

and `gamma` is the theorem's: above 2, multilevel pays by theory. [J, Fig. 2] plots `eps_k - eps_inf ~
cost_k^(-1/gamma)`, with eps_inf set by hand. If its eps_k is a mean squared error (or a root of one: near the floor,
sqrt(floor + m) - sqrt(floor) ~ m), then its exponent is `gamma_plotted = gamma / 2` of ours, and only half as large a
number means the same family. Compare like with like.

**The level differences** `E|f^k - f^(k-1)|^2 ~ cost_k^(-2/gamma)` need no floor. Their slope also says directly what
multilevel needs: the coin of level k adds V_k / p_k to the variance and costs p_k c_k; V_k c_k rises with k, so that
expensive levels dominate the cost, exactly when gamma > 2.

The intervals cover other images of the same kind. They do not cover other training runs, nor the deviation of a family
of a few levels from a power law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["CONFIDENCE", "ScalingFit", "fit_differences", "fit_errors"]

_Array = NDArray[np.float64]

CONFIDENCE = 0.95
"""The coverage of all intervals: percentiles of the bootstrap."""


@dataclass(frozen=True, eq=False)
class ScalingFit:
    """A fitted law `value = floor + e^log_scale cost^slope`, mean squared values.

    Args:
        costs, values: (K,), the fitted data, in the units given.
        floor: 0 for level differences.
        log_scale, slope: of the straight line in the logarithms, the floor subtracted.
        replicates: (R, 3), the floor, log_scale and slope of each bootstrap sample.
    """

    costs: _Array
    values: _Array
    floor: float
    log_scale: float
    slope: float
    replicates: _Array

    @property
    def gamma(self) -> float:
        """The theorem's gamma, -2 / slope; inf if the values do not fall with cost."""
        return _gamma(self.slope)

    @property
    def gamma_interval(self) -> tuple[float, float]:
        """The 95 percent interval of gamma; its upper end is inf if some samples do not fall with cost."""
        low, high = _interval(self.replicates[:, 2])
        return _gamma(low), _gamma(high)

    @property
    def gamma_plotted(self) -> float:
        """gamma / 2, the exponent read from a plot of the mean squared excess as cost^(-1/gamma) ([J, Fig. 2])."""
        return self.gamma / 2

    @property
    def floor_interval(self) -> tuple[float, float]:
        """The 95 percent interval of the floor; (0, 0) for level differences."""
        return _interval(self.replicates[:, 0])

    @property
    def verdict(self) -> str:
        """One line: gamma, its interval, and what [J, Thm 1] implies."""
        low, high = self.gamma_interval
        if math.isinf(self.gamma):
            return "the error does not fall with cost: no gamma, and no gain from larger levels"
        found = f"gamma = {self.gamma:.2f} ({low:.2f} to {high:.2f})"
        if high <= 2:
            return f"{found} <= 2: [J, Thm 1] promises a gain from multilevel sampling only for gamma > 2"
        if low <= 2:
            return f"{found}: undecided whether [J, Thm 1] applies, as the interval contains gamma = 2"
        return f"{found} > 2: multilevel pays by theory ([J, Thm 1])"

    def curve(self) -> dict[str, Any]:
        """The input of `mlem.plots.scaling_law`: plain numbers and arrays, the floor subtracted."""
        cost = cast(_Array, np.geomspace(self.costs.min(), self.costs.max(), 50))
        _, log_scale, slope = self.replicates.T[:, :, None]
        low, high = np.quantile(log_scale + slope * np.log(cost), _tails(), axis=0)
        return {
            "cost": self.costs,
            "value": self.values - self.floor,
            "line_cost": cost,
            "line": math.exp(self.log_scale) * cost**self.slope,
            "low": np.exp(low),
            "high": np.exp(high),
            "gamma": self.gamma,
            "interval": self.gamma_interval,
        }


def fit_errors(errors: ArrayLike, costs: ArrayLike, replicates: int = 1000, seed: int = 0) -> ScalingFit:
    """Floor and gamma jointly, `error_k = floor + A cost_k^(-2/gamma)`, by least squares of the log of the excess.

    Args:
        errors: (K, N), mean squared denoising error of each level on each image, > 0; all levels on the same images
            and noise, since images are resampled for all levels together.
        costs: (K,), > 0, all different, in any unit.
        replicates: number of bootstrap samples, >= 100.
        seed: of the bootstrap.

    Returns: the fit, with a floor in [0, lowest mean error).

    Raises:
        ValueError: other input, or fewer than 3 levels.
    """
    table, cost = _check(errors, costs, "errors")
    if len(table) < 3:
        raise ValueError(f"floor and gamma need errors of >= 3 levels, got {len(table)}; train one more level")
    means = _resampled(table, replicates, seed)
    return _result(cost, means, _fit_with_floor(means, np.log(cost)))


def fit_differences(differences: ArrayLike, costs: ArrayLike, replicates: int = 1000, seed: int = 0) -> ScalingFit:
    """gamma from `E|f^k - f^(k-1)|^2 = A cost_k^(-2/gamma)`, k = 2 .. K: the slope of the logs, no floor.

    Args:
        differences: (K-1, N), mean squared difference of levels k and k-1 on each image, > 0, resampled by image.
        costs: (K,), of all levels, > 0, all different; the upper level's cost of each pair is used (for costs in
            constant ratio, gamma does not depend on this choice).
        replicates: number of bootstrap samples, >= 100.
        seed: of the bootstrap.

    Raises:
        ValueError: other input, or fewer than 3 levels.
    """
    cost = np.asarray(costs, dtype=float)
    if cost.ndim != 1 or len(cost) < 3:
        raise ValueError(f"the slope of level differences needs costs of >= 3 levels, got shape {cost.shape}")
    table, cost = _check(differences, cost[1:], "differences")
    means = _resampled(table, replicates, seed)
    lines = _lines(np.log(means), np.log(cost))[:2]
    return _result(cost, means, np.stack([np.zeros(len(means)), *lines], 1))


def _check(table: ArrayLike, costs: ArrayLike, name: str) -> tuple[_Array, _Array]:
    values, cost = np.asarray(table, dtype=float), np.asarray(costs, dtype=float)
    if values.ndim != 2 or values.shape[1] < 2 or cost.shape != values.shape[:1]:
        shapes = f"{name} {values.shape}, costs {cost.shape}"
        raise ValueError(f"{name} must be (levels, images) with >= 2 images and one cost per row, got {shapes}")
    for what, array in ((name, values), ("costs", cost)):
        bad = ~(np.isfinite(array) & (array > 0))
        if bad.any():
            raise ValueError(f"{what} must be finite and > 0, got {array[bad][0]}")
    if len(np.unique(cost)) < len(cost):
        raise ValueError(f"costs must differ from one another, got {cost.tolist()}")
    return values, cost


def _resampled(table: _Array, replicates: int, seed: int) -> _Array:
    """The means over all images, then over those of each bootstrap sample: (1 + replicates, K)."""
    if replicates < 100:
        raise ValueError(f"replicates must be >= 100 for an interval, got {replicates}")
    generator, images = np.random.default_rng(seed), table.shape[1]
    rows: list[_Array] = [table.mean(1)]
    for _ in range(replicates):
        drawn = cast("NDArray[np.int64]", generator.integers(images, size=images))
        counts = np.bincount(drawn, minlength=images)
        rows.append(table @ counts / images)
    return np.stack(rows)


def _lines(y: _Array, x: _Array) -> tuple[_Array, _Array, _Array]:
    """Least squares lines through y (.., K) at x (K,): intercepts, slopes and sums of squared residuals, each (..)."""
    centred = x - x.mean()
    slope = y @ centred / (centred @ centred)
    intercept = y.mean(-1) - slope * x.mean()
    residual = y - intercept[..., None] - slope[..., None] * x
    return intercept, slope, (residual**2).sum(-1)


def _fit_with_floor(means: _Array, log_cost: _Array) -> _Array:
    """Floor, log scale and slope for each row of means (R, K): (R, 3).

    Given the floor, the rest is a straight line, so only one number is searched: the excess of the lowest mean over the
    floor, as a fraction of that mean, in (1e-9, 1], on a shrinking grid of its logarithm.
    """
    lowest = means.min(1, keepdims=True)
    rows, centre = np.arange(len(means)), np.zeros(len(means))
    offsets = np.linspace(math.log(1e-9), 0, 400)[None].repeat(len(means), 0)
    for _ in range(9):
        excess = means[:, None, :] - lowest[..., None] * -np.expm1(offsets)[..., None]
        best = _lines(np.log(excess), log_cost)[2].argmin(1)
        centre, spacing = offsets[rows, best], offsets[:, 1] - offsets[:, 0]
        spread = np.linspace(-1, 1, 21) * spacing[:, None]
        offsets = np.minimum(centre[:, None] + spread, 0)
    floor = lowest[:, 0] * np.abs(np.expm1(centre))
    intercept, slope, _ = _lines(np.log(means - floor[:, None]), log_cost)
    return np.stack([floor, intercept, slope], 1)


def _result(cost: _Array, means: _Array, fits: _Array) -> ScalingFit:
    floor, log_scale, slope = fits[0].tolist()
    return ScalingFit(cost, means[0], floor, log_scale, slope, fits[1:])


def _tails() -> tuple[float, float]:
    return (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2


def _interval(values: _Array) -> tuple[float, float]:
    low, high = np.quantile(values, _tails()).tolist()
    return low, high


def _gamma(slope: float) -> float:
    return -2 / slope if slope < 0 else math.inf
