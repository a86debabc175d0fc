"""Coins: their means, how they hang together, what is certain, and what fixes them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mlem.multilevel.coins import COINS, coins_called
from tests.problems import outcomes

TABLE = torch.tensor(
    [[1.0, 0.5, 0.25], [1.0, 0.3, 0.3], [0.9, 0.7, 0.1], [1.0, 1.0, 1.0], [0.6, 0.35, 0.05]], dtype=torch.float64
)
"""Falling along rows; some certain."""


def within(mean: Tensor, expected: Tensor, deviation: Tensor, count: int, width: float = 4.0) -> bool:
    """Whether every mean of `count` draws is within `width` standard errors (and exact where nothing is random)."""
    return bool(((mean - expected).abs() <= width * deviation / math.sqrt(count) + 1e-12).all())


def deviation(coins: str, p: Tensor) -> Tensor:
    return torch.where(p >= 1, 0.0, p if coins == "poisson" else p * (1 - p)).sqrt()


# --- the law -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coins", COINS)
def test_means_over_samples_are_the_probabilities(coins: str) -> None:
    """Within 4 standard errors of 20 000 samples."""
    counts = COINS[coins].toss(TABLE, 3, torch.arange(20_000)).double()
    assert within(counts.mean(0), TABLE, deviation(coins, TABLE), 20_000)


@pytest.mark.parametrize("coins", COINS)
def test_means_over_seeds_are_the_probabilities(coins: str) -> None:
    """Within 4 standard errors of 3000 seeds."""
    counts = torch.stack([COINS[coins].toss(TABLE, seed) for seed in range(3000)]).double()
    assert within(counts.mean(0), TABLE, deviation(coins, TABLE), 3000)


@pytest.mark.parametrize("coins", ["systematic", "bernoulli", "nested"])
def test_means_are_exact_over_all_outcomes(coins: str) -> None:
    table = TABLE[:4]
    counts, chances = outcomes(coins, table)
    assert chances.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close((chances[:, None, None] * counts).sum(0), table, rtol=0, atol=1e-12)


def test_systematic_means_are_exact_over_a_fine_grid_of_uniforms() -> None:
    """A count is an indicator of an interval of length p: 2^16 midpoints give it to 2^-16."""
    middles = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    counts = COINS["systematic"].counts(TABLE, middles[:, None].expand(-1, 3))
    torch.testing.assert_close(counts.double().mean(0), TABLE, rtol=0, atol=2**-16)


def test_poisson_counts_have_the_law_of_poisson() -> None:
    """Frequencies of 0 .. 3, and the product of two rows' counts, within 4 standard errors."""
    p = torch.full((2, 1), 0.9, dtype=torch.float64)
    counts = COINS["poisson"].toss(p, 0, torch.arange(40_000))[:, :, 0]
    for number in range(4):
        chance = torch.tensor(math.exp(-0.9) * 0.9**number / math.factorial(number), dtype=torch.float64)
        found = (counts == number).double().mean(0)
        assert within(found, chance.expand(2), (chance * (1 - chance)).sqrt(), 40_000)
    product = counts.prod(1).double()
    spread = torch.tensor((0.9 + 0.81) ** 2 - 0.81**2).sqrt()
    assert within(product.mean(), torch.tensor(0.81), spread, 40_000)


@pytest.mark.parametrize(("coins", "together"), [("bernoulli", 0.12), ("systematic", 0.12), ("nested", 0.3)])
def test_levels_fall_independently_unless_nested(coins: str, together: float) -> None:
    """Both coins of a row, p = 0.4 and 0.3, within 4 standard errors."""
    counts = COINS[coins].toss(torch.tensor([[0.4, 0.3]] * 3), 1, torch.arange(20_000))
    found = counts.prod(2).double().mean(0)
    assert within(found, torch.tensor(together), torch.tensor(math.sqrt(together * (1 - together))), 20_000)


def test_a_nested_coin_implies_all_below() -> None:
    counts = COINS["nested"].toss(TABLE, 0, torch.arange(2000))
    assert (counts.diff(dim=2) <= 0).all()
    assert (counts.diff(dim=2) < 0).any()


@pytest.mark.parametrize("seed", range(5))
def test_systematic_coins_are_evenly_spaced(seed: int) -> None:
    """In every window of rows the count differs from the sum of p by less than 1."""
    p = torch.rand(60, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp(min=0.01)
    p[::7] = 1.0
    counts = COINS["systematic"].toss(p, seed, torch.arange(50)).double()
    assert set(counts.unique().tolist()) == {0.0, 1.0}
    ahead = torch.cat([torch.zeros(50, 1, 2), (counts - p).cumsum(1)], 1)  # windows are differences of this
    assert (ahead[:, :, None] - ahead[:, None]).abs().max() < 1


# --- what is certain -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coins", COINS)
def test_certain_coins_always_fall_once(coins: str) -> None:
    """Whatever rounding does to long sums of awkward numbers."""
    awkward = torch.tensor([0.1, 1 / 3, 1.0, 1 - 2**-53, 1.0, 0.7, 1e-9, 1.0], dtype=torch.float64)
    p = torch.stack([awkward.repeat(4000), awkward.flip(0).repeat(4000)], 1)
    for seed in range(5):
        counts = COINS[coins].toss(p, seed)
        assert (counts[p == 1] == 1).all()
        assert (counts >= 0).all()
        # of 4000 repetitions, each the sum of what is uncertain; 6 standard deviations
        uncertain = torch.where(p < 1, counts, 0).sum(0).double()
        expected = torch.where(p < 1, p, 0.0).sum(0)
        assert ((uncertain - expected).abs() < 6 * expected.sqrt()).all()


@pytest.mark.parametrize("coins", COINS)
def test_all_certain_is_a_table_of_ones(coins: str) -> None:
    for indices in (None, torch.arange(3)):
        assert (COINS[coins].toss(torch.ones(40, 3), 7, indices) == 1).all()


# --- refinement ----------------------------------------------------------------------------------------------------


def test_poisson_counts_are_shared_by_refined_grids() -> None:
    coarse = torch.tensor([[0.9, 0.3], [0.5, 0.8], [0.7, 0.02], [0.6, 0.4]], dtype=torch.float64).repeat(8, 1)
    counts = COINS["poisson"].toss(coarse, 4, torch.arange(200))
    assert counts.max() > 1
    for parts in (2, 4, 16):
        fine = (coarse / parts).repeat_interleave(parts, 0)
        finer = COINS["poisson"].toss(fine, 4, torch.arange(200))
        assert torch.equal(finer.view(200, len(coarse), parts, 2).sum(2), counts)


def test_poisson_has_uniforms_enough() -> None:
    """Were there too few, counts would stop at the end of a long table."""
    p = torch.full((3000, 2), 0.999, dtype=torch.float64)
    counts = COINS["poisson"].toss(p, 0, torch.arange(20))
    assert COINS["poisson"].uniforms(p) >= counts.sum(1).max() * 2
    last = counts[:, -300:].double().sum(1)
    assert ((last - 299.7).abs() < 6 * math.sqrt(299.7)).all()


# --- what fixes them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coins", COINS)
def test_the_seed_fixes_the_coins(coins: str) -> None:
    p = torch.full((50, 2), 0.4, dtype=torch.float64)
    assert torch.equal(COINS[coins].toss(p, 1), COINS[coins].toss(p, 1))
    assert not torch.equal(COINS[coins].toss(p, 1), COINS[coins].toss(p, 2))


@pytest.mark.parametrize("coins", COINS)
def test_coins_of_a_sample_do_not_know_its_batch(coins: str) -> None:
    p = torch.full((50, 2), 0.4, dtype=torch.float64)
    whole = COINS[coins].toss(p, 1, torch.arange(12))
    assert whole.shape == (12, 50, 2)
    assert torch.equal(COINS[coins].toss(p, 1, torch.tensor([7, 2, 11])), whole[[7, 2, 11]])
    assert not torch.equal(whole[0], whole[1])


def test_tossing_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    COINS["poisson"].toss(TABLE, 0, torch.arange(4))
    assert torch.equal(torch.get_rng_state(), before)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "shown"), [(0.0, "0"), (-0.5, "-0.5"), (1.5, "1.5"), (math.nan, "nan")])
def test_a_bad_probability_is_named(value: float, shown: str) -> None:
    p = TABLE.clone()
    p[2, 1] = value
    message = rf"^probabilities must be in \(0, 1\], got p = {shown} at evaluation 2, level 2 of 3; leave a level .*"
    with pytest.raises(ValueError, match=message):
        COINS["systematic"].toss(p, 0)


@pytest.mark.parametrize("shape", [(3,), (0, 2), (2, 0), (1, 2, 3)])
def test_probabilities_are_a_table(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^probabilities must be a table \(evaluations, levels\), got shape \("):
        COINS["nested"].toss(torch.full(shape, 0.5), 0)


def test_unknown_coins_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^coins must be one of systematic, bernoulli, nested, poisson, got 'fair'$"):
        coins_called("fair")
