"""Plans: weights, what runs, what it costs, plain data."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlem.multilevel.coins import COINS
from mlem.multilevel.estimators import collect
from mlem.multilevel.plan import Plan
from mlem.schedule import NoiseSchedule
from tests.problems import outcomes

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
    paid = COINS["nested"].toss(TABLE, 2, indices) / TABLE
    assert torch.equal(plan.sample_weights(indices), collect(paid))
    with pytest.raises(ValueError, match=r"own coins: call sample_weights\(indices\)"):
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


def test_hindsight_runs_every_level_at_most_once_where_it_revises() -> None:
    """Measured at 0, 3, 4: only 3 comes after a gap; after 4 nothing is measured again."""
    plan = held([0, 3, 4])
    assert plan.revised.nonzero().flatten().tolist() == [3]
    assert plan.runs[:, 0].tolist() == [1, 1, 1, 1, 1, 1, 1, 1]
    assert plan.evaluated[:, 0].tolist() == [True, True, True, False, True, True, True, True]
    assert plan.runs[:, 1].tolist() == [1, 0, 0, 1, 1, 0, 0, 0]
    assert plan.calls.tolist() == [8, 3]
    assert not held([0, 3, 4], estimator="held").revised.any()


def test_the_cheapest_level_always_runs_and_coins_measure_the_first_row() -> None:
    tossed = Plan.draw(torch.full((4, 3), 1e-6), "bernoulli", estimator="held")
    given = Plan.given(torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 1, 1]]))
    assert tossed.counts is not None
    assert given.counts is not None
    assert tossed.counts.tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert given.counts.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]]


def test_a_plan_can_be_begun_with_all_levels() -> None:
    late = Plan.given(torch.tensor([[0, 0, 0], [0, 1, 1]]))
    begun = late.begun()
    assert begun.counts is not None
    assert begun.counts.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert begun.begun() is begun
    assert (switch := Plan.switching([0, 1], ["s", "m"])).begun() is switch


def test_cost_weighs_the_calls() -> None:
    plan = held([0, 3, 4])
    assert plan.cost(torch.tensor([0.25, 1.0])) == 8 * 0.25 + 3
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


def test_a_plan_of_an_earlier_version_is_read() -> None:
    """Whose correlation length was called memory."""
    plan = held([0, 3], correlation_length=0.7)
    plain = plan.to_dict()
    plain["memory"] = plain.pop("correlation_length")
    assert Plan.from_dict(plain).to_dict() == plan.to_dict()


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json is not a plan; make one with: "):
        Plan.load(tmp_path / "none.json")
    path = tmp_path / "plan.json"
    for other, found in (({"format": 7}, "format 7"), ({}, "format None")):
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match=rf"^{path} has {found}, but this version reads 1; draw it again: "):
            Plan.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=rf"^{path} holds a JSON list, not an object; restore it or delete it"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"counts": [[1, 1]]}, "counts and probabilities must have one shape, got (1, 2) and (4, 3)"),
        ({"counts": [[1, 1, -1]] * 4}, "counts must be whole numbers >= 0, got -1 among"),
        ({"counts": [[1, 1, 0.5]] * 4}, "counts must be whole numbers >= 0, got 0.5 among"),
        ({"counts": [[1, 1]] * 3 + [[1]]}, ""),
        ({"counts": [[1, 1, 2**70]] * 4}, ""),
        ({"counts": "many"}, ""),
        ({"counts": None, "coins": "dice"}, "coins must be one of"),
        ({"probabilities": [0.5, 0.5]}, "probabilities must be a table (evaluations, levels), got shape (2,)"),
        ({"probabilities": None}, ""),
        ({"estimator": "held", "counts": [[1, 1, 0]] * 4}, "held corrections must be measured at some row"),
        ({"estimator": "held", "probabilities": [[2.0, 1, 1]] * 4}, "probabilities must be a table"),
        ({"seed": "0"}, "'str' object cannot be interpreted as an integer"),
        ({"correlation_length": "long"}, ""),
        ({"about": 3}, ""),
        ({"levels": None}, ""),
    ],
    ids=str,
)
def test_a_damaged_plan_gets_one_line(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(Plan.draw(TABLE).to_dict() | change))
    with pytest.raises(
        ValueError, match=rf"^{path} is damaged \({re.escape(says)}.*\); draw it again: python -m"
    ) as no:
        Plan.load(path)
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("field", sorted(Plan.draw(TABLE).to_dict().keys() - {"format"}))
def test_a_missing_field_of_a_plan_is_named(field: str) -> None:
    plain = Plan.draw(TABLE).to_dict()
    del plain[field]
    with pytest.raises(ValueError, match=rf"^the plan is damaged \(no '{field}'\); draw it again: "):
        Plan.from_dict(plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "guess"}, "estimator must be one of jump, held, hindsight, switch, forecast, got 'guess'"),
        ({"order": 2}, "order of a held correction must be 0 or 1, got 2"),
        ({"levels": ("xs", "s")}, "probabilities have 3 columns, but levels are xs, s"),
        (
            {"estimator": "held", "per_sample": True},
            "held corrections need one plan for all samples; leave out per_sample",
        ),
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


def test_the_fingerprint_of_a_plan_is_that_of_earlier_versions() -> None:
    """Folders of samples and rows on disk name plans by it."""
    measured = torch.arange(8)[:, None] % torch.tensor([1, 2, 5]) == 0
    plan = Plan.given(measured, correlation_length=3.0, about={"steps": 8})
    assert plan.fingerprint() == "159a4ffd45dbd60de47d14bfb7d9b53573883309bfb350b63d473b8251034bfa"
    assert plan.fingerprint(seed=1) != plan.fingerprint()
