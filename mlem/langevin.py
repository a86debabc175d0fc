"""Underdamped Langevin dynamics: steps with exact noise.

    dx = v dt,    dv = -g v dt + score(x) dt + sqrt(2 g) dB,    score = -grad V

has the stationary distribution `exp(-V(x)) N(v; 0, I)`, g the friction. Three discretisations:

- `underdamped_step`: the exact transition with the score frozen at the start of the step (Cheng, Chatterji, Bartlett
  and Jordan, "Underdamped Langevin MCMC", arXiv:1707.03663, with their u = 1 and any friction). Weak order 1.
- `randomized_midpoint_step`: the score at a uniformly random time of the step, which makes its integral unbiased
  (Shen and Lee, "The randomized midpoint method for log-concave sampling", arXiv:1909.05503, Algorithm 1).
- `parallel_underdamped`: many frozen-score steps at once by Picard iteration (Anari, Chewi and Vuong, "Fast parallel
  sampling under isoperimetry", arXiv:2401.09016).

The caller passes the noise as standard normals and loops over steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Kernel", "Score", "parallel_underdamped", "randomized_midpoint_step", "underdamped_step"]

Score = Callable[[Tensor], Tensor]
"""score(x): -grad V at x (B, ...), like x; rows are independent."""

_SERIES = 0.1  # g h below which the closed forms lose digits; 12 terms are exact to rounding there


class Kernel(NamedTuple):
    """The exact transition over a step h with the score frozen, and the Cholesky factor of its noise.

        x' = x + x_from_v v + x_from_score score + xi_x,   xi_x = noise_xx z_x
        v' = decay v + v_from_score score + xi_v,          xi_v = noise_vx z_x + noise_vv z_v

    Entries are numbers, or tensors (B,), one per chain.
    """

    decay: Any
    x_from_v: Any
    x_from_score: Any
    v_from_score: Any
    noise_xx: Any
    noise_vx: Any
    noise_vv: Any

    @staticmethod
    def of(friction: float, step: float | Tensor) -> Kernel:
        """The kernel of friction g > 0 over step h > 0, a number or a tensor (B,); tensors are not checked.

        With E = e^(-g h): Var xi_x = (2/g) [h - 2 (1-E)/g + (1-E^2)/(2g)], Var xi_v = 1 - E^2,
        Cov = (1-E)^2 / g. Computed in float64; entries are floats, or float64 tensors (B,). Raises ValueError.
        """
        _check_positive("friction", friction)
        if not isinstance(step, Tensor):
            _check_positive("step", step)
        u = friction * torch.as_tensor(step, dtype=torch.float64)
        fall = -torch.expm1(-u)  # 1 - E, which cancels for small g h
        # g^2 x_from_score = u - (1-E); g^2 Var xi_x / 2 = u - 2 (1-E) + (1-E^2) / 2
        small = u < _SERIES
        lag = torch.where(small, _series(u, lambda n: 1.0), u - fall)
        spread = torch.where(small, _series(u, lambda n: 2 - 2.0 ** (n - 1)), u - 2 * fall + fall * (2 - fall) / 2)
        noise_xx = torch.sqrt(2 * spread)
        noise_vx = fall.square() / noise_xx
        # 1 - E^2 - noise_vx^2 tends to g h / 2: a quarter of the first term, no worse
        noise_vv = torch.sqrt(fall * (2 - fall) - noise_vx.square())
        entries = (
            torch.exp(-u),
            fall / friction,
            lag / friction**2,
            fall / friction,
            noise_xx / friction,
            noise_vx,
            noise_vv,
        )
        return Kernel(*entries) if isinstance(step, Tensor) else Kernel(*(entry.item() for entry in entries))

    def like(self, x: Tensor) -> Kernel:
        """The kernel with entries that multiply x (B, ...): tensors in the dtype of x and shape (B, 1, ...)."""
        return Kernel(*(_expand(entry, x) if isinstance(entry, Tensor) else entry for entry in self))

    def drift(self, x: Tensor, v: Tensor, z_x: Tensor, z_v: Tensor) -> tuple[Tensor, Tensor]:
        """(x', v') without a score, from standard normals z_x, z_v; all like x (B, ...)."""
        k = self.like(x)
        return x + k.x_from_v * v + k.noise_xx * z_x, k.decay * v + k.noise_vx * z_x + k.noise_vv * z_v


def underdamped_step(
    score: Tensor, x: Tensor, v: Tensor, kernel: Kernel, z_x: Tensor, z_v: Tensor
) -> tuple[Tensor, Tensor]:
    """(x', v') after one step of `kernel`; score: at x. All tensors (B, ...), z_x and z_v standard normals."""
    k = kernel.like(x)
    free_x, free_v = kernel.drift(x, v, z_x, z_v)
    return free_x + k.x_from_score * score, free_v + k.v_from_score * score


def randomized_midpoint_step(
    score_fn: Score, x: Tensor, v: Tensor, friction: float, step: float, a: Tensor, normals: Tensor
) -> tuple[Tensor, Tensor]:
    """(x', v') after one step h with the score at time a h; two score evaluations. Algorithm 1, arXiv:1909.05503.

    With x_a, v_a the motion without a score at time a h and E = e^(-g (1-a) h), the step is

        x_mid = x_a + [x_from_score over a h] score(x)
        x' = x_a + (1-E)/g (v_a + h score(x_mid)) + xi_x,    v' = E (v_a + h score(x_mid)) + xi_v

    with xi the noise of [a h, h], so that the noise at a h and at h is that of one Brownian path. x, v: (B, ...).
    a: (B,), uniform in (0, 1), one per chain. normals: (2, 2, B, ...), standard: before and after a h, for x and v.
    """
    _check_positive("step", step)
    a = a.double()
    both = Kernel.of(friction, step * torch.stack([a, 1 - a]))
    before, after = (Kernel(*entries) for entries in zip(*both, strict=True))
    x_a, v_a = before.drift(x, v, *normals[0])
    kicked = v_a + step * score_fn(x_a + before.like(x).x_from_score * score_fn(x))
    return after.drift(x_a, kicked, *normals[1])


def parallel_underdamped(
    score_fn: Score, x: Tensor, v: Tensor, friction: float, step: float, points: int, rounds: int, normals: Tensor
) -> tuple[Tensor, Tensor]:
    """(x', v') after one big step h: R = `points` steps h/R whose scores are found together in K = `rounds` rounds.

    Each round evaluates all R scores in one call, at the positions given by the last round's scores, with fixed noise;
    the first starts from the motion without a score. After k rounds the first k steps equal those of
    `underdamped_step` on the same noise, so K = R is exact; for g h and sqrt(L) h of order 1 a few rounds are close.
    x, v: (B, ...).
    normals: (R, 2, B, ...), standard: for x and v. score_fn gets (R B, ...), all chains of the first point first.
    Raises ValueError for points or rounds below 1.
    """
    for name, value in (("points", points), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    _check_positive("step", step)
    k = Kernel.of(friction, step / points)
    noise_x, noise_v = k.noise_xx * normals[:, 0], k.noise_vx * normals[:, 0] + k.noise_vv * normals[:, 1]
    xs, v_end = _trajectory(x, v, noise_x, noise_v, k)
    for _ in range(rounds):
        scores: Tensor = score_fn(xs[:-1].flatten(0, 1)).unflatten(0, (points, len(x)))
        xs, v_end = _trajectory(x, v, noise_x + k.x_from_score * scores, noise_v + k.v_from_score * scores, k)
    return xs[-1], v_end


def _trajectory(x: Tensor, v: Tensor, moves: Tensor, kicks: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """x at all R + 1 points and the last v, from what each step adds to x and to v: (R, B, ...)."""
    vs = [v]
    for kick in kicks:
        vs.append(torch.add(kick, vs[-1], alpha=kernel.decay))
    xs = torch.cat([x[None], moves + kernel.x_from_v * torch.stack(vs[:-1])])
    return xs.cumsum(0), vs[-1]


def _series(u: Tensor, weight: Callable[[int], float]) -> Tensor:
    """The sum of (-1)^n weight(n) / n! u^n, n = 2 .. 13, by Horner's rule: plain numbers never wait for a device."""
    total = torch.zeros_like(u)
    for n in range(13, 1, -1):
        total = total * u + (-1) ** n * weight(n) / math.factorial(n)
    return total * u * u


def _expand(entry: Tensor, x: Tensor) -> Tensor:
    return entry.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive number, got {value}: make it larger than 0")
