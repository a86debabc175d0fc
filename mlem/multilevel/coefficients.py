"""Learnable probabilities, `p_k(t) = sigmoid(alpha_k u(t) + beta_k)`; alpha_k and beta_k as in [J], arXiv:2603.24594.

The feature is ours: u(t) is the log signal-to-noise ratio, standardised by the mean and standard deviation of a uniform
distribution in log-SNR between t = 1/N and t = 1, so coefficients mean the same on every grid. With knots c_1 .. c_n,
even in u over that range, `alpha_k u` becomes piecewise linear, `alpha_k0 u + sum_j alpha_kj max(0, u - c_j)`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from mlem.files import damaged
from mlem.schedule import NoiseSchedule

__all__ = ["CERTAIN", "COMMAND", "Coefficients", "features"]

COMMAND = "python train.py model=coefficients"
"""The command to run if no coefficients fit."""
CERTAIN = 40.0
"""A beta so large that p = 1 in float64."""


def features(schedule: NoiseSchedule, times: Sequence[float] | Tensor, knots: int = 0) -> Tensor:
    """u(t), and max(0, u(t) - c_j) of the knots: times (R,) in (0, 1] -> (R, 1 + knots) float64."""
    high, low = (schedule.log_snr(t).item() for t in (1 / schedule.num_timesteps, schedule.last))
    log_snr = schedule.log_snr(torch.as_tensor(times, dtype=torch.float64))
    u = ((log_snr - (high + low) / 2) / ((high - low) / math.sqrt(12)))[:, None]
    places = math.sqrt(3) * (2 * torch.arange(1, knots + 1, dtype=torch.float64) / (knots + 1) - 1)
    return torch.cat([u, (u - places).clamp(min=0)], 1)


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The coefficients of each level; the first level usually has p = 1 (`beta = CERTAIN`).

    Args:
        alpha: (K,), or (K, 1 + knots); finite.
        beta: (K,), finite.
        levels: their names; empty means all of a family's.
        about: solver, steps, grid and log-SNR range of the fit, and its outcome; plain data.

    Raises:
        ValueError: alpha and beta differ in shape or are not finite.
    """

    alpha: Tensor
    beta: Tensor
    levels: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name), dtype=torch.float64))
        if self.beta.dim() != 1 or self.alpha.dim() not in (1, 2) or len(self.alpha) != len(self.beta):
            raise ValueError(
                f"alpha must be (levels,) or (levels, 1 + knots) and beta (levels,), got {tuple(self.alpha.shape)} and "
                f"{tuple(self.beta.shape)}"
            )
        if not bool(torch.isfinite(self.alpha).all() and torch.isfinite(self.beta).all()):
            raise ValueError(f"alpha and beta must be finite; fit them again: {COMMAND}")

    def probabilities(self, schedule: NoiseSchedule, times: Sequence[float] | Tensor, delta: float = 0.0) -> Tensor:
        """p_k at these times: (R, K) float64. delta is added to every beta but the first, as in Fig. 1 of [J]."""
        shift = torch.full_like(self.beta, delta).index_fill_(0, torch.tensor(0), 0.0)
        alpha = self.alpha.view(len(self.beta), -1)
        logits = features(schedule, times, alpha.shape[1] - 1) @ alpha.T + self.beta + shift
        # never 0: the weight of a level that could not run would be infinite
        return torch.sigmoid(logits).clamp(min=1e-9)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the coefficients: 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain: dict[str, Any] = {"alpha": self.alpha.tolist(), "beta": self.beta.tolist()}
        return plain | {"levels": list(self.levels), "about": self.about}

    @staticmethod
    def from_dict(plain: dict[str, Any], where: str = "the coefficients") -> Coefficients:
        """The coefficients described by `to_dict`. Raises ValueError naming `where` for other data."""
        with damaged(where, f"fit them again: {COMMAND}"):
            levels, about = tuple(map(str, plain["levels"])), dict(plain["about"])
            return Coefficients(plain["alpha"], plain["beta"], levels, about)

    @staticmethod
    def fit(
        probabilities: Tensor, schedule: NoiseSchedule, times: Sequence[float], knots: int = 0
    ) -> tuple[Tensor, Tensor]:
        """alpha and beta closest (least squares in the logit) to a table of probabilities (R, K)."""
        design = torch.nn.functional.pad(features(schedule, times, knots), (0, 1), value=1.0)
        logits = torch.logit(probabilities.double().clamp(1e-6, 1 - 1e-3))
        # by SVD: with fewer rows than features the minimum-norm solution, which rounding cannot change
        solution = cast(Tensor, torch.linalg.lstsq(design, logits, rcond=1e-7, driver="gelsd").solution)
        certain = (probabilities >= 1).all(0)
        alpha = torch.where(certain, 0.0, solution[:-1]).T
        return alpha if knots else alpha[:, 0], torch.where(certain, CERTAIN, solution[-1])
