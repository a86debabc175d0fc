"""The corrector: underdamped Langevin dynamics at a fixed noise level (Algorithm 2, arXiv:2406.00924).

At noise level t its stationary distribution is that of x_t. It runs on `u = x / sigma = y / kappa`, where the score is
-eps: values are of order 1 at every noise level, and the score's Lipschitz constant is `sigma^2 L`, L that of the
score of x. The steps themselves are in `mlem.langevin`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mlem.langevin import Kernel, parallel_underdamped, randomized_midpoint_step, underdamped_step
from mlem.noise import NoiseStream, noise_dtype
from mlem.solvers.base import GridPoint, NoiseEstimate

__all__ = ["METHODS", "UnderdampedLangevin"]

METHODS = ("underdamped", "midpoint", "parallel")
"""Steps of the corrector."""


@dataclass(frozen=True)
class UnderdampedLangevin:
    """T / h steps, starting with fresh velocities. Units: times in 1 / sqrt(L), friction in sqrt(L).

    time: T. step: h. method: `underdamped`, the score frozen within a step; `midpoint`, the score at a random time of
    it, two evaluations; or `parallel`, all frozen-score steps at once in `rounds` rounds, with the noise drawn once.
    Raises ValueError for options out of range.
    """

    time: float = 1.0
    step: float = 0.25
    friction: float = 2.0
    method: str = "underdamped"
    rounds: int = 4

    def __post_init__(self) -> None:
        for name in ("time", "step", "friction"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} of the corrector must be a positive number, got {value!r}")
        if self.step > self.time:
            raise ValueError(f"step of the corrector must be at most its time {self.time:g}, got {self.step:g}")
        if self.method not in METHODS:
            raise ValueError(f"corrector must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not isinstance(self.rounds, int) or isinstance(self.rounds, bool) or self.rounds < 1:
            raise ValueError(f"rounds of the corrector must be a whole number >= 1, got {self.rounds!r}")

    @property
    def steps(self) -> int:
        """Number of steps in the time."""
        return max(1, round(self.time / self.step))

    @property
    def evaluations(self) -> int:
        """Evaluations per correction and sample."""
        return self.steps * {"underdamped": 1, "midpoint": 2, "parallel": self.rounds}[self.method]

    def correct(
        self, eps: NoiseEstimate, y: Tensor, here: GridPoint, lipschitz: float, indices: Tensor, seed: int, number: int
    ) -> Tensor:
        """y (B, ...) after one correction at the noise level of `here`, whose kappa is positive.

        lipschitz: constant of the score of u. number: of the correction, which keys its noise. indices: (B,).
        """
        root, steps = math.sqrt(lipschitz), self.steps
        friction, step = self.friction * root, self.time / steps / root
        stream, shape = NoiseStream(seed, "corrector"), y.shape[1:]

        def normals(first: int, count: int) -> Tensor:
            slots = range((number << 32) + first, (number << 32) + first + count)
            return stream.normal(indices, slots, shape, noise_dtype()).to(y.dtype)

        def score(u: Tensor) -> Tensor:
            kappas = torch.full((len(u),), here.kappa, dtype=torch.float64, device=u.device)
            return -eps(u * here.kappa, here if len(u) == len(y) else kappas)

        u, v = y / here.kappa, normals(0, 1)[0]
        if self.method == "parallel":
            z: Tensor = normals(1, 2 * steps).unflatten(0, (steps, 2))
            u, v = parallel_underdamped(score, u, v, friction, step * steps, steps, self.rounds, z)
        elif self.method == "midpoint":
            fractions = NoiseStream(seed, "corrector-midpoint")
            for i in range(steps):
                a = fractions.uniform(indices, [(number << 32) + i], torch.float64)[0]
                z: Tensor = normals(1 + 4 * i, 4).unflatten(0, (2, 2))
                u, v = randomized_midpoint_step(score, u, v, friction, step, a, z)
        else:
            kernel = Kernel.of(friction, step)
            for i in range(steps):
                u, v = underdamped_step(score(u), u, v, kernel, *normals(1 + 2 * i, 2))
        return u * here.kappa
