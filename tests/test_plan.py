"""Plans: weights, what runs, what it costs, plain data; and the recipes and coefficients that plans are made from."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlem.family import Family
from mlem.multilevel.calibrate import Calibration, Response
from mlem.multilevel.coefficients import CERTAIN, Coefficients, feature
from mlem.multilevel.coins import COINS, toss
from mlem.multilevel.plan import Plan, collect
from mlem.multilevel.recipe import Recipe, stored_plan
from mlem.sampling import Sampler, sample
from mlem.schedule import NoiseSchedule
from mlem.solvers import make_solver
from tests.problems import closed_family, level, outcomes

COSINE = NoiseSchedule.cosine()
TABLE = torch.tensor([[1.0, 0.5, 0.5], [1.0, 1.0, 0.25], [0.9, 0.5, 0.25], [1.0, 0.3, 0.2]], dtype=torch.float64)
"""With equal neighbours, certain ones, and some whose ratio is whole."""


def held(*rows: list[int], levels: int = 2, **options: Any) -> Plan:
    """A plan of 8 evaluations; rows: where each correction is measured."""
    measured = torch.zeros(8, levels, dtype=torch.bool)
    for number, places in enumerate(rows, 1):
        measured[places, number] = True
    return Plan.given(measured, **options)


# --- weights -------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_corrections_collected() -> None:
    """`sum_k W_k (f^k - f^(k-1)) = sum_k w_k f^k` for any outputs."""
    plan = Plan.draw(TABLE, "poisson", 5)
    assert plan.counts is not None
    f = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g = f.diff(dim=1, prepend=torch.zeros(4, 1, dtype=torch.float64))
    paid = plan.counts / plan.probabilities
    torch.testing.assert_close((plan.weights * f).sum(1), (paid * g).sum(1), rtol=0, atol=1e-12)
    assert torch.equal(plan.weights[:, -1], paid[:, -1])
    assert torch.equal(plan.weights[:, :-1], paid[:, :-1] - paid[:, 1:])


def test_collect_takes_batches() -> None:
    paid = torch.tensor([[2.0, 1.0, 4.0], [1.0, 1.0, 1.0]])
    assert collect(paid).tolist() == [[1.0, -3.0, 4.0], [0.0, 0.0, 1.0]]
    assert torch.equal(collect(paid[None])[0], collect(paid))


def test_where_all_is_certain_only_the_top_level_has_weight() -> None:
    for coins in COINS:
        plan = Plan.draw(torch.ones(5, 3), coins)
        assert plan.weights.tolist() == [[0.0, 0.0, 1.0]] * 5
        assert plan.runs.tolist() == [[0, 0, 1]] * 5


def test_a_level_below_an_equally_certain_one_has_no_weight() -> None:
    plan = Plan.draw(torch.tensor([[1.0, 1.0, 0.5]] * 40), "bernoulli")
    assert plan.calls[0] == 0
    assert plan.calls[1] == 40
    assert 0 < plan.calls[2] < 40


def test_a_held_correction_counts_once_however_often_its_coin_fell() -> None:
    plan = Plan.draw(torch.full((60, 2), 0.9), "poisson", estimator="held")
    assert plan.counts is not None
    assert plan.counts.max() > 1
    measured = (plan.counts[:, 1] > 0).double()
    assert torch.equal(plan.weights, torch.stack([1 - measured, measured], 1))


def test_samples_have_the_weights_of_their_own_coins() -> None:
    plan = Plan.draw(TABLE, "nested", 2, per_sample=True)
    indices = torch.tensor([4, 9])
    paid = toss("nested", TABLE, 2, indices) / TABLE
    assert torch.equal(plan.sample_weights(indices), collect(paid))
    with pytest.raises(ValueError, match=r"own coins: ask sample_weights\(indices\)"):
        _ = plan.weights


# --- what runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coins", ["systematic", "bernoulli", "nested"])
def test_expected_calls_are_the_mean_over_all_outcomes(coins: str) -> None:
    counts, chances = outcomes(coins, TABLE)
    calls = torch.stack([Plan(TABLE, table, coins).calls for table in counts])
    expected = Plan.draw(TABLE, coins).expected_calls
    torch.testing.assert_close((chances[:, None] * calls).sum(0), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("coins", COINS)
def test_expected_calls_are_the_mean_over_seeds(coins: str) -> None:
    """Within 4 standard errors of 1500 seeds."""
    plans = [Plan.draw(TABLE, coins, seed) for seed in range(1500)]
    calls = torch.stack([plan.calls for plan in plans])
    off = calls.mean(0) - plans[0].expected_calls
    assert (off.abs() <= 4 * calls.std(0) / math.sqrt(1500) + 1e-12).all()


@pytest.mark.parametrize("table", [TABLE, torch.tensor([[1.0, 0.5, 0.25]] * 8, dtype=torch.float64)])
@pytest.mark.parametrize("coins", COINS)
def test_expected_calls_are_the_mean_over_samples(coins: str, table: Tensor) -> None:
    """Within 4 standard errors of 50 000 samples. Poisson: 2 / 0.5 cancels 1 / 0.25."""
    plan = Plan.draw(table, coins, per_sample=True)
    calls = (plan.sample_weights(torch.arange(50_000)) != 0).double().sum(1)
    off = calls.mean(0) - plan.expected_calls
    assert (off.abs() <= 4 * calls.std(0) / math.sqrt(50_000) + 1e-12).all()
    assert torch.equal(plan.calls, plan.expected_calls)


def test_a_held_correction_is_stored_only_where_it_is_used_again() -> None:
    """Measured at 0, 3, 4, 5: the gap 1-2 needs 0; 6-7 needs 5, and for a line 4 as well."""
    for order, stored in ((0, [0, 5]), (1, [0, 4, 5])):
        plan = held([0, 3, 4, 5], estimator="held", order=order)
        assert plan.stored[:, 1].nonzero().flatten().tolist() == stored
        # the cheapest runs where it is the estimate (1, 2, 6, 7) or measures what is stored
        assert plan.runs[:, 0].nonzero().flatten().tolist() == sorted({1, 2, 6, 7, *stored})
        assert plan.runs[:, 1].nonzero().flatten().tolist() == [0, 3, 4, 5]


def test_hindsight_runs_the_cheapest_once_more_where_it_revises() -> None:
    """Measured at 0, 3, 4: only 3 comes after a gap; after 4 nothing is measured again."""
    plan = held([0, 3, 4])
    assert plan.revised.nonzero().flatten().tolist() == [3]
    assert plan.runs[:, 0].tolist() == [1, 1, 1, 2, 1, 1, 1, 1]
    assert plan.runs[:, 1].tolist() == [1, 0, 0, 1, 1, 0, 0, 0]
    assert plan.calls.tolist() == [9, 3]
    assert not held([0, 3, 4], estimator="held").revised.any()


def test_the_first_row_measures_everything_and_the_cheapest_always_runs() -> None:
    for plan in (
        Plan.given(torch.zeros(4, 3)),
        Plan.draw(torch.full((4, 3), 1e-6), "bernoulli", estimator="held"),
    ):
        assert plan.counts is not None
        assert plan.counts.tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]]


def test_cost_weighs_the_calls() -> None:
    plan = held([0, 3, 4])
    assert plan.cost(torch.tensor([0.25, 1.0])) == 9 * 0.25 + 3
    assert plan.expected_cost(torch.tensor([0.25, 1.0])) == plan.cost(torch.tensor([0.25, 1.0]))
    drawn, costs = Plan.draw(TABLE, "nested", 1), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    assert drawn.cost(costs) == pytest.approx((drawn.runs.sum(0) * costs).sum().item(), abs=1e-12)
    assert drawn.expected_cost(costs) == pytest.approx((drawn.expected_calls * costs).sum().item(), abs=1e-12)


# --- plain data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        Plan.draw(TABLE, "poisson", 3, levels=("a", "b", "c"), about={"solver": "ddim", "cost": 0.1}),
        Plan.draw(TABLE / 3, "nested", 3, per_sample=True),
        Plan.draw(TABLE, "systematic", 3, estimator="held", order=0),
        held([0, 3], [0, 5], levels=3),
    ],
    ids=["jump", "per_sample", "held", "hindsight"],
)
def test_a_plan_is_plain_data(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.to_dict() == plan.to_dict()
    assert torch.equal(again.probabilities, plan.probabilities)
    assert again.probabilities.dtype == torch.float64
    assert torch.equal(again.calls, plan.calls)
    if plan.per_sample:
        assert again.per_sample
        assert torch.equal(again.sample_weights(torch.arange(9)), plan.sample_weights(torch.arange(9)))
    else:
        assert torch.equal(again.weights, plan.weights)
        assert torch.equal(again.runs, plan.runs)


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json is no plan; make one with: "):
        Plan.load(tmp_path / "none.json")
    for other in ({"format": 7}, {}):
        (tmp_path / "plan.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=r"^a plan of format .*; this version reads 1, draw it again$"):
            Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "guess"}, "estimator must be one of jump, held, hindsight, got 'guess'"),
        ({"order": 2}, "order of a held correction must be 0 or 1, got 2"),
        ({"levels": ("xs", "s")}, "probabilities have 3 columns, but levels are xs, s"),
        ({"estimator": "held", "per_sample": True}, "held corrections need one plan for all samples; leave per_sample"),
        ({"coins": "fair"}, "coins must be one of systematic, bernoulli, nested, poisson, got 'fair'"),
        ({"coins": "fair", "per_sample": True}, "coins must be one of systematic"),
        ({"probabilities": TABLE - 0.2}, "probabilities must be in (0, 1], got p = 0 at evaluation 3, level 3 of 3"),
    ],
    ids=str,
)
def test_bad_plans_get_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*$"):
        Plan.draw(**{"probabilities": TABLE} | options)


def test_jump_needs_a_chance_for_every_level() -> None:
    """Measured or not, 0 or 1, is no chance to divide by."""
    with pytest.raises(ValueError, match=r"^probabilities must be in \(0, 1\], got p = 0 at evaluation 1, level 2"):
        held([0, 3], estimator="jump")


# --- recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5, "mse": 0.1}, "give one of budget, mse and delta, got budget and mse"),
        ({"budget": 0.5, "delta": 0.1}, "give one of budget, mse and delta, got budget and delta"),
        ({"budget": 0.0}, "budget must be in (0, 1], a share of the largest level's cost, got 0.0"),
        ({"budget": 1.5}, "budget must be in (0, 1], a share of the largest level's cost, got 1.5"),
        ({"mse": 0.0}, "mse must be positive, got 0.0"),
        ({"mse": math.nan}, "mse must be positive, got nan"),
        ({"probabilities": "guess"}, "probabilities must be calibrated, learned, theory or numbers, got 'guess'"),
        ({"budget": 0.5, "coins": "fair"}, "coins must be one of systematic, bernoulli, nested, poisson, got 'fair'"),
        ({"budget": 0.5, "estimator": "guess"}, "estimator must be one of jump, held, hindsight, got 'guess'"),
        ({}, "calibrated probabilities need budget= or mse=, such as budget=0.25"),
        ({"probabilities": "theory"}, "theory probabilities need budget= or mse=, such as budget=0.25"),
        ({"delta": 0.5, "probabilities": (1.0, 0.5)}, "delta shifts learned coefficients; say probabilities=learned"),
    ],
    ids=str,
)
def test_bad_recipes_get_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*$"):
        Recipe(**options)


def pair(**options: Any) -> Family:
    """Untrained levels xs and s."""
    return Family([level("xs", data="digits", **options), level("s", data="digits", seed=1)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5}, "this family of digits is not calibrated: python -m mlem.multilevel calibrate FAMILY"),
        ({"mse": 0.1, "probabilities": (1.0, 0.5)}, "this family of digits is not calibrated: "),
        ({"probabilities": "learned"}, "this family of digits has no learned coefficients: "),
        ({"probabilities": (1.0, 0.5, 0.2)}, "probabilities= must be 2 numbers, for xs, s, got 3"),
        ({"probabilities": (1.0,), "levels": ("xl",)}, "level must be one of xs, s, got 'xl'"),
        ({"probabilities": (1.0, 0.5), "order": 3}, "order of a held correction must be 0 or 1, got 3"),
        ({"probabilities": "theory", "budget": 1e-6}, "budget=1e-06 of 4 evaluations is 4e-06 evaluations of the larg"),
        ({"probabilities": (1.0, 0.5), "per_sample": True}, "held corrections need one plan for all samples; "),
    ],
    ids=str,
)
def test_recipes_say_what_the_family_lacks(options: dict[str, Any], message: str) -> None:
    family = pair()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*$"):
        Sampler(family, steps=4, plan=family.plan(**options))


def test_numbers_become_the_probabilities_of_every_row() -> None:
    family = pair()
    plan = Sampler(family, steps=6, plan=family.plan(probabilities=(1.0, 0.5), estimator="jump", seed=3)).plan
    assert plan is not None
    expected = Plan.draw(torch.tensor([[1.0, 0.5]] * 6), seed=3)
    assert torch.equal(plan.probabilities, expected.probabilities)
    assert torch.equal(plan.weights, expected.weights)
    assert plan.about["steps"] == 6
    assert plan.about["solver"] == "ddim"


@pytest.mark.parametrize("coins", COINS)
@pytest.mark.parametrize("budget", [0.3, 0.5])
def test_a_budget_is_spent_on_average(coins: str, budget: float) -> None:
    """Probabilities by the theorem's law, scaled until the expected cost is the budget."""
    family = closed_family()
    recipe = family.plan(probabilities="theory", gamma=3.0, budget=budget, estimator="jump", coins=coins)
    plan = recipe.plan(family, solver := make_solver("ddim"), solver.grid(COSINE, 20))
    costs = torch.tensor([one.flops / family.levels[-1].flops for one in family.levels], dtype=torch.float64)
    assert plan.expected_cost(costs) <= 20 * budget
    assert plan.expected_cost(costs) == pytest.approx(20 * budget, rel=1e-6)
    scaled = plan.probabilities[0, 1:]
    assert (scaled[1] / scaled[0]).item() == pytest.approx((costs[2] / costs[1]).item() ** -(0.5 + 1 / 3), rel=1e-9)


def test_plans_are_found_by_name() -> None:
    family = pair()
    with pytest.raises(ValueError, match=r"^plan=best: there are none; memorise one with: "):
        stored_plan(family, "best")
    plan = Plan.draw(torch.tensor([[1.0, 0.5]] * 4), levels=("xs", "s"))
    family.fitted["plans"] = {"best": plan.to_dict(), "cheap": plan.to_dict()}
    assert stored_plan(family, "best").to_dict() == plan.to_dict()
    with pytest.raises(ValueError, match=r"^plan=other: there are best, cheap; memorise one with: "):
        stored_plan(family, "other")


# --- coefficients --------------------------------------------------------------------------------------------------


def test_the_feature_has_mean_0_and_variance_1_in_log_snr() -> None:
    """Over times whose log-SNR is uniform from t = 1/1000 to t = 1."""
    high, low = COSINE.log_snr(1 / 1000).item(), COSINE.log_snr(1.0).item()
    middles = low + (high - low) * (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    assert feature(COSINE, [1.0])[0].item() == pytest.approx(-math.sqrt(3), abs=1e-9)
    u = feature(COSINE, COSINE.time_from_log_snr(middles))
    assert u.mean().item() == pytest.approx(0, abs=1e-6)
    assert u.square().mean().item() == pytest.approx(1, abs=1e-5)


def test_coefficients_give_probabilities_and_are_fitted_back() -> None:
    times = [1.0, 0.7, 0.4, 0.1]
    found = Coefficients(torch.tensor([0.0, 0.8, -0.3]), torch.tensor([CERTAIN, 0.2, -1.0]))
    p = found.probabilities(COSINE, times)
    assert (p[:, 0] == 1).all()
    assert p[2, 1].item() == pytest.approx(1 / (1 + math.exp(-(0.8 * feature(COSINE, times)[2].item() + 0.2))))
    alpha, beta = Coefficients.fit(p, COSINE, times)
    torch.testing.assert_close(alpha, found.alpha, rtol=0, atol=1e-9)
    torch.testing.assert_close(beta, found.beta, rtol=0, atol=1e-9)


def test_delta_shifts_all_but_the_first_level() -> None:
    found = Coefficients(torch.tensor([0.5, 0.8]), torch.tensor([0.3, 0.2]))
    p, shifted = (found.probabilities(COSINE, [0.9, 0.2], delta) for delta in (0.0, 1.5))
    assert torch.equal(p[:, 0], shifted[:, 0])
    torch.testing.assert_close(torch.logit(shifted[:, 1]) - torch.logit(p[:, 1]), torch.full((2,), 1.5).double())
    assert (found.probabilities(COSINE, [0.5], -1000.0) > 0).all()


@pytest.mark.parametrize(
    ("alpha", "beta", "message"),
    [
        ([1.0], [1.0, 2.0], r"alpha and beta must be \(levels,\), got \(1,\) and \(2,\)"),
        ([[1.0]], [[1.0]], r"alpha and beta must be \(levels,\), got"),
        ([math.nan, 0.0], [1.0, 2.0], "alpha and beta must be finite; fit them again"),
        ([0.0, 0.0], [1.0, math.inf], "alpha and beta must be finite; fit them again"),
    ],
)
def test_bad_coefficients_are_refused(alpha: list[float], beta: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Coefficients(torch.tensor(alpha), torch.tensor(beta))


# --- what is stored with a family ----------------------------------------------------------------------------------


def calibration(family: Family) -> Calibration:
    """Made up, but of these weights."""
    one = Response(torch.eye(4).view(1, 4, 1, 4).double(), torch.ones(1, 4).double(), torch.zeros(1).double())
    differences = torch.tensor([[0.0, 0.1], [0.1, 0.0]], dtype=torch.float64).repeat(4, 1, 1)
    log_snr = torch.linspace(COSINE.log_snr(1.0).item(), COSINE.log_snr(0.01).item(), 4, dtype=torch.float64)
    errors = {"ddim/uniform": {4: 0.1, 8: 0.025}}
    about = {"weights": family.weights_hash, "images": 1}
    times = {64: (0.1, 0.4), 1: (0.3, 0.5)}
    by_image, responses = torch.ones(1, 3, dtype=torch.float64), {"ode": one, "sde": one}
    pilots = {"ode/held": [[0.1, 0.2]]}
    measured = (times, log_snr, differences, by_image, responses)
    return Calibration(("xs", "s"), (1.0, 4.0), *measured, about, errors, pilots)


def test_what_was_fitted_is_stored_with_the_family(tmp_path: Path) -> None:
    family = pair()
    own, plan = calibration(family), Plan.draw(torch.tensor([[1.0, 1 / 3]] * 4), "nested", 1)
    learned = Coefficients(torch.tensor([0.0, 1.0]), torch.tensor([CERTAIN, -0.1]), ("xs", "s"), {"solver": "ddim"})
    family.fitted = {"calibration": own.to_dict(), "coefficients": learned.to_dict(), "plans": {"best": plan.to_dict()}}
    family.save(tmp_path)
    again = Family.load(tmp_path)
    assert again.fitted == json.loads(json.dumps(family.fitted))
    assert again.weights_hash == family.weights_hash
    read = Calibration.of(again)
    assert read.to_dict() == own.to_dict()
    assert read.responses["ode"].inner.dtype == torch.float64
    assert read.costs("seconds", 50).tolist() == [0.25, 1.0]
    assert read.costs("seconds", 2).tolist() == [0.6, 1.0]
    assert read.costs("flops").tolist() == [0.25, 1.0]
    with pytest.raises(ValueError, match=r"^cost must be seconds or flops, got 'euros'$"):
        read.costs("euros")
    assert Coefficients.of(again).to_dict() == learned.to_dict()
    assert stored_plan(again, "best").to_dict() == plan.to_dict()
    # and it is used: no error, no measurement
    made = Sampler(again, steps=4, plan=again.plan(budget=0.6)).plan
    assert made is not None
    assert made.cost(read.costs()) <= 0.6 * 4
    assert made.about["predicted_mse"] >= 0.1


def test_a_family_without_fits_stores_none(tmp_path: Path) -> None:
    pair().save(tmp_path)
    assert not (tmp_path / "calibration.json").exists()
    assert Family.load(tmp_path).fitted == {"plans": {}}


def test_what_was_fitted_to_other_weights_is_refused() -> None:
    family = pair()
    stored = calibration(family).to_dict()
    learned = Coefficients(torch.zeros(2), torch.zeros(2), about={"weights": family.weights_hash}).to_dict()
    assert pair().weights_hash == family.weights_hash
    other = pair()
    with torch.no_grad():
        next(iter(other.levels[0].network.parameters())).view(-1)[0] += 1e-3
    assert other.weights_hash != family.weights_hash
    other.fitted = {"calibration": stored, "coefficients": learned}
    with pytest.raises(ValueError, match=r"^the calibration is of other weights: python -m mlem\.multilevel calibrate"):
        sample(other, indices=[0], steps=4, plan=other.plan(budget=0.5))
    with pytest.raises(ValueError, match=r"^the coefficients are of other weights; fit them again: "):
        Coefficients.of(other)
    other.fitted["calibration"] = stored | {"format": 0}
    with pytest.raises(ValueError, match=r"^a calibration of format 0, this version reads 1; calibrate again$"):
        Calibration.of(other)
