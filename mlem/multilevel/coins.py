"""Coins: how often each correction is paid for at each evaluation, and with them the weights of an unbiased sum.

A table of probabilities p, one row for each evaluation of the denoiser and one column for each level, becomes a table
of counts with these means. Kinds:

- systematic: one uniform U_k for each level; coin k falls at row i when `P_k(i) + U_k` passes a whole number, `P_k`
  the running sum of p_k. Evenly spaced, so that the errors of neighbouring rows cancel.
- bernoulli: every coin by itself, as in [J] (arXiv:2603.24594).
- nested: one uniform for each row, shared by all levels; with falling p_k a coin of level k implies all below.
- poisson: the jumps of a Poisson process whose intensity over row i is p_k(i), the limit of bernoulli coins for small
  steps; a row may hold several. The jumps are drawn in the clock P_k: grids that refine one another share them.

Where p = 1 every kind is certain to fall, once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlem.noise import NoiseStream

COINS = ("systematic", "bernoulli", "nested", "poisson")
"""The kinds of coins, the recommended one first."""


def check_coins(coins: str) -> str:
    """`coins` itself; raises ValueError when it is not one of COINS."""
    if coins not in COINS:
        raise ValueError(f"coins must be one of {', '.join(COINS)}, got {coins!r}")
    return coins


def check_probabilities(probabilities: Tensor) -> Tensor:
    """`probabilities` (R, K) in float64 on the CPU. Raises ValueError outside (0, 1] and for other shapes."""
    p = torch.as_tensor(probabilities, dtype=torch.float64, device="cpu")
    if p.dim() != 2 or p.numel() == 0:
        raise ValueError(f"probabilities must be a table (evaluations, levels), got shape {tuple(p.shape)}")
    bad = ~((p > 0) & (p <= 1))
    if bool(bad.any()):
        row, level = bad.nonzero()[0].tolist()
        raise ValueError(
            f"probabilities must be in (0, 1], got p = {p[row, level]:g} at evaluation {row}, level {level + 1} "
            f"of {p.shape[1]}; leave a level that should never run out of levels="
        )
    return p


def toss(coins: str, probabilities: Tensor, seed: int, indices: Tensor | None = None) -> Tensor:
    """How often each coin fell: (R, K) int64, or (B, R, K) for the samples with these indices (B,), each its own.

    probabilities: (R, K) in (0, 1]. Keyed by seed (and sample index). Raises ValueError for bad probabilities.
    """
    p = check_probabilities(probabilities)
    stream = NoiseStream(seed, f"coins/{'batch' if indices is None else 'sample'}/{check_coins(coins)}")
    keys = torch.zeros(1, dtype=torch.int64) if indices is None else indices.cpu()
    uniforms = stream.uniform(keys, range(uniforms_needed(coins, p)), torch.float64).T
    counts = falls(coins, p, uniforms)
    return counts[0] if indices is None else counts


def uniforms_needed(coins: str, p: Tensor) -> int:
    """How many uniform numbers `falls` wants for one table p (R, K)."""
    if coins == "poisson":
        expected = p.sum(0).max().item()
        # arrivals enough but for one table in 10^9
        return p.shape[1] * math.ceil(expected + 6 * math.sqrt(expected) + 24)
    return {"bernoulli": p.numel(), "systematic": p.shape[1], "nested": len(p)}[coins]


def falls(coins: str, p: Tensor, uniforms: Tensor) -> Tensor:
    """The counts that these uniform numbers mean: p (R, K), uniforms (B, uniforms_needed) -> (B, R, K) int64."""
    rows, levels = p.shape
    if coins == "bernoulli":
        return (uniforms.view(-1, rows, levels) < p).long()
    if coins == "nested":
        return (uniforms[:, :, None] < p).long()
    # a certain coin shifts the running sum by one, which changes nothing: left out, so that no rounding can lose it
    certain = p >= 1
    running = torch.where(certain, 0.0, p).cumsum(0)
    if coins == "systematic":
        passed = torch.floor(running + uniforms[:, None, :])
    else:
        arrivals = -torch.log(uniforms.view(len(uniforms), -1, levels)).cumsum(1)
        passed = torch.searchsorted(
            arrivals.transpose(1, 2).contiguous(), running.T.expand(len(uniforms), -1, -1).contiguous()
        )
        passed = passed.transpose(1, 2)
    return passed.diff(dim=1, prepend=torch.zeros_like(passed[:, :1])).long() + certain
