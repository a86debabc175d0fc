"""The coefficients of least predicted error at a given cost, without network evaluations.

With coins independent between rows and levels, the error that a law adds is, by linear response,
`sum_k,i V_k(i) (1 / p_k(i) - 1)`: V_k(i) is the error from losing just the correction of level k at row i, known from
a calibration. It is smooth in alpha and beta, and so is the expected cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor

from mlem.multilevel.learning.law import Law

__all__ = ["PathPoint", "least_variance", "optimal_path", "predicted_variance"]

_STEEP, _FAR = 40.0, 60.0
"""Bounds of |alpha| and |beta|: beyond them a sigmoid is a step, or 0 or 1."""
_EXACT = 1e-6
"""Tolerance on the cost."""


def predicted_variance(law: Law, theta: Tensor, worth: Tensor) -> Tensor:
    """The mean squared error that the coins add; worth: (R, K - 1), V. Differentiable in theta (2 + knots, K - 1)."""
    return (worth * (1 / law.probabilities(theta)[:, 1:] - 1)).sum()


@dataclass(frozen=True)
class PathPoint:
    """A law that no other of its form is predicted to beat at its cost.

    Attributes:
        cost: expected, as a share of the largest level's.
        error: the mean squared error that the coins are predicted to add.
        weight: lambda, for which the law minimises `error + lambda cost`; the slope of the curve.
        theta: (2 + knots, K - 1).
        levels: the names of its levels, cheapest first; empty if they have none.
    """

    cost: float
    error: float
    weight: float
    theta: Tensor
    levels: tuple[str, ...] = ()


def optimal_path(law: Law, worth: Tensor, start: Tensor, costs: Sequence[float]) -> list[PathPoint]:
    """The laws of least `predicted_variance` at each of these costs, ascending: all minima of `error + lambda cost`.

    start: as for `least_variance`; each law is found from its neighbour's, beginning at the cost nearest to that of
    start. A cost that the form of the law cannot have is left out.
    """
    costs, spent = sorted(costs), law.cost(start).item()
    middle = min(range(len(costs)), key=lambda i: abs(costs[i] - spent))
    points: dict[float, PathPoint] = {}
    for side in (costs[middle:], costs[:middle][::-1]):
        theta = points[costs[middle]].theta if costs[middle] in points else start
        for cost in side:
            theta = least_variance(law, worth, theta, cost)
            if abs(law.cost(theta).item() - cost) < _EXACT:
                points[cost] = _point(law, theta, worth)
    return [points[cost] for cost in costs if cost in points]


def _point(law: Law, theta: Tensor, worth: Tensor) -> PathPoint:
    theta = theta.detach().requires_grad_()
    error, cost = predicted_variance(law, theta, worth), law.cost(theta)
    by, price = (torch.autograd.grad(value, theta)[0].flatten() for value in (error, cost))
    weight = -(by @ price / (price @ price)).item()
    return PathPoint(cost.item(), error.item(), weight, theta.detach())


def least_variance(law: Law, worth: Tensor, start: Tensor, cost: float) -> Tensor:
    """theta (2 + knots, K - 1) of least `predicted_variance` whose `law.cost` is `cost`, found from `start`.

    Sequential quadratic programming (SLSQP) with exact gradients; `start` itself if that finds nothing better.
    """

    def differentiated(numbers: Any, value: Any) -> tuple[float, Any]:
        theta = torch.as_tensor(numbers, dtype=torch.float64).view(start.shape).requires_grad_()
        found = value(theta)
        (gradient,) = torch.autograd.grad(found, theta)
        return found.item(), gradient.flatten().numpy()

    def error(numbers: Any) -> tuple[float, Any]:
        return differentiated(numbers, lambda theta: predicted_variance(law, theta, worth).log())

    def spent(numbers: Any) -> tuple[float, Any]:
        return differentiated(numbers, lambda theta: law.cost(theta) - cost)

    same_cost = {"type": "eq", "fun": lambda numbers: spent(numbers)[0], "jac": lambda numbers: spent(numbers)[1]}
    far = torch.full_like(start, _STEEP)
    far[-1] = _FAR
    found: Any = minimize(
        error,
        start.flatten().numpy(),
        jac=True,
        method="SLSQP",
        bounds=[(-bound, bound) for bound in far.flatten().tolist()],
        constraints=same_cost,
        options={"maxiter": 300},
    )
    theta = torch.as_tensor(found.x, dtype=torch.float64).view(start.shape)
    return theta if abs(law.cost(theta).item() - cost) < _EXACT else start
