"""Coins: how often each correction counts at each evaluation, which gives the weights of an unbiased sum.

A table of probabilities p, one row per evaluation of the denoiser and one column per level, becomes a table of counts
with these means. Kinds:

- systematic: one uniform U_k per level; coin k falls at row i when `P_k(i) + U_k` passes a whole number, `P_k` the
  running sum of p_k. Evenly spaced, so that the errors of neighbouring rows cancel.
- bernoulli: independent coins, as in [J] (arXiv:2603.24594).
- nested: one uniform per row, shared by all levels; with falling p_k a coin of level k implies all below.
- poisson: the jumps of a Poisson process whose intensity over row i is p_k(i), the limit of bernoulli coins for small
  steps; a row may hold several. The jumps are drawn in the clock P_k: grids that refine one another share them.

With p = 1 every kind falls exactly once. Each kind is a class; names are looked up only in `COINS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, cast

import torch
from torch import Tensor

from mlem.multilevel import choices
from mlem.noise import NoiseStream

__all__ = ["COINS", "Bernoulli", "Coins", "Nested", "Poisson", "Systematic", "check_probabilities", "coins_called"]


class Coins(ABC):
    """A kind of coins: how they are tossed, and the distribution of their counts in one row.

    Tables are (R, K): R evaluations, K levels. p, q: probabilities of two levels at the same rows, of one shape.
    """

    name: ClassVar[str]
    independent: ClassVar[bool] = True
    """Whether rows are independent, so that their variances add up."""
    pilot: ClassVar[str] = "bernoulli"
    """The kind whose pilots correct predictions for this kind."""

    def toss(self, probabilities: Tensor, seed: int, indices: Tensor | None = None) -> Tensor:
        """How often each coin fell.

        Args:
            probabilities: (R, K), in (0, 1].
            seed: keys the coins, together with the sample indices, if given.
            indices: (B,) int64, of samples with their own coins.

        Returns: (R, K) int64, or (B, R, K) with indices.

        Raises:
            ValueError: a probability is out of range.
        """
        p = check_probabilities(probabilities)
        stream = NoiseStream(seed, f"coins/{'batch' if indices is None else 'sample'}/{self.name}")
        keys = torch.zeros(1, dtype=torch.int64) if indices is None else indices.cpu()
        counts = self.counts(p, stream.uniform(keys, range(self.uniforms(p)), torch.float64).T)
        return counts[0] if indices is None else counts

    @abstractmethod
    def uniforms(self, p: Tensor) -> int:
        """Number of uniform numbers that `counts` needs for one table p (R, K)."""

    @abstractmethod
    def counts(self, p: Tensor, uniforms: Tensor) -> Tensor:
        """Counts from uniform numbers: p (R, K), uniforms (B, `self.uniforms(p)`) -> (B, R, K) int64."""

    def runs(self, p: Tensor, q: Tensor) -> Tensor:
        """Probability that a level runs: its own coin p falls, or q of the level above, and weights do not cancel."""
        return self._either(p, q) - self._cancel(p, q)

    def variance(self, p: Tensor) -> Tensor:
        """Variance of count / p; 0 for p = 1."""
        return 1 / p - 1

    def covariance(self, p: Tensor, q: Tensor) -> Tensor:
        """Covariance of count / p of one level and count / q of another; 0 for independent levels."""
        return torch.zeros_like(p)

    def _either(self, p: Tensor, q: Tensor) -> Tensor:
        """Probability that coin p or coin q falls."""
        return p + q - p * q

    def _cancel(self, p: Tensor, q: Tensor) -> Tensor:
        """Probability that both fall and their weights cancel."""
        return torch.where(p == q, p * q, 0.0)


class Systematic(Coins):
    """Evenly spaced: one uniform number per level."""

    name = "systematic"
    independent = False
    pilot = "systematic"

    def uniforms(self, p: Tensor) -> int:
        return p.shape[1]

    def counts(self, p: Tensor, uniforms: Tensor) -> Tensor:
        certain, running = _running(p)
        passed = torch.floor(running + uniforms[:, None, :])
        return _passed_each_row(passed, certain)


class Bernoulli(Coins):
    """Independent, as in [J] (arXiv:2603.24594)."""

    name = "bernoulli"

    def uniforms(self, p: Tensor) -> int:
        return p.numel()

    def counts(self, p: Tensor, uniforms: Tensor) -> Tensor:
        return (uniforms.view(-1, *p.shape) < p).long()


class Nested(Coins):
    """One uniform number per row, shared by all levels."""

    name = "nested"

    def uniforms(self, p: Tensor) -> int:
        return len(p)

    def counts(self, p: Tensor, uniforms: Tensor) -> Tensor:
        return (uniforms[:, :, None] < p).long()

    def covariance(self, p: Tensor, q: Tensor) -> Tensor:
        return 1 / torch.maximum(p, q) - 1

    def _either(self, p: Tensor, q: Tensor) -> Tensor:
        return torch.maximum(p, q)

    def _cancel(self, p: Tensor, q: Tensor) -> Tensor:
        return torch.where(p == q, p, 0.0)


class Poisson(Coins):
    """Jumps of a Poisson process; a row may hold several."""

    name = "poisson"

    def uniforms(self, p: Tensor) -> int:
        expected = p.sum(0).max().item()
        # enough arrivals for all but one table in 10^9
        return p.shape[1] * math.ceil(expected + 6 * math.sqrt(expected) + 24)

    def counts(self, p: Tensor, uniforms: Tensor) -> Tensor:
        certain, running = _running(p)
        arrivals = -torch.log(uniforms.view(len(uniforms), -1, p.shape[1])).cumsum(1)
        clock = running.T.expand(len(uniforms), -1, -1).contiguous()
        passed = torch.searchsorted(arrivals.transpose(1, 2).contiguous(), clock)
        return _passed_each_row(passed.transpose(1, 2), certain)

    def variance(self, p: Tensor) -> Tensor:
        return torch.where(p < 1, 1 / p, 0.0)

    def _either(self, p: Tensor, q: Tensor) -> Tensor:
        # certain coins fall exactly once; the others are Poisson counts
        none = torch.where(p < 1, torch.exp(-p), 0) * torch.where(q < 1, torch.exp(-q), 0)
        return 1 - none

    def _cancel(self, p: Tensor, q: Tensor) -> Tensor:
        # counts m and n with m / p = n / q, even for different p and q; summed until negligible
        fallen = torch.arange(1.0, 30.0, dtype=p.dtype)[:, None, None]
        other = (fallen * q / p).round()
        cancel = (other > 0) & (fallen / p == other / q)
        both = torch.where(cancel, (_log_poisson(fallen, p) + _log_poisson(other, q)).exp(), 0.0).sum(0)
        return torch.where((p < 1) & (q < 1), both, ((p == 1) & (q == 1)).to(p.dtype))


COINS: dict[str, Coins] = {coins.name: coins for coins in (Systematic(), Bernoulli(), Nested(), Poisson())}
"""Name -> coins, the recommended kind first."""


def coins_called(name: str) -> Coins:
    """The coins of this name. Raises ValueError listing the names."""
    choices.check_choice("coins", name, choices.COINS)
    return COINS[name]


def check_probabilities(probabilities: Tensor) -> Tensor:
    """`probabilities` (R, K) in float64 on the CPU. Raises ValueError for values outside (0, 1] or other shapes."""
    p = torch.as_tensor(probabilities, dtype=torch.float64, device="cpu")
    if p.dim() != 2 or p.numel() == 0:
        raise ValueError(f"probabilities must be a table (evaluations, levels), got shape {tuple(p.shape)}")
    bad = ~((p > 0) & (p <= 1))
    if bool(bad.any()):
        row, level = cast("list[int]", bad.nonzero()[0].tolist())
        raise ValueError(
            f"probabilities must be in (0, 1], got p = {p[row, level]:g} at evaluation {row}, level {level + 1} "
            f"of {p.shape[1]}; leave a level that should never run out of levels="
        )
    return p


def _running(p: Tensor) -> tuple[Tensor, Tensor]:
    """Where p = 1, and the running sums of all other p: (R, K) each.

    A certain coin shifts the running sum by one, which changes nothing: leaving it out avoids rounding errors.
    """
    certain = p >= 1
    return certain, torch.where(certain, 0.0, p).cumsum(0)


def _passed_each_row(passed: Tensor, certain: Tensor) -> Tensor:
    """Counts per row, from the whole numbers passed by the end of each (B, R, K); certain coins fall once."""
    return passed.diff(dim=1, prepend=torch.zeros_like(passed[:, :1])).long() + certain


def _log_poisson(count: Tensor, mean: Tensor) -> Tensor:
    return count * mean.log() - mean - torch.lgamma(count + 1)
