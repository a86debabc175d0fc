"""The variables in which randomized midpoints are uniform: kappa, or OU time.

Both write the reverse ODE `dy/dkappa = eps` as an integral over their own variable and freeze something along a step:
`kappa` freezes eps, `ou` freezes the score `-eps / sigma` in the exponential integrator of the OU process, as in
Gupta, Cai and Chen (arXiv:2406.00924). With `e^s = 1 / alpha = sqrt(1 + kappa^2)` and `dkappa/ds = 1 / (alpha sigma)`.
Kappas are tensors of broadcastable shapes, or plain numbers; float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["CLOCKS", "Clock", "Kappa", "KappaClock", "OUClock", "make_clock"]

Kappa = Tensor | float
"""Noise-to-signal ratios."""


def _float64(kappa: Kappa) -> Tensor:
    return torch.as_tensor(kappa, dtype=torch.float64)


class Clock(ABC):
    """A variable of integration, going from kappa to a smaller kappa'."""

    @abstractmethod
    def place(self, kappa: Kappa, there: Kappa, fraction: Tensor) -> Tensor:
        """The kappa at a fraction, in [0, 1], of the way from `kappa` to `there`."""

    @abstractmethod
    def parts(self, kappa: float, there: float, count: int) -> Tensor:
        """kappa, .., there: the ends of `count` parts of the step, (count + 1,)."""

    @abstractmethod
    def drift(self, kappa: Kappa, there: Kappa, at: Kappa) -> Tensor:
        """Weight in y of an eps estimated at kappa `at` and frozen from `kappa` to `there`."""

    @abstractmethod
    def weight(self, kappa: Kappa, there: Kappa, middle: Kappa) -> Tensor:
        """Weight in y of eps at a uniform midpoint; averaged over midpoints, the integral of the step."""


class KappaClock(Clock):
    """Uniform in kappa: every weight is the change of kappa."""

    def place(self, kappa: Kappa, there: Kappa, fraction: Tensor) -> Tensor:
        return kappa + (there - kappa) * fraction

    def parts(self, kappa: float, there: float, count: int) -> Tensor:
        """Even in log kappa, or halving towards 0: parts are short relative to kappa, so Picard iteration contracts."""
        numbers = torch.arange(count + 1, dtype=torch.float64)
        ratio = 0.5 if there == 0 else (there / kappa) ** (1 / count)
        ends = kappa * ratio**numbers
        ends[-1] = there
        return ends

    def drift(self, kappa: Kappa, there: Kappa, at: Kappa) -> Tensor:
        return _float64(there) - kappa

    def weight(self, kappa: Kappa, there: Kappa, middle: Kappa) -> Tensor:
        return torch.zeros_like(_float64(middle)) + (there - kappa)  # like the midpoints, on their device


class OUClock(Clock):
    """Uniform in OU time `s = ln(1 + kappa^2) / 2`. A step to kappa' = 0 has weights of infinite variance."""

    def place(self, kappa: Kappa, there: Kappa, fraction: Tensor) -> Tensor:
        s, s_there = (_float64(end).square().log1p() / 2 for end in (kappa, there))
        # expm1: the square of a small kappa
        return torch.expm1(2 * (s + (s_there - s) * fraction)).sqrt()

    def parts(self, kappa: float, there: float, count: int) -> Tensor:
        """Even in OU time, as in the paper."""
        ends = self.place(kappa, there, torch.linspace(0, 1, count + 1, dtype=torch.float64))
        ends[0], ends[-1] = kappa, there
        return ends

    def drift(self, kappa: Kappa, there: Kappa, at: Kappa) -> Tensor:
        kappa, there, at = _float64(kappa), _float64(there), _float64(at)
        return ((1 + there.square()).sqrt() - (1 + kappa.square()).sqrt()) * (1 + at.square()).sqrt() / at

    def weight(self, kappa: Kappa, there: Kappa, middle: Kappa) -> Tensor:
        kappa, there, middle = _float64(kappa), _float64(there), _float64(middle)
        return (there.square().log1p() - kappa.square().log1p()) / 2 * (1 + middle.square()) / middle


CLOCKS: dict[str, Clock] = {"kappa": KappaClock(), "ou": OUClock()}
"""Name -> clock."""


def make_clock(name: str) -> Clock:
    """The clock called `name`. Raises ValueError for an unknown one."""
    if name not in CLOCKS:
        raise ValueError(f"clock must be one of {', '.join(CLOCKS)}, got {name!r}")
    return CLOCKS[name]
