"""The theorem's levels and probabilities: exact properties, bounds on the synthetic hierarchy, the benchmark."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from benchmarks.theory import Paths, coefficients, measure_limit, measure_slopes, multilevel
from mlem.multilevel.theory import Theory


def theory(gamma=3.0, c=1.0, L=0.5, T=1.0, eps=1 / 16):
    return Theory(gamma, c, L, T, eps)


@pytest.mark.parametrize("gamma", [2.5, 4.0])
@pytest.mark.parametrize("eta", [1.0, 1 / 32, 1e-5])
def test_probabilities_are_in_the_unit_interval_and_fall(gamma, eta):
    p = theory(gamma).probabilities(eta)
    assert p.shape == (len(theory(gamma).levels),)
    assert p[0] == 1
    assert ((p > 0) & (p <= 1)).all()
    below = p[p < 1]
    assert len(below) > 0 or eta == 1
    torch.testing.assert_close(below[1:] / below[:-1], torch.full_like(below[1:], 2 ** -(1 + gamma / 2)))


def test_probabilities_below_one_are_rates_times_the_step():
    chosen = theory()
    fine, coarse = chosen.probabilities(1e-5), chosen.probabilities(2e-5)
    assert (coarse[1:] < 1).all()
    torch.testing.assert_close(coarse[1:], 2 * fine[1:])
    torch.testing.assert_close(chosen.rates(chosen.levels)[1:] * 1e-5, fine[1:])
    assert chosen.rates(3).item() == pytest.approx(chosen.rates(torch.tensor([2, 3]))[1].item())


def test_top_level_grows_by_one_when_eps_halves():
    tops = [theory(eps=2.0**-j).levels[-1] for j in range(1, 12)]
    assert [high - low for low, high in pairwise(tops)] == [1] * 10


@pytest.mark.parametrize("eps", [0.3, 0.01, 7e-4])
@pytest.mark.parametrize("L", [0.1, 2.0])
def test_top_level_is_the_first_with_a_bias_of_half_eps(eps, L):
    chosen = theory(L=L, T=1.5, eps=eps)
    # the recursion itself: an error of 2^-kmax in every step, amplified
    bias, eta = 0.0, 1.5 / 20000
    for _ in range(20000):
        bias = (1 + L * eta) * bias + eta * 2.0 ** -chosen.levels[-1]
    assert eps / 4 * (1 - 1e-3) < bias <= eps / 2


def test_base_is_the_first_level_of_cost_one():
    for c in (1.0, 0.25, 0.3, 5.0):
        costs = theory(c=c, eps=1e-3).costs()
        assert 1 <= costs[0] < 2**3
        torch.testing.assert_close(costs[1:] / costs[:-1], torch.full_like(costs[1:], 8.0))
    assert theory(c=0.25).levels[0] == 2


def test_a_base_that_is_accurate_enough_runs_alone():
    chosen = theory(c=2.0**-10, eps=0.5)
    assert chosen.levels == range(10, 11)
    assert chosen.probabilities(0.1).tolist() == [1.0]
    assert chosen.variance_bound(0.1) == 0


def test_variance_bound_is_eps_squared_for_small_steps_and_less_for_large_ones():
    assert theory().variance_bound(1e-6) == pytest.approx(theory().eps ** 2)
    assert 0 < theory().variance_bound(1 / 32) < 0.9 * theory().eps ** 2


@pytest.mark.parametrize("coins", ["bernoulli", "poisson"])
def test_error_is_within_the_bounds_on_the_synthetic_hierarchy(coins):
    chosen, steps = theory(), 64
    data = Paths(1000, steps)
    x, _ = multilevel(data, chosen, steps, coins, seed=1)
    cosine, sine = coefficients(chosen.levels)[-1].tolist()
    top, exact = data.run(steps, cosine, sine), data.run(steps)
    variance = (x - top).square().mean().item()
    bound = chosen.variance_bound(1 / steps)
    # below the bound, and not by orders of magnitude: it is 9 4^-k against 4^-k |2 g_{k-1} - g_k|^2, and e^(2 L T)
    assert bound / 30 < variance < bound
    assert (top - exact).square().mean().sqrt() < chosen.eps / 2


@pytest.mark.parametrize("gamma", [1.5, 2.0])
def test_small_gamma_warns(gamma):
    with pytest.warns(UserWarning, match=f"gamma = {gamma:g} <= 2: .* promises no speed-up"):
        theory(gamma=gamma)


@pytest.mark.parametrize("name", ["gamma", "c", "L", "T", "eps"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_bad_constants_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number > 0, got {value}"):
        theory(**{name: value})


@pytest.mark.parametrize(
    "options",
    [{"L": 1000.0}, {"L": 355.0}, {"L": 1e200, "T": 1e200}, {"eps": 1e-200}, {"L": 300.0, "eps": 1e-60}],
    ids=str,
)
def test_numbers_that_overflow_are_refused(options):
    with pytest.raises(ValueError, match=r"^e\^\(2 L T\) / eps\^2 overflows for L T = .*; use a shorter T"):
        theory(**options)


def test_a_long_run_that_does_not_overflow_is_none_of_them():
    chosen = theory(L=200.0)
    assert torch.isfinite(chosen.rates(chosen.levels)).all()
    assert ((chosen.probabilities(1e-3) > 0) & (chosen.probabilities(1e-3) <= 1)).all()


@pytest.mark.parametrize("eta", [0.0, -0.1, 1.1, math.nan])
def test_bad_steps_are_refused(eta):
    with pytest.raises(ValueError, match=rf"eta must be in \(0, T\] with T = 1, got {eta}"):
        theory().probabilities(eta)


def test_multilevel_with_certain_coins_is_the_top_level():
    chosen = theory(eps=0.5)
    assert (chosen.probabilities(1.0) == 1).all()
    data = Paths(50, 1)
    x, calls = multilevel(data, chosen, 1, "systematic", seed=0)
    cosine, sine = coefficients(chosen.levels)[-1].tolist()
    torch.testing.assert_close(x, data.run(1, cosine, sine), rtol=0, atol=1e-14)
    # weights are collected: the lower levels are not evaluated
    assert calls.sum(0).tolist() == [0] * (len(chosen.levels) - 1) + [50]


def test_benchmark_slopes_are_near_the_theorem():
    rows = measure_slopes((3.0,), range(3, 7), paths=250)
    slopes = {row["method"]: row["slope"] for row in rows}
    assert abs(slopes["EM"] - 4) < 0.35
    assert abs(slopes["systematic"] - 3) < 0.5
    # bernoulli coins come to 3 slowly, from above: 3.2 over the range of the full run
    assert 2.7 < slopes["bernoulli"] < 3.9
    for row in rows:
        assert row["interval"][0] < row["slope"] < row["interval"][1]


def test_cost_at_equal_error_does_not_depend_on_small_steps():
    rows = measure_limit(steps=(128, 256, 512, 1024), paths=500)
    assert [row["cost of base"] for row in rows[:4]] == [128, 256, 512, 1024]
    for coins in ("systematic", "poisson"):
        ratios = [row["at equal error"] for row in rows if row["coins"] == coins]
        assert len(ratios) == 4
        assert max(ratios) / min(ratios) < 1.15
