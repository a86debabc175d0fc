"""The gradient of the error that coins add, by one backward pass: first order, with little noise.

Let the error of a sample relative to its own run with p = 1 be `|sum_i (B_i / p_i - 1) a_i|^2`, a_i the effect of the
correction of row i. With independent coins the mean is `V = sum_i |a_i|^2 (1 / p_i - 1)`, whose derivative by the logit
of p_i is `-|a_i|^2 (1 - p_i) / p_i`. The part through the weights, with the coins fixed, is `2 (1 - p_i)` times as
much. So the derivatives by the weights of fallen coins suffice: there is no score function, which causes most of the
noise of an unbiased gradient.

The a_i are those of the sample, through the actual networks. Large errors are not quadratic in the weights, and the
gradient then has the right shape but the wrong size. Its size is measured: V falls by V if all beta rise by 1 (to first
order; on trained digits also beyond). Near an optimum the gradient of V is opposite to that of the cost, so its size is
corrected along that direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlem.multilevel.learning.objective import GradientEstimate, Objective

__all__ = ["first_order"]


def first_order(
    problem: Objective, theta: Tensor, counts: Tensor, indices: Tensor, plain: Tensor, weight: float
) -> GradientEstimate:
    """The gradient of `V + weight * cost`; its mse is relative to `plain`.

    Args:
        theta: (2 + knots, K - 1).
        counts: (D, R, K), draws of bernoulli coins. indices, plain: (D, B) and (D, B, *shape), the samples of each
            and their runs with p = 1.
        weight: of the cost.

    Affine in means over draws and samples: the mean over ranks with equal shares is that of all their draws.
    """
    theta = theta.detach().double().cpu()
    p = problem.probabilities(theta)
    with torch.enable_grad():
        weights = problem.weights(counts, p).to(plain.device).requires_grad_()
        errors = problem.errors(weights, counts, indices, plain).mean(1)
        # without a gradient, no coin fell
        slopes = torch.autograd.grad(errors.sum(), weights)[0] if errors.requires_grad else torch.zeros_like(weights)
    # collected weights are differences of the levels' B / p
    by_weight = slopes.cpu().diff(dim=-1)
    shape = problem.back(-(counts[..., 1:] / p[:, 1:] * by_weight).mean(0) / 2)
    mse, cost = errors.detach().cpu(), problem.cost_gradient(theta)
    added = shape - cost * (mse.mean() + shape[-1].sum()) / cost[-1].sum()
    return GradientEstimate(mse, problem.cost(theta).item(), added + weight * cost, 1.0)
