"""The scaling law: known floors and exponents come back, intervals cover, verdicts say what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlem.multilevel.scaling import fit_differences, fit_errors

COSTS = np.array([1.0, 3.0, 10.0, 40.0, 120.0])


def law(gamma, floor=0.0, costs=COSTS):
    return floor + 0.3 * costs ** (-2 / gamma)


def images(gamma, floor, count, seed):
    """(K, N): a floor that all levels share on an image, and an excess of each level's own."""
    generator = np.random.default_rng(seed)
    shared = floor * generator.gamma(4, 1 / 4, count)
    return shared + law(gamma)[:, None] * generator.gamma(4, 1 / 4, (len(COSTS), count))


@pytest.mark.parametrize("gamma", [1.5, 3.0, 6.0])
@pytest.mark.parametrize("floor", [0.0, 0.02, 5.0])
def test_exact_laws_come_back(gamma, floor):
    fit = fit_errors(np.tile(law(gamma, floor)[:, None], 4), COSTS, replicates=100)
    assert fit.gamma == pytest.approx(gamma, rel=1e-5)
    assert fit.floor == pytest.approx(floor, rel=1e-6, abs=1e-8)
    assert math.exp(fit.log_scale) == pytest.approx(0.3, rel=1e-5)
    assert fit.gamma_plotted == fit.gamma / 2
    # the same number for every image: nothing to resample
    assert fit.gamma_interval == pytest.approx((fit.gamma, fit.gamma))


def test_three_levels_are_enough_and_the_unit_of_cost_does_not_matter():
    table = np.tile(law(3.0, 0.1)[:3, None], 4)
    for unit in (1.0, 1e9):
        fit = fit_errors(table, unit * COSTS[:3], replicates=100)
        assert (fit.gamma, fit.floor) == pytest.approx((3.0, 0.1), rel=1e-5)


def test_order_of_levels_does_not_matter():
    table = images(3.0, 0.1, 100, 0)
    ahead, back = (fit_errors(t, c, replicates=100) for t, c in ((table, COSTS), (table[::-1], COSTS[::-1])))
    assert back.gamma == pytest.approx(ahead.gamma)


@pytest.mark.parametrize("gamma", [1.5, 3.0])
def test_exact_differences_come_back(gamma):
    table = np.tile(law(gamma)[1:, None], 4)
    fit = fit_differences(table, COSTS, replicates=100)
    assert fit.gamma == pytest.approx(gamma)
    assert (fit.floor, *fit.floor_interval) == (0, 0, 0)


def test_differences_of_the_theorems_hierarchy():
    """Levels that err by 2^-k at a cost of 2^(3 k), signs alternating: differences of 3 2^-k, gamma = 3."""
    k = np.arange(1, 6)
    differences = np.tile((3 * 2.0 ** -k[1:])[:, None] ** 2, 4)
    assert fit_differences(differences, 2.0 ** (3 * k), replicates=100).gamma == pytest.approx(3)


def test_intervals_cover():
    """Of 60 intervals of 95 percent, 57 +- 1.7 should hold the truth; 51 is 3.5 standard errors below."""
    fits = [fit_errors(images(3.0, 0.1, 300, seed), COSTS, replicates=200, seed=seed) for seed in range(60)]
    for name, truth in (("gamma_interval", 3.0), ("floor_interval", 0.1)):
        intervals = np.array([getattr(fit, name) for fit in fits])
        assert ((intervals[:, 0] < truth) & (truth < intervals[:, 1])).sum() >= 51
    gammas = np.array([fit.gamma for fit in fits])
    widths = np.diff([fit.gamma_interval for fit in fits])[:, 0]
    # and they are no wider than they must be: 3.92 standard deviations of the estimate
    assert np.median(widths) == pytest.approx(3.92 * gammas.std(), rel=0.35)


def test_images_are_resampled_for_all_levels_together():
    """A floor that varies strongly from image to image, but alike for all levels, must not blur gamma."""
    generator = np.random.default_rng(0)
    shared = 0.5 * generator.exponential(1, 500)
    fit = fit_errors(shared + law(3.0)[:, None], COSTS, replicates=200)
    assert fit.gamma_interval == pytest.approx((3, 3), rel=1e-4)
    low, high = fit.floor_interval
    assert high - low == pytest.approx(3.92 * shared.std() / math.sqrt(500), rel=0.3)


def test_the_seed_decides_the_interval():
    table = images(3.0, 0.1, 50, 0)
    first, again, other = (fit_errors(table, COSTS, replicates=100, seed=seed).gamma_interval for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("gamma", "spread", "words"),
    [
        (3.0, 0.01, "> 2: multilevel pays by theory"),
        (1.5, 0.01, "<= 2: [J, Thm 1] promises a gain"),
        (2.05, 0.5, "undecided whether [J, Thm 1] applies"),
        (-3.0, 0.01, "the error does not fall with cost"),
    ],
)
def test_verdicts(gamma, spread, words):
    generator = np.random.default_rng(0)
    table = law(gamma)[1:, None] * np.exp(spread * generator.standard_normal((4, 40)))
    verdict = fit_differences(table, COSTS, replicates=200).verdict
    assert words in verdict
    assert "\n" not in verdict


def test_curve_is_the_fit_without_its_floor():
    fit = fit_errors(images(3.0, 0.1, 200, 0), COSTS, replicates=100)
    curve = fit.curve()
    np.testing.assert_allclose(curve["value"], fit.values - fit.floor)
    ends = math.exp(fit.log_scale) * COSTS[[0, -1]] ** (-2 / fit.gamma)
    np.testing.assert_allclose(curve["line"][[0, -1]], ends)
    assert (curve["low"] < curve["line"]).all()
    assert (curve["line"] < curve["high"]).all()


def test_bad_input_is_refused():
    table = images(3.0, 0.1, 10, 0)
    with pytest.raises(ValueError, match="errors of >= 3 levels, got 2"):
        fit_errors(table[:2], COSTS[:2])
    with pytest.raises(ValueError, match=r"needs costs of >= 3 levels, got shape \(2,\)"):
        fit_differences(table[:1], COSTS[:2])
    with pytest.raises(ValueError, match=r"one cost per row, got errors \(5, 10\), costs \(4,\)"):
        fit_errors(table, COSTS[:4])
    with pytest.raises(ValueError, match=r"one cost per row, got differences \(5, 10\), costs \(4,\)"):
        fit_differences(table, COSTS)
    with pytest.raises(ValueError, match=r"errors must be finite and > 0, got 0\.0"):
        fit_errors(np.where(table == table.max(), 0, table), COSTS)
    with pytest.raises(ValueError, match="costs must be finite and > 0, got inf"):
        fit_errors(table, [1, 2, 3, 4, math.inf])
    with pytest.raises(ValueError, match="costs must differ from one another"):
        fit_errors(table, [1, 2, 3, 3, 4])
    with pytest.raises(ValueError, match="replicates must be >= 100"):
        fit_errors(table, COSTS, replicates=10)
