"""How the distribution of the coins depends on theta: the draws of an update, and the gradient from their errors.

`J = E f(B)`, f the error with counts B, has a gradient of two parts. The pathwise part moves the weights `B / p` with
the coins fixed. The other part moves the coins, and is estimated as a sum of errors times scores:

- bernoulli: `f(B) sum_i (B_k(i) - p_k(i)) dlogit p_k(i)`, the score function.
- systematic: the coins of level k depend on one uniform number U, and are constant between the places
  `a_i = -P_k(i) mod 1`, `P_k` the running sum of p_k. So E f is a sum of lengths times errors, and only the lengths
  move: `sum_i (f(just above a_i) - f(just below)) dP_k(i)`. The two tables at a_i differ in one coin, which falls at
  row i or later. A draw takes one uniformly random row i per level; other levels have the coins of the draw. This is
  exact and unbiased; E f has kinks (no jumps) only where two places meet, which happens for exceptional theta.

U also has places at 0 and 1, but these do not move.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mlem.multilevel.coins import COINS
from mlem.multilevel.learning.law import Law
from mlem.noise import NoiseStream

__all__ = ["CHANCES", "Chance", "Draws", "segments"]


@dataclass(frozen=True)
class Draws:
    """D draws of the coins, with T tables each, whose errors are summed with scores.

    counts: (.., D, R, K), whose weights are differentiated. tables: (.., D, T, R, K), or None if they are `counts`
    (T = 1). scores: (.., D, T, 2 + knots, K - 1).
    """

    counts: Tensor
    tables: Tensor | None
    scores: Tensor


class Chance(ABC):
    """The part of the gradient that moves the coins, for one kind."""

    def __init__(self, seed: int) -> None:
        self._stream = NoiseStream(seed, f"learning/{self.stream}")

    stream: str

    @abstractmethod
    def draw(self, law: Law, theta: Tensor, step: int, draws: int) -> Draws:
        """D draws of this optimizer step, the same on all ranks."""

    @abstractmethod
    def expected(self, law: Law, theta: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For a quadratic form (C, R, C, R) in `B / p - 1`: its mean and the means of both gradient parts, exactly."""

    def _uniforms(self, step: int, draws: int, count: int) -> Tensor:
        keys = torch.arange(step * draws, (step + 1) * draws)
        return self._stream.uniform(keys, range(count), torch.float64).T


class BernoulliChance(Chance):
    stream = "coins"

    def draw(self, law: Law, theta: Tensor, step: int, draws: int) -> Draws:
        p, coins = law.probabilities(theta), COINS["bernoulli"]
        counts = coins.counts(p, self._uniforms(step, draws, coins.uniforms(p)))
        return Draws(counts, None, law.back(counts[..., 1:] - p[:, 1:])[:, None])

    def expected(self, law: Law, theta: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = law.probabilities(theta)[:, 1:]
        alone = matrix.flatten(2).flatten(0, 1).diagonal().view(matrix.shape[:2]).T  # (R, C)
        pathwise, chance = -2 * alone * (1 - p).square() / p, alone * (1 - p) * (1 / p - 2)
        return (alone * (1 / p - 1)).sum(), law.back(pathwise), law.back(chance)


class SystematicChance(Chance):
    stream = "systematic"

    def draw(self, law: Law, theta: Tensor, step: int, draws: int) -> Draws:
        p, coins = law.probabilities(theta), COINS["systematic"]
        rows, learned = len(p), law.levels - 1
        uniforms = self._uniforms(step, draws, law.levels + learned)
        counts = coins.counts(p, uniforms[:, : law.levels])
        chosen = (uniforms[:, law.levels :] * rows).long().clamp(max=rows - 1)  # (D, K - 1)
        tables = counts[:, None].repeat(1, 2 * learned, 1, 1)
        scores = torch.zeros(draws, 2 * learned, law.features.shape[1], learned, dtype=torch.float64)
        for k in range(learned):
            above, below, moved = _places(law, p, k)
            row = chosen[:, k]
            tables[:, 2 * k, :, k + 1], tables[:, 2 * k + 1, :, k + 1] = above[row], below[row]
            scores[:, 2 * k, :, k] = rows * moved[row]
            scores[:, 2 * k + 1, :, k] = -rows * moved[row]
        return Draws(counts, tables, scores)

    def expected(self, law: Law, theta: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = law.probabilities(theta)
        total = torch.zeros((), dtype=torch.float64)
        by_logit, chance = torch.zeros_like(p[:, 1:]), torch.zeros_like(theta, dtype=torch.float64)
        for k in range(law.levels - 1):  # of different levels, independent and of mean 0, products have mean 0
            form, own = matrix[k, :, k], p[:, k + 1]
            lengths, counts = segments(own)
            excess = counts / own - 1
            total += lengths @ ((excess @ form) * excess).sum(1)
            by_logit[:, k] = lengths @ (-2 * (excess @ form) * counts) * (1 - own) / own
            above, below, moved = _places(law, p, k)
            higher, lower = (((table / own - 1) @ form * (table / own - 1)).sum(1) for table in (above, below))
            chance[:, k] = (higher - lower) @ moved
        return total, law.back(by_logit), chance


def segments(p: Tensor) -> tuple[Tensor, Tensor]:
    """For systematic coins with p (R,): the lengths (N,) over which U changes nothing, and the counts there (N, R)."""
    free = p < 1
    running = torch.where(free, p, 0.0).cumsum(0)
    places = ((-running[free]) % 1).sort().values
    ends = torch.cat([torch.zeros(1, dtype=p.dtype), places, torch.ones(1, dtype=p.dtype)])
    middles = ((ends[1:] + ends[:-1]) / 2).detach()
    counts = COINS["systematic"].counts(p.detach()[:, None], middles[:, None])[..., 0]
    return ends.diff(), counts


def _places(law: Law, p: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The counts of level k + 2 with U just above and just below each a_i, (R, R) each, and dP(i), (R, 2 + knots)."""
    own = p[:, k + 1]
    certain = own >= 1
    moves = torch.where(certain, 0.0, own * (1 - own))
    moved = (moves[:, None] * law.features).cumsum(0)
    # a row with a certain coin ends where the previous one does, which is counted
    moved = torch.where(certain[:, None], 0.0, moved)
    running = torch.where(certain, 0.0, own).cumsum(0)
    same = (running[:, None] == running) & (running > 0)
    exact = running + (torch.ceil(running) - running)[:, None]
    passed = torch.where(same, torch.ceil(running)[:, None], torch.floor(exact))

    def counts(passed: Tensor) -> Tensor:
        return passed.diff(dim=1, prepend=torch.zeros_like(passed[:, :1])).long() + certain

    return counts(passed), counts(passed - same.to(passed.dtype)), moved


CHANCES: dict[str, type[Chance]] = {"systematic": SystematicChance, "bernoulli": BernoulliChance}
"""Name of the coins -> their part of the gradient."""
