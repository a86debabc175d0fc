"""Plans that are searched for: they meet the budget or the error, and spend it well."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from mlem.family import Family
from mlem.multilevel.estimators import Hindsight
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.planner import make_plan
from mlem.multilevel.search import search
from mlem.multilevel.spec import PlanSpec
from mlem.sampling import sample
from mlem.solvers import make_solver
from tests.waves import COSINE, every, family, fitted, level, plan, predictor

pytestmark = pytest.mark.usefixtures("float64_module")
LEVELS = [("1", "2", "3"), ("1", "3"), ("2", "3"), ("3",)]


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("estimator", ["held", "hindsight"])
@pytest.mark.parametrize("levels", LEVELS[:3], ids=str)
def test_a_search_spends_its_budget_well(solver: str, estimator: str, levels: tuple[str, ...]) -> None:
    """At most the budget, all but what one more measurement costs, and not worse than evenly spread rows."""
    by, costs = predictor(solver, 32), family().fitted.calibration_for(family()).costs("flops")
    own = costs[[int(name) - 1 for name in levels]]
    for budget in (7.0, 16.0):
        found = search(by, [levels], costs, 0, estimator, budget)
        assert found is not None
        assert budget - 2.5 < found.cost(own) <= budget
        for stride in (2, 3, 4, 6, 8, 16):
            even = every(stride, 32, len(levels), estimator=estimator, order=0, levels=levels)
            assert even.cost(own) > found.cost(own) or by.response_error(found) <= by.response_error(even) * 1.0001


@pytest.mark.parametrize("estimator", ["held", "hindsight"])
@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_a_search_keeps_every_budget(solver: str, estimator: str) -> None:
    """Also where rows are dense, so that moving one parts neighbours, and small levels are not cheap."""
    costs = torch.tensor([0.1, 0.4, 1.0])
    by = predictor(solver, 12)
    for budget in torch.linspace(4.0, 12.0, 17).tolist():
        found = search(by, [("1", "2", "3")], costs, 0, estimator, budget)
        assert found is not None
        assert found.cost(costs) <= budget


def test_a_search_finds_nothing_for_too_little() -> None:
    by, costs = predictor("ddpm", 32), family().fitted.calibration_for(family()).costs("flops")
    for levels in LEVELS:
        assert search(by, [levels], costs, 0, "held", 0.9) is None
    assert search(by, [("3",)], costs, 0, "held", 31.9) is None
    alone = search(by, [("3",)], costs, 0, "held", 32.0)
    assert alone is not None
    assert by.response_error(alone) == 0


def test_more_budget_is_predicted_to_be_better() -> None:
    by = predictor("ddpm", 32)
    for options in ({"estimator": "hindsight"}, {"estimator": "jump", "coins": "bernoulli"}):
        errors = [by.error(plan("ddpm", 32, budget=budget, **options)) for budget in (0.2, 0.4, 0.8, 1.0)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-3 * errors[0]


@pytest.mark.parametrize(
    ("solver", "options"),
    [("ddpm", {}), ("ddpm", {"estimator": "jump", "coins": "bernoulli"}), ("ddim", {"estimator": "held"})],
    ids=str,
)
def test_an_error_is_reached_by_the_smallest_budget(solver: str, options: dict[str, Any]) -> None:
    """The prediction is at most mse, and that of a budget 5 percent smaller is not."""
    by, costs = predictor(solver, 32), family().fitted.calibration_for(family()).costs("flops")
    mse = 2e-7 + {"ddpm": 3e-6, "ddim": 3e-8}[solver]
    found = plan(solver, 32, mse=mse, **options)
    assert by.total(found) <= mse
    assert found.about["predicted_mse"] == pytest.approx(by.total(found))
    own = costs[[int(name) - 1 for name in found.levels]]
    less = plan(solver, 32, budget=0.95 * found.expected_cost(own) / 32, **options)
    assert by.total(less) > mse


def test_an_error_below_the_solvers_own_gets_one_line() -> None:
    says = "mse=1e-07: the error of ddpm in 32 steps on the uniform grid alone is 2e-07; use more steps, or another"
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        plan("ddpm", 32, mse=1e-7)
    says = "mse=0.1: the error of heun in 8 steps on the log_snr grid alone was not measured; use more steps"
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        plan("heun", 8, mse=0.1, estimator="held")


@pytest.mark.parametrize("options", [{}, {"estimator": "jump", "coins": "bernoulli"}], ids=str)
def test_an_error_below_that_of_the_levels_gets_one_line(options: dict[str, Any]) -> None:
    """Levels 1 and 2 cannot know what only level 3 does."""
    least = predictor("ddpm", 32).total(every(1, 32, 1, levels=("2",)))
    says = f"mse={least / 2:g}: the levels 1, 2 reach {least:.2g} at best; add a larger level to levels="
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        plan("ddpm", 32, mse=least / 2, levels=("1", "2"), **options)
    assert plan("ddpm", 32, mse=least * 1.01, levels=("1", "2"), **options).about["predicted_mse"] <= least * 1.01


@pytest.mark.parametrize(
    "options",
    [
        *({"estimator": estimator} for estimator in ("held", "hindsight")),
        *({"estimator": "jump", "coins": coins} for coins in ("systematic", "bernoulli", "nested", "poisson")),
        {"estimator": "hindsight", "coins": "systematic"},
    ],
    ids=str,
)
def test_the_ledger_has_the_cost_that_was_promised(options: dict[str, Any]) -> None:
    """In FLOPs, exactly, for plans that all samples share."""
    spec = family().plan(budget=0.4, cost="flops", **options)
    result = sample(family(), indices=range(3), solver="ddpm", steps=24, plan=spec)
    found = plan("ddpm", 24, budget=0.4, **options)
    spent = sum(cost.flops for cost in result.ledger.levels.values()) / 3 / family().level().flops
    assert spent == pytest.approx(found.about["cost"], rel=1e-12)
    expected = sum(cost.expected_calls * family().level(name).flops for name, cost in result.ledger.levels.items())
    assert expected / 3 / family().level().flops == pytest.approx(found.about["expected_cost"], rel=1e-12)
    if options.get("coins") is None or options["estimator"] == "jump":
        assert 0.4 * 24 * 0.75 < found.about["expected_cost"] <= 0.4 * 24


@pytest.mark.parametrize("coins", ["bernoulli", "systematic"])
def test_own_coins_cost_what_was_promised(coins: str) -> None:
    """In batches of 64 too. Of 384 samples within 4 percent, which is chance."""
    options = {"budget": 0.4, "estimator": "jump", "coins": coins, "per_sample": True}
    result = sample(
        family(),
        indices=range(384),
        batch_size=64,
        solver="ddpm",
        steps=24,
        plan=family().plan(cost="flops", **options),
    )
    spent = sum(cost.flops for cost in result.ledger.levels.values()) / 384 / family().level().flops
    found = plan("ddpm", 24, **options)
    assert found.about["cost"] == found.about["expected_cost"]
    assert spent == pytest.approx(found.about["cost"], rel=0.04)


def test_the_best_levels_leave_out_a_useless_one() -> None:
    """Level 2 says what level 1 says, and costs more."""
    useless = fitted([level(1, 0.03, 1), level(2, 0.03, 1), level(3, 0.0, 3)], 16)
    method = make_solver("ddpm")
    grid = method.grid(COSINE, 32)
    for options in ({"estimator": "hindsight"}, {"estimator": "jump", "coins": "bernoulli"}):
        for budget in (0.2, 0.5):
            spec = PlanSpec(budget=budget, cost="flops", **options)
            by = predictor("ddpm", 32, of=useless)
            without, all_levels, found = (
                by.choice(make_plan(replace(spec, levels=levels), useless, method, grid))
                for levels in (("1", "3"), ("1", "2", "3"), None)
            )
            assert found == min(without, all_levels)
            assert without <= 1.1 * found  # rows that were moved may be a little luckier with more levels


def test_the_best_levels_are_those_of_least_predicted_error() -> None:
    by = predictor("ddpm", 32)
    for budget in (0.1, 0.3, 0.6):
        errors = {}
        for levels in LEVELS:
            try:
                errors[levels] = by.choice(plan("ddpm", 32, budget=budget, levels=levels))
            except ValueError:
                continue
        best = plan("ddpm", 32, budget=budget)
        assert by.choice(best) == min(errors.values())
        assert by.choice(best) == errors[best.levels]
        assert len(errors) > 1


def test_a_budget_of_one_is_the_largest_level_alone() -> None:
    found = plan("ddpm", 32, budget=1.0)
    assert found.levels == ("3",)
    assert found.about["cost"] == 32
    assert found.about["predicted_mse_of_plan"] == 0


@pytest.mark.parametrize("estimator", ["hindsight", "held"])
def test_where_nothing_else_fits_the_largest_level_is_left_out(estimator: str) -> None:
    """And the run says what error that has; levels that were asked for stay."""
    spec = family().plan(budget=0.05, cost="flops", estimator=estimator)
    with pytest.warns(UserWarning, match=r"^budget=0.05 is less than any plan with level 3 costs; with 1.2 alone"):
        result = sample(family(), indices=range(2), solver="ddpm", steps=24, plan=spec)
    assert set(result.ledger.levels) == {"1", "2"}
    with pytest.raises(ValueError, match=r"no plan is that cheap"):
        sample(
            family(),
            indices=range(2),
            solver="ddpm",
            steps=24,
            plan=family().plan(budget=0.05, cost="flops", levels=("1", "3"), estimator=estimator),
        )


def test_a_search_that_takes_long_shows_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("mlem.waiting.PATIENCE", -1.0)
    plan("ddpm", 12, budget=0.5)
    assert "searching for a plan of 12 evaluations" in capsys.readouterr().err


@pytest.mark.parametrize("coins", ["systematic", "bernoulli"])
def test_coins_too_rare_for_the_largest_level_leave_it_out(coins: str) -> None:
    """A probability of 1e-9 fits into any budget: what such a coin counts is never tossed, and 1e9 once it is."""
    spec = family().plan(budget=0.05, cost="flops", estimator="jump", coins=coins)
    with pytest.warns(UserWarning, match=r"^budget=0.05 is less than any plan with level 3 costs; with 1") as caught:
        result = sample(family(), indices=range(2), solver="ddpm", steps=24, plan=spec)
    assert "3" not in result.ledger.levels
    assert float(str(caught[0].message).rpartition(" ")[2]) == pytest.approx(
        plan("ddpm", 24, **vars(spec)).about["predicted_mse_of_plan"], rel=0.05
    )
    asked = plan("ddpm", 24, **vars(spec) | {"levels": ("1", "3")})
    assert asked.levels == ("1", "3")
    enough = plan("ddpm", 24, **vars(spec) | {"budget": 0.3})
    assert enough.levels[-1] == "3"
    assert enough.expected_calls[-1] >= 1


def test_seconds_outside_the_networks_count() -> None:
    """A budget in seconds is a share of all that the largest level alone takes, of which steps take some anyway."""
    found = family().fitted.calibration_for(family())
    timed = replace(found, outside={64: {"ode": 0.0, "sde": 0.25 * found.seconds[64][-1]}})
    other = Family(family().levels, Fitted(timed))
    method = make_solver("ddpm")
    grid = method.grid(COSINE, 24)
    for coins in (None, "systematic"):
        options = {"budget": 0.5, "estimator": "hindsight" if coins is None else "jump", "coins": coins}
        before, after = (make_plan(PlanSpec(**options), one, method, grid) for one in (family(), other))
        assert before.about["outside_cost"] == 0
        assert after.about["outside_cost"] == pytest.approx(24 * 0.25)
        assert before.about["expected_cost"] <= 0.5 * 24
        # 1.25 a step, half of it to be spent, 0.25 of that outside
        assert 0.375 * 24 - 1.2 < after.about["expected_cost"] <= 0.375 * 24
        in_flops = make_plan(PlanSpec(**options, cost="flops"), other, method, grid)
        assert in_flops.about["outside_cost"] == 0


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_the_work_of_a_search_grows_with_the_steps(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rows looked at: at most eight times as many for four times the steps, where sixteen times were needed."""
    work, deviations = [0], Hindsight.deviations

    def counted(self: Hindsight, weights: Any, *args: Any) -> Any:
        work[0] += weights.size
        return deviations(self, weights, *args)

    monkeypatch.setattr(Hindsight, "deviations", counted)
    looked: list[int] = []
    for steps in (64, 256):
        work[0] = 0
        plan(solver, steps, budget=0.4)
        looked.append(work[0])
    assert looked[1] <= 8 * looked[0]
