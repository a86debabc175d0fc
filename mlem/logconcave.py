"""Sampling from log-concave densities exp(-V(x)), given the gradient of V, by underdamped Langevin dynamics.

    chains = sample(lambda x: x, torch.zeros(64, 10), steps=1000, m=1, L=1)  # standard normals in 10 dimensions
    chains.mean, chains.std, chains.rhat, chains.ess

No Metropolis test: the distribution is biased by the step size (see `default_step_size`), and a sample costs a fixed
number of gradients. Chains run as one batch. The steps themselves are in `mlem.langevin`; nothing here depends on
diffusion. R-hat and ESS are those of Vehtari, Gelman, Simpson, Carpenter and Buerkner, "Rank-normalization, folding,
and localization: an improved R-hat", arXiv:1903.08008.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlem.langevin import Kernel, parallel_underdamped, randomized_midpoint_step, underdamped_step
from mlem.noise import NoiseStream

__all__ = ["METHODS", "Chains", "Gradient", "default_step_size", "sample"]

METHODS = ("randomized_midpoint", "underdamped", "parallel")
"""Steps of `sample`."""

Gradient = Callable[[Tensor], Tensor]
"""grad V at x (B, *shape), like x; rows are independent."""


@dataclass(frozen=True)
class Chains:
    """What `sample` returns.

    x: (chains, draws, *shape), on the device of x0. gradients: evaluations of grad V per chain, warm-up included.
    rounds: sequential evaluations, one after another. step_size, friction: as used.
    """

    x: Tensor
    method: str
    step_size: float
    friction: float
    thin: int
    gradients: int
    rounds: int

    @property
    def mean(self) -> Tensor:
        """Over all chains and draws: (*shape)."""
        return self.x.mean((0, 1))

    @property
    def std(self) -> Tensor:
        """Over all chains and draws: (*shape)."""
        return self.x.flatten(0, 1).std(0)

    @property
    def chain_mean(self) -> Tensor:
        """The mean of each chain: (chains, *shape)."""
        return self.x.mean(1)

    @property
    def chain_std(self) -> Tensor:
        """The standard deviation of each chain: (chains, *shape); NaN for a single draw."""
        return self.x.std(1, correction=min(1, self.x.shape[1] - 1))

    @functools.cached_property
    def rhat(self) -> Tensor:
        """Rank-normalised split R-hat of each element, (*shape) float64: the larger of bulk and folded.

        Near 1 when the halves of all chains agree; arXiv:1903.08008 asks for less than 1.01. Raises ValueError for
        fewer than 4 draws; NaN for a constant element.
        """
        return self._diagnose(lambda halves: torch.maximum(_rhat(_normal_scores(halves)), _rhat(_folded(halves))))

    @functools.cached_property
    def ess(self) -> Tensor:
        """Bulk effective sample size of each element, (*shape) float64, over all chains.

        The standard error of `mean` is about std / sqrt(ess). Raises ValueError for fewer than 4 draws; NaN for a
        constant element.
        """
        return self._diagnose(lambda halves: _ess(_normal_scores(halves)))

    def _diagnose(self, statistic: Callable[[Tensor], Tensor]) -> Tensor:
        """statistic: (2 chains, draws / 2, E) -> (E,), on a few elements at a time to save memory."""
        chains, draws, *shape = self.x.shape
        if draws < 4:
            raise ValueError(f"R-hat and ESS need >= 4 draws per chain, got {draws}: raise steps or lower thin")
        half = draws // 2
        flat = self.x.reshape(chains, draws, -1)
        halves = torch.cat([flat[:, :half], flat[:, -half:]]).double()
        return torch.cat([statistic(block) for block in halves.split(64, -1)]).reshape(shape)

    def to_arviz(self) -> dict[str, dict[str, Any]]:
        """Groups of NumPy arrays (chain, draw, ..): `arviz.from_dict(**chains.to_arviz())`, without `**` from 1.0 on.

        posterior has x; sample_stats has step_size and n_steps, the steps per draw.
        """
        plane = torch.ones(self.x.shape[:2], dtype=torch.float64)
        stats = {"step_size": (plane * self.step_size).numpy(), "n_steps": (plane.long() * self.thin).numpy()}
        return {"posterior": {"x": self.x.numpy(force=True)}, "sample_stats": stats}


def sample(
    grad_potential: Gradient,
    x0: Tensor,
    *,
    steps: int,
    method: str = "randomized_midpoint",
    step_size: float | None = None,
    friction: float | None = None,
    m: float | None = None,
    L: float | None = None,
    warmup: int | None = None,
    thin: int = 1,
    points: int = 16,
    rounds: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> Chains:
    """Chains of underdamped Langevin dynamics for the density exp(-V(x)).

    grad_potential: grad V, (B, *shape) -> (B, *shape), row by row; B is the number of chains, or `points` times
        that for `parallel`. It may use autograd; its result is detached.
    x0: (chains, *shape) float, where the chains start; velocities start as N(0, I). Results have its dtype and device.
    steps: steps after the warm-up; every `thin`-th is kept, giving steps // thin draws per chain.
    method: `randomized_midpoint` (two gradients per step, the most accurate), `underdamped` (one gradient per step) or
        `parallel` (`underdamped` in big steps: `points` small steps each, found together in `rounds` calls of
        grad_potential: points * rounds gradients per step).
    step_size: time of a step (a big one for `parallel`). Default: `default_step_size` of m and L.
    friction: Default: 2 sqrt(L), the choice of arXiv:1707.03663 and arXiv:1909.05503 (there 2, with time in units of
        1/sqrt(L)), for which any strongly log-concave target contracts at rate >= m / (2 sqrt(L)). Where V is nearly
        quadratic 2 sqrt(m) is faster: all modes of a Gaussian then relax at rate sqrt(m).
    m, L: bounds of the Hessian, m I <= V'' <= L I, in units of 1/x^2.
    warmup: steps dropped before the first draw. Default: half of `steps`.
    seed: chain k depends only on seed and k, not on the number of chains. progress: show a bar.

    Raises ValueError for options out of range and, after the last step, naming chain and step, if a chain became NaN or
    infinite.
    """
    plan = _plan(method, steps, step_size, friction, m, L, points, rounds)
    warmup = steps // 2 if warmup is None else warmup
    _check_counts(warmup=(warmup, 0), thin=(thin, 1))
    if thin > steps:
        raise ValueError(f"thin must be <= steps, got thin={thin} and steps={steps}: nothing would be kept")
    _check_start(x0)

    def score(x: Tensor) -> Tensor:
        gradient = grad_potential(x).detach()
        if gradient.shape != x.shape:
            raise ValueError(f"grad_potential must return the shape of x, {(*x.shape,)}, got {(*gradient.shape,)}")
        return -gradient

    indices = torch.arange(len(x0), device=x0.device)
    noise, midpoints = NoiseStream(seed, "langevin"), NoiseStream(seed, "langevin/midpoint")
    x = x0.detach()
    v = NoiseStream(seed, "langevin/velocity").normal(indices, [0], x.shape[1:], x.dtype)[0]
    draws = x.new_empty(steps // thin, *x.shape)
    failed = torch.full_like(indices, -1)
    for i in _with_progress(range(warmup + steps), progress):
        slots = range(plan.normals * i, plan.normals * (i + 1))
        normals = noise.normal(indices, slots, (2, *x.shape[1:]), x.dtype).movedim(2, 1)
        a = midpoints.uniform(indices, [i], torch.float64)[0] if plan.random else indices
        x, v = plan.step(score, x, v, a, normals)
        failed = torch.where((failed < 0) & ~torch.isfinite(x + v).flatten(1).all(1), i, failed)
        kept, rest = divmod(i + 1 - warmup, thin)
        if i >= warmup and rest == 0:
            draws[kept - 1] = x
    _check_failed(failed, warmup + steps, plan.step_size)
    total = warmup + steps
    return Chains(
        draws.transpose(0, 1),
        method,
        plan.step_size,
        plan.friction,
        thin,
        gradients=total * plan.gradients,
        rounds=total * plan.rounds,
    )


def default_step_size(method: str, m: float, L: float, *, points: int = 16, accuracy: float = 0.1) -> float:
    """The step for a Wasserstein-2 error of about `accuracy` sqrt(d / m), sqrt(d / m) being the width of the target.

    The rates of the theorems, kappa = L / m, with constants set to 1: a guide, no guarantee. On N(0, I) the error is
    more than 7 times smaller than requested. In these units nothing depends on d; an error fixed in units of x needs
    accuracy ~ 1/sqrt(d). Raises ValueError for numbers out of range.

    - randomized_midpoint: min(accuracy^(1/3) kappa^(-1/6), accuracy^(2/3)) / sqrt(L) (arXiv:1909.05503, abstract)
    - underdamped: accuracy kappa^(-1/2) / sqrt(L) (Dalalyan and Riou-Durand, arXiv:1807.09382)
    - parallel: `points` steps of `underdamped`, at most 1 / sqrt(L), where the rounds converge fast (arXiv:2401.09016)
    """
    _check_method(method)
    _check_positive(m=m, L=L, accuracy=accuracy)
    if m > L:
        raise ValueError(f"m must be <= L, got m={m} and L={L}: they bound the Hessian from below and above")
    kappa = L / m
    small = accuracy * kappa**-0.5
    scaled = {
        "randomized_midpoint": min(accuracy ** (1 / 3) * kappa ** (-1 / 6), accuracy ** (2 / 3)),
        "underdamped": small,
        "parallel": min(points * small, 1.0),
    }
    return scaled[method] / math.sqrt(L)


# --- one step ------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """step: (score, x, v, a (B,), normals (S, 2, B, ..)) -> (x, v); a is read if `random`. normals: S.

    gradients, rounds: of one step.
    """

    step: Callable[[Gradient, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    step_size: float
    friction: float
    normals: int
    gradients: int
    rounds: int
    random: bool = False


def _plan(
    method: str,
    steps: int,
    step_size: float | None,
    friction: float | None,
    m: float | None,
    L: float | None,
    points: int,
    rounds: int,
) -> _Plan:
    """The requested step. Raises ValueError for bad options."""
    _check_method(method)
    _check_counts(steps=(steps, 1), points=(points, 1), rounds=(rounds, 1))
    _check_positive(step_size=step_size, friction=friction, m=m, L=L)
    if m is not None and L is not None:
        default = default_step_size(method, m, L, points=points)
        h = default if step_size is None else step_size
    elif step_size is None:
        raise ValueError("step_size is unknown: give step_size, or m and L, the bounds of the Hessian of V")
    else:
        h = step_size
    if friction is None and L is None:
        raise ValueError("friction is unknown: give friction, or L, the upper bound of the Hessian of V")
    g = 2 * math.sqrt(L) if friction is None else friction  # type: ignore[arg-type]
    if method == "randomized_midpoint":
        return _Plan(lambda score, x, v, a, z: randomized_midpoint_step(score, x, v, g, h, a, z), h, g, 2, 2, 2, True)
    if method == "underdamped":
        kernel = Kernel.of(g, h)
        return _Plan(lambda score, x, v, a, z: underdamped_step(score(x), x, v, kernel, *z[0]), h, g, 1, 1, 1)
    return _Plan(
        lambda score, x, v, a, z: parallel_underdamped(score, x, v, g, h, points, rounds, z),
        *(h, g, points, points * rounds, rounds),
    )


def _with_progress(steps: Iterable[int], progress: bool) -> Iterator[int]:
    if not progress:
        yield from steps
        return
    from rich.progress import track

    yield from track(steps, "sampling")


# --- checks --------------------------------------------------------------------------------------------------------


def _check_method(method: str) -> None:
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, 1, 0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}{hint}")


def _check_counts(**counts: tuple[int, int]) -> None:
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")


def _check_positive(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a positive number, got {value}")


def _check_start(x0: Tensor) -> None:
    if x0.ndim < 2 or not x0.numel():
        raise ValueError(
            f"x0 must be (chains, *shape), got {(*x0.shape,)}: one chain is x0[None], chains of numbers x0[:, None]"
        )
    if not x0.is_floating_point():
        raise ValueError(f"x0 must have a floating dtype, got {x0.dtype}: pass x0.double()")


def _check_failed(failed: Tensor, total: int, step_size: float) -> None:
    """failed: (B,), the step that made the chain NaN or infinite, or -1. Only here does the host wait."""
    steps = failed.tolist()
    bad = [chain for chain, step in enumerate(steps) if step >= 0]
    if bad:
        first = min(bad, key=lambda chain: steps[chain])
        raise ValueError(
            f"chain {first} became NaN or infinite at step {steps[first] + 1} of {total}, as did {len(bad)} of "
            f"{len(steps)} chains: grad_potential is not finite there, or step_size={step_size:g} is too large"
        )


# --- diagnostics, (chains, draws, E) -> (E,), float64 ----------------------------------------------------------------


def _normal_scores(x: Tensor) -> Tensor:
    """z = Phi^-1((rank - 3/8) / (S + 1/4)), ranks among all S values of an element, means of ties: like x."""
    flat = x.flatten(0, 1).T.contiguous()
    ordered = flat.sort(-1).values
    rank = (torch.searchsorted(ordered, flat) + torch.searchsorted(ordered, flat, right=True) + 1).double() / 2
    return torch.special.ndtri((rank - 0.375) / (flat.shape[1] + 0.25)).T.reshape(x.shape)


def _folded(x: Tensor) -> Tensor:
    """The normal scores of the distance to the median, which detect chains of different width."""
    ordered = x.flatten(0, 1).sort(0).values
    # not `quantile`: the two middle values must remain ties
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return _normal_scores((x - median).abs())


def _rhat(z: Tensor) -> Tensor:
    """sqrt(var+ / W), W the mean variance within chains and var+ = (N-1)/N W + B/N."""
    draws = z.shape[1]
    between = z.mean(1).var(0)
    return torch.sqrt((draws - 1) / draws + between / z.var(1).mean(0))


def _ess(z: Tensor) -> Tensor:
    """Chains times draws / tau, tau from Geyer's initial monotone sequence of autocorrelations."""
    chains, draws = z.shape[:2]
    centred = torch.fft.rfft(z - z.mean(1, keepdim=True), 2 * draws, dim=1)
    covariance = torch.fft.irfft(centred.abs().square().mean(0), 2 * draws, dim=0)[:draws] / draws
    within = covariance[0] * draws / (draws - 1)
    rho = 1 - (within - covariance) / (covariance[0] + z.mean(1).var(0))
    rho[0] = 1
    even, odd = rho[: draws // 2 * 2].unflatten(0, (-1, 2)).unbind(1)
    pairs = (even + odd)[: max(1, (draws - 1) // 2)]
    # pairs count up to the first that is not positive, or the last; of that, only the even term, unless both fall short
    counts = (pairs > 0).long().cumprod(0)
    counts[-1] = 0
    tail = (torch.cat([torch.ones_like(counts[:1]), counts[:-1]]) - counts) * even[: len(pairs)]
    tail = torch.where(pairs >= 0, tail, tail.clamp(min=0))
    tau = -1 + (2 * counts * pairs.cummin(0).values + tail).sum(0)
    return chains * draws / tau.clamp(min=1 / math.log10(chains * draws))
