"""Underdamped Langevin: kernels against integrals, laws on a Gaussian target, the parallel form."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor

from mlem.langevin import Kernel, parallel_underdamped, randomized_midpoint_step, underdamped_step
from mlem.noise import NoiseStream
from tests.problems import slope

FRICTION = 2.0
CURVATURE = 1.5  # of V(x) = CURVATURE x^2 / 2


def transition(kernel: Kernel) -> np.ndarray:
    """F: (x, v) -> F (x, v) is the motion without a score, in the mean."""
    return np.array([[1, kernel.x_from_v], [0, kernel.decay]])


def factor(kernel: Kernel) -> np.ndarray:
    """C: the noise of (x, v) is C (z_x, z_v)."""
    return np.array([[kernel.noise_xx, 0], [kernel.noise_vx, kernel.noise_vv]])


def covariance(kernel: Kernel) -> np.ndarray:
    return factor(kernel) @ factor(kernel).T


def integral(function, step: float) -> float:
    return quad(function, 0, step, epsabs=0, epsrel=1e-12, limit=200)[0]


# --- the kernel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("friction", [0.3, 1.0, 7.0])
@pytest.mark.parametrize("u", [1e-8, 1e-4, 0.05, 0.0999, 0.1001, 0.5, 1.0, 10.0, 100.0])
def test_kernel_against_integrals(friction: float, u: float) -> None:
    """To 1e-10, relative, on both sides of the change to series: a velocity kick s ago moves x by (1-e^(-g s))/g."""
    step = u / friction
    k = Kernel.of(friction, step)

    def moved(s: float) -> float:
        return -math.expm1(-friction * s) / friction

    def kept(s: float) -> float:
        return math.exp(-friction * s)

    assert k.decay == pytest.approx(kept(step), rel=1e-10)
    assert k.x_from_v == pytest.approx(moved(step), rel=1e-10)
    assert k.v_from_score == pytest.approx(integral(kept, step), rel=1e-10)
    assert k.x_from_score == pytest.approx(integral(moved, step), rel=1e-10)
    noise = covariance(k)
    assert noise[0, 0] == pytest.approx(2 * friction * integral(lambda s: moved(s) ** 2, step), rel=1e-10)
    assert noise[1, 1] == pytest.approx(2 * friction * integral(lambda s: kept(s) ** 2, step), rel=1e-10)
    assert noise[0, 1] == pytest.approx(2 * friction * integral(lambda s: kept(s) * moved(s), step), rel=1e-10)


@pytest.mark.parametrize("friction", [0.5, 2.0])
def test_kernel_of_a_tiny_step(friction: float) -> None:
    """At g h = 1e-8 all entries equal their leading terms, and float32 holds them."""
    step = 1e-8 / friction
    u = friction * step
    leading = Kernel(
        decay=1 - u,
        x_from_v=step,
        x_from_score=step**2 / 2,
        v_from_score=step,
        noise_xx=math.sqrt(2 * friction * step**3 / 3),
        noise_vx=math.sqrt(1.5 * u),
        noise_vv=math.sqrt(u / 2),
    )
    np.testing.assert_allclose(Kernel.of(friction, step), leading, rtol=2e-8)
    single = Kernel.of(friction, torch.tensor([step], dtype=torch.float64)).like(torch.zeros(1, 1))
    np.testing.assert_allclose([entry.item() for entry in single], leading, rtol=1e-6)


def test_kernel_of_many_steps() -> None:
    """A tensor of steps gives the kernels of each, shaped to multiply x."""
    steps = torch.tensor([1e-6, 0.02, 0.3, 4.0], dtype=torch.float64)
    many = Kernel.of(FRICTION, steps)
    for i, step in enumerate(steps.tolist()):
        np.testing.assert_allclose([entry[i].item() for entry in many], Kernel.of(FRICTION, step), rtol=1e-14)
    x = torch.zeros(4, 3, 5)
    assert {(entry.shape, entry.dtype) for entry in many.like(x)} == {((4, 1, 1), torch.float32)}


def test_noise_composes() -> None:
    """Without a score, a step of a h and one of (1-a) h are one step of h in law."""
    whole = Kernel.of(FRICTION, 0.7)
    for a in (0.5, 0.1, 1e-7):
        first, second = Kernel.of(FRICTION, 0.7 * a), Kernel.of(FRICTION, 0.7 * (1 - a))
        np.testing.assert_allclose(transition(second) @ transition(first), transition(whole), rtol=1e-12)
        onwards = transition(second) @ covariance(first) @ transition(second).T
        np.testing.assert_allclose(onwards + covariance(second), covariance(whole), rtol=1e-11)


# --- the law on a Gaussian target ----------------------------------------------------------------------------------


def linear_step(method: str, step: float, a: float, state: Tensor, normals: Tensor) -> Tensor:
    """(x', v') of the library, (2, B), for V = CURVATURE x^2 / 2, from (x, v) and normals (2, 2, B)."""
    x, v = state

    def score(x: Tensor) -> Tensor:
        return -CURVATURE * x

    if method == "underdamped":
        return torch.stack(underdamped_step(score(x), x, v, Kernel.of(FRICTION, step), *normals[0]))
    return torch.stack(randomized_midpoint_step(score, x, v, FRICTION, step, torch.full_like(x, a), normals))


def affine(method: str, step: float, a: float) -> tuple[np.ndarray, np.ndarray]:
    """(A, N): a step is (x', v') = A (x, v) + N z, read off by unit vectors."""
    unit = torch.eye(6, dtype=torch.float64)
    state = linear_step(method, step, a, unit[:2], unit[2:].view(2, 2, 6)).numpy()
    return state[:, :2], state[:, 2:]


def stationary(method: str, step: float) -> np.ndarray:
    """The covariance of (x, v) that the method leaves as it is, in mean over a: (2, 2)."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    steps = [affine(method, step, a) for a in (nodes + 1) / 2]
    if method == "underdamped":
        return solve_discrete_lyapunov(steps[0][0], steps[0][1] @ steps[0][1].T)
    # S = E[A S A' + N N'], a linear equation for the entries of S
    linear = sum(w / 2 * np.kron(A, A) for w, (A, _) in zip(weights, steps, strict=True))
    noise = sum(w / 2 * N @ N.T for w, (_, N) in zip(weights, steps, strict=True))
    return np.linalg.solve(np.eye(4) - linear, np.ravel(noise)).reshape(2, 2)


def divergence(law: np.ndarray, target: np.ndarray) -> float:
    """Kullback and Leibler's, of N(0, law) from N(0, target)."""
    ratio = np.linalg.solve(target, law)
    return 0.5 * (np.trace(ratio) - len(law) - np.linalg.slogdet(ratio)[1])


@pytest.mark.parametrize(("method", "order"), [("underdamped", 1), ("randomized_midpoint", 3)])
def test_order_of_the_stationary_law(method: str, order: int) -> None:
    """The exact law: Var x and Var v are off by O(h) with the score frozen, by O(h^3) with a randomized midpoint.

    A score frozen at the start of the step lags by h/2: -CURVATURE (x - v h/2), friction lower by CURVATURE h/2 and
    the noise as before, so both variances are too large by CURVATURE h / (2 g) at first order.
    """
    counts = [8, 16, 32, 64]
    laws = [stationary(method, 1 / count) for count in counts]
    for i, exact in ((0, 1 / CURVATURE), (1, 1.0)):
        assert slope(counts, [abs(law[i, i] - exact) for law in laws]) == pytest.approx(order, abs=0.1)
    # the divergence from the target, the usual measure of the bias, is of twice that order
    target = np.diag([1 / CURVATURE, 1.0])
    assert slope(counts, [divergence(law, target) for law in laws]) == pytest.approx(2 * order, abs=0.2)
    if method == "underdamped":
        excess = CURVATURE / (2 * FRICTION * counts[-1])
        np.testing.assert_allclose(np.diag(laws[-1]), [(1 + excess) / CURVATURE, 1 + excess], rtol=2e-4)


def score(x: Tensor) -> Tensor:
    return -CURVATURE * x


@pytest.mark.parametrize("method", ["underdamped", "randomized_midpoint"])
def test_stationary_on_a_gaussian_target(method: str) -> None:
    """30 steps from the method's own stationary law: the covariance of (x, v) stays, to 4 standard errors."""
    chains, step, indices = 40_000, 0.4, torch.arange(40_000)
    exact = stationary(method, step)
    stream = NoiseStream(3, "test")
    draw = torch.from_numpy(np.linalg.cholesky(exact)) @ stream.normal(indices, [0], (2,), torch.float64)[0].T
    x, v = draw[0, :, None], draw[1, :, None]
    kernel = Kernel.of(FRICTION, step)
    for i in range(1, 31):
        normals = stream.normal(indices, [i], (2, 2, 1), torch.float64)[0].movedim(0, 2)
        if method == "underdamped":
            x, v = underdamped_step(score(x), x, v, kernel, *normals[0])
        else:
            a = NoiseStream(3, "midpoint").uniform(indices, [i], torch.float64)[0]
            x, v = randomized_midpoint_step(score, x, v, FRICTION, step, a, normals)
    state = torch.cat([x, v], 1).numpy()
    variances = np.diag(exact)
    assert (np.abs(state.mean(0)) < 4 * np.sqrt(variances / chains)).all()
    error = np.sqrt((np.outer(variances, variances) + exact**2) / chains)
    assert (np.abs(np.cov(state.T) - exact) < 4 * error).all()


def test_midpoint_is_unbiased_and_each_chain_has_its_own() -> None:
    """The mean over a is the exact integral of the score along the motion it is taken on, row by row."""
    a = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x = torch.ones(3, 2, dtype=torch.float64)
    normals = NoiseStream(0, "test").normal(torch.arange(3), [0], (2, 2, 2), torch.float64)[0].movedim(0, 2)
    together = randomized_midpoint_step(score, x, -x, FRICTION, 0.3, a, normals)
    for i in range(3):
        row = slice(i, i + 1)
        alone = randomized_midpoint_step(score, x[row], -x[row], FRICTION, 0.3, a[row], normals[:, :, row])
        torch.testing.assert_close(torch.stack(alone), torch.stack(together)[:, row], rtol=0, atol=1e-15)
    # a score of time alone, f(s) = s, seen through the place: x moves as v = 1 without friction or noise
    nodes, weights = np.polynomial.legendre.leggauss(8)
    still, ones, g, h = torch.zeros(2, 2, 8, 1, dtype=torch.float64), torch.ones(8, 1, dtype=torch.float64), 1e-9, 0.5
    # the first score is 0 at x = 0
    x, v = randomized_midpoint_step(lambda x: x, 0 * ones, ones, g, h, torch.from_numpy((nodes + 1) / 2), still)
    means = weights / 2 @ x[:, 0].numpy(), weights / 2 @ v[:, 0].numpy()
    np.testing.assert_allclose(means, (h + h**3 / 6, 1 + h**2 / 2), rtol=1e-8)


# --- parallel ------------------------------------------------------------------------------------------------------


def wavy(x: Tensor) -> Tensor:
    """A score that is not linear, mixing the elements of a row."""
    return -x - torch.sin(x.roll(1, -1))


def sequential(x: Tensor, v: Tensor, step: float, normals: Tensor) -> tuple[Tensor, Tensor]:
    kernel = Kernel.of(FRICTION, step)
    for z_x, z_v in normals:
        x, v = underdamped_step(wavy(x), x, v, kernel, z_x, z_v)
    return x, v


def test_parallel_equals_sequential() -> None:
    """With as many rounds as points to rounding; before that the distance falls at least 5 times in a round."""
    points, shape = 8, (5, 2, 3)
    normals = torch.randn(points, 2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, v = torch.ones(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    seen = []

    def score_fn(rows: Tensor) -> Tensor:
        seen.append(rows.shape)
        return wavy(rows)

    exact = sequential(x, v, 0.8 / points, normals)
    errors = []
    for rounds in range(1, points + 1):
        result = parallel_underdamped(score_fn, x, v, FRICTION, 0.8, points, rounds, normals)
        errors.append(max((a - b).abs().max().item() for a, b in zip(result, exact, strict=True)))
    assert errors[-1] < 1e-14
    assert all(late < early / 5 for early, late in itertools.pairwise(errors[:5]))
    assert set(seen) == {(points * 5, 2, 3)}
    assert len(seen) == sum(range(1, points + 1))


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["friction", "step"])
def test_bad_numbers(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .* got {value}.*$"):
        Kernel.of(**{"friction": 1.0, "step": 0.1, name: value})


@pytest.mark.parametrize("name", ["points", "rounds"])
def test_bad_counts(name: str) -> None:
    x = torch.zeros(1, 2)
    options = {"points": 2, "rounds": 1, name: 0}
    with pytest.raises(ValueError, match=f"^{name} must be >= 1, got 0$"):
        parallel_underdamped(wavy, x, x, FRICTION, 0.1, normals=torch.zeros(2, 2, 1, 2), **options)


def test_bad_step_of_a_midpoint() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"^step must be .* got -0.1"):
        randomized_midpoint_step(wavy, x, x, FRICTION, -0.1, torch.tensor([0.5]), torch.zeros(2, 2, 1, 2))
