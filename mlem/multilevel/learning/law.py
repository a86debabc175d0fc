"""From coefficients to probabilities of the coins, their weights, and the expected cost.

`p_k(t) = sigmoid(alpha_k u(t) + beta_k)` for levels 2 .. K, and p_1 = 1. theta is (2, K - 1), float64: alpha, beta;
with knots (2 + knots, K - 1), beta last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlem.multilevel.coefficients import CERTAIN, Coefficients, features
from mlem.multilevel.estimators import collect
from mlem.noise import NoiseStream
from mlem.schedule import NoiseSchedule

__all__ = ["Law"]


class Law:
    """The probabilities under theta, with coins independent between levels.

    Args:
        schedule, times: of the R evaluations of a sample.
        costs: (K,), of one evaluation of each level.
        seed: of directions.
        knots: of the features.
    """

    def __init__(
        self, schedule: NoiseSchedule, times: Sequence[float], costs: Tensor, seed: int, knots: int = 0
    ) -> None:
        self.schedule, self.times, self.costs, self.seed = schedule, list(times), costs.double(), seed
        self.knots = knots
        # features that multiply alpha and beta: (R, 2 + knots)
        self.features = torch.nn.functional.pad(features(schedule, self.times, knots), (0, 1), value=1.0)
        self._directions = NoiseStream(seed, "learning/directions")

    @property
    def levels(self) -> int:
        """K."""
        return len(self.costs)

    def coefficients(self, theta: Tensor) -> Coefficients:
        """The coefficients of theta, including the first level, which is certain."""
        first = torch.zeros(len(theta), 1, dtype=torch.float64)
        first[-1] = CERTAIN
        *alpha, beta = torch.cat([first, theta.detach().double().cpu()], 1)
        return Coefficients(torch.stack(alpha, 1) if self.knots else alpha[0], beta)

    def probabilities(self, theta: Tensor) -> Tensor:
        """p: (R, K), differentiable in theta."""
        learned = torch.sigmoid(self.features @ theta).clamp(min=1e-9)
        return torch.cat([torch.ones_like(learned[:, :1]), learned], 1)

    def cost(self, theta: Tensor) -> Tensor:
        """Expected cost of a sample as a share of the largest level's, scalar, differentiable.

        Level k runs if coin k or coin k + 1 fell. (Weights of two fallen coins cancel for p_k = p_(k+1) exactly; this
        is ignored, as it has no derivative, but `Plan.expected_cost` includes it.)
        """
        p = self.probabilities(theta)
        q = torch.cat([p[:, 1:], torch.zeros_like(p[:, :1])], 1)
        return ((p + q - p * q) @ self.costs).mean() / self.costs[-1]

    def cost_gradient(self, theta: Tensor) -> Tensor:
        """Gradient of `cost`, in closed form: like theta."""
        p = self.probabilities(theta)
        costs, above = self.costs / self.costs[-1], torch.cat([p[:, 2:], torch.zeros_like(p[:, :1])], 1)
        by_p = costs[1:] * (1 - above) + costs[:-1] * (1 - p[:, :-1])
        return self.back(by_p * p[:, 1:] * (1 - p[:, 1:])) / len(p)

    def back(self, by_logit: Tensor) -> Tensor:
        """From the derivative by the logits (.., R, K - 1) to that by theta (.., 2 + knots, K - 1)."""
        return self.features.T @ by_logit.to(self.features)

    def directions(self, step: int, draws: int) -> Tensor:
        """A random sign per coefficient and draw, the same on all ranks: (D, 2 + knots, K - 1)."""
        keys, rows = torch.arange(step * draws, (step + 1) * draws), 2 + self.knots
        uniforms = self._directions.uniform(keys, range(rows * (self.levels - 1)), torch.float64)
        return (2 * (uniforms < 0.5).double() - 1).T.reshape(draws, rows, self.levels - 1)

    def weights(self, counts: Tensor, p: Tensor) -> Tensor:
        """Collected weights of the levels: counts (.., R, K) and p (R, K) -> (.., R, K)."""
        return collect(counts / p)

    def weight_tangents(self, counts: Tensor, p: Tensor, direction: Tensor) -> Tensor:
        """Derivative of `weights` along `direction` (.., 2 + knots, K - 1): `d(B/p) = -B (1 - p) / p dlogit p`."""
        by_logit = self.features @ direction  # (.., R, K - 1)
        moved = -counts[..., 1:] * (1 - p[:, 1:]) / p[:, 1:] * by_logit
        return collect(torch.cat([torch.zeros_like(moved[..., :1]), moved], -1))
