"""The levels and probabilities of [J, Theorem 1] (A. Jacot, arXiv:2603.24594): from constants, not from measurements.

The setting: a drift f with Lipschitz constant L in x, run by Euler-Maruyama over a time T in steps of size eta;
approximations `|f^k - f| <= 2^-k`; one evaluation of f^k costs at most `c^gamma 2^(gamma k)`. T, eta and 1/L must have
one unit of time, and eps and 2^-k T one unit of space. For trained and measured levels, probabilities follow from the
measurements; this is the theorem's choice if its hypotheses hold.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Theory"]


@dataclass(frozen=True)
class Theory:
    """The choice of [J, Thm 1] for an error of order eps against Euler-Maruyama with f itself, step by step.

    Args:
        gamma: exponent of the cost, > 0.
        c: scale of the cost, > 0.
        L: Lipschitz constant of f, > 0.
        T: length of the run, > 0.
        eps: target root-mean-square error at the end, > 0.

    Raises:
        ValueError: a number is out of range, or e^(2 L T) / eps^2 overflows.

    Warns:
        UserWarning: gamma <= 2.

    **What is implemented, and why.** Let r_n be the root-mean-square distance, after n steps, between the run with
    `F = sum_k B_k/p_k (f^k - f^(k-1))` and the run with f, same noise. Coins are independent from step to step, F has
    mean f^kmax and a variance v of at most |f^k - f^(k-1)|^2 / p_k summed over the k with p_k < 1. Hence

        r_{n+1}^2 <= ((1 + L eta) r_n + eta 2^-kmax)^2 + eta^2 v,

    and by Minkowski's inequality, with N eta = T and (1 + L eta)^N <= e^(L T),

        r_N <= 2^-kmax G_1 + sqrt(eta v G_2),     G_1 = (e^(L T) - 1) / L,     G_2 = (e^(2 L T) - 1) / (2 L).

    - kmax: the smallest level with bias `2^-kmax G_1 <= eps/2`, so `kmax = -floor(log2(eps / (2 G_1)))`. [J] has e^(LT)
      for e^(LT) - 1 and T + eta for T (a last step that overshoots). L/2 and e^(-LT) must multiply eps: were their
      inverses there, a drift that amplifies errors more would be given fewer levels.
    - kmin = -floor(log2 c): the first level that costs 1 or more. It is the base, f^(kmin-1) = 0 and p_kmin = 1: f
      itself need not be small, so the hypotheses bound no variance of a base that runs less often.
    - p_k = min(1, C 2^-(1 + gamma/2) k) above it: it minimises the cost at fixed variance, since
      `|f^k - f^(k-1)| <= 2^-k + 2^-(k-1) = 3 2^-k`. Then `eta v G_2 <= (9 eta G_2 / C) S`, with S the sum over
      kmin < k <= kmax of 2^((gamma/2 - 1) k), and this is eps^2 when `C = 9 eta G_2 S / eps^2`. For gamma > 2,
      `S ~ 2^((gamma/2 - 1) kmax) ~ eps^(1 - gamma/2)`, so `C ~ eta eps^(-1 - gamma/2)` as in [J]. Levels with p_k = 1
      have no variance: where there are some, it is below eps^2.

    In total the error is at most 1.5 eps, besides the order eta of Euler-Maruyama with f itself (additive noise).
    The bound holds for bernoulli and poisson coins (independent, variance of B/p at most 1/p). Systematic coins have
    the same means; their error and cost are measured in `benchmarks/theory.py`.

    **Cost.** p_k is proportional to eta while below 1, so the cost of those levels does not depend on the step. For
    gamma > 2 with eta ~ eps it is O(eps^-gamma), that of a few evaluations of the top level; Euler-Maruyama with that
    level alone costs O(eps^-(gamma + 1)). For gamma <= 2 the theorem promises nothing. By the same bounds, with
    eta ~ eps and gamma < 2: the levels with p = 1, a deterministic prefix, carry the cost, eps^-(1 + gamma/2), and the
    randomized tail adds no more than a constant factor. That exceeds one evaluation of the top level; it is still below
    Euler-Maruyama, since the prefix ends at an accuracy of about sqrt(eps), not eps. At gamma = 2 a factor log^2(1/eps)
    enters.
    """

    gamma: float
    c: float
    L: float
    T: float
    eps: float

    def __post_init__(self) -> None:
        for name in ("gamma", "c", "L", "T", "eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {value}")
        self._refuse_overflow()
        if self.gamma <= 2:
            reason = "[J, Thm 1] promises no speed-up, and levels that always run dominate the cost"
            warnings.warn(f"gamma = {self.gamma:g} <= 2: {reason}", stacklevel=3)

    def _refuse_overflow(self) -> None:
        try:
            finite = bool(torch.isfinite(self.rates(self.levels)).all())
        except (ArithmeticError, ValueError):  # e^(L T) too large, eps too small for a float
            finite = False
        if not finite:
            raise ValueError(
                f"e^(2 L T) / eps^2 overflows for L T = {self.L * self.T:g}, eps = {self.eps:g} and "
                f"gamma = {self.gamma:g}; use a shorter T, a smaller L or a larger eps"
            )

    @property
    def levels(self) -> range:
        """kmin .. kmax, the numbers k of the levels that run; only kmin if it is accurate enough."""
        kmin = -math.floor(math.log2(self.c))
        kmax = -math.floor(math.log2(self.eps / (2 * self.bias_growth)))
        return range(kmin, max(kmin, kmax) + 1)

    @property
    def bias_growth(self) -> float:
        """G_1, in units of time: the drift error per step, times this, bounds the error at the end."""
        return math.expm1(self.L * self.T) / self.L

    @property
    def variance_growth(self) -> float:
        """G_2, in units of time: eta times the drift's variance per step, times this, bounds that at the end."""
        return math.expm1(2 * self.L * self.T) / (2 * self.L)

    def rates(self, k: int | Sequence[int] | Tensor) -> Tensor:
        """lambda_k = C/eta 2^-(1 + gamma/2) k, how often level k > kmin is refreshed per unit of time as eta -> 0.

        Shaped like `k`, float64. The base level kmin is not included: it runs in every step.
        """
        total = sum(2.0 ** ((self.gamma / 2 - 1) * level) for level in self.levels[1:])
        scale = 9 * self.variance_growth * total / self.eps**2
        return scale * 2.0 ** (-(1 + self.gamma / 2) * torch.as_tensor(k, dtype=torch.float64))

    def probabilities(self, eta: float) -> Tensor:
        """p_k of one step of size eta in (0, T], for k in `levels`: (K,) float64 in (0, 1], the first one 1.

        A table for N steps is `probabilities(T / N).expand(N, -1)`. Raises ValueError for other eta.
        """
        if not 0 < eta <= self.T:
            raise ValueError(f"eta must be in (0, T] with T = {self.T:g}, got {eta}")
        p = (eta * self.rates(self.levels)).clamp(max=1)
        p[0] = 1
        return p

    def costs(self) -> Tensor:
        """c^gamma 2^(gamma k) for k in `levels`: (K,) float64, in the unit in which the level at c 2^k = 1 costs 1."""
        return (self.c * 2.0 ** torch.tensor(self.levels, dtype=torch.float64)) ** self.gamma

    def variance_bound(self, eta: float) -> float:
        """eta v G_2, the bound on the coins' share of the mean squared error at the end; at most eps^2."""
        p = self.probabilities(eta)
        squares = 9 * 4.0 ** -torch.tensor(self.levels, dtype=torch.float64)
        return eta * self.variance_growth * (squares / p)[p < 1].sum().item()
