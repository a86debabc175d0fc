"""The multilevel noise estimate: unbiased, exact where it must be, never running a level without weight."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlem.denoiser import Denoiser
from mlem.family import Family
from mlem.multilevel.coins import COINS
from mlem.multilevel.denoiser import MultilevelDenoiser
from mlem.multilevel.plan import Plan
from mlem.multilevel.spec import PlanSpec
from mlem.sampling import Sampler, sample
from mlem.solvers import GridPoint, make_solver
from tests.hierarchy import ALL, COSINE, TABLE, TIMES, at, call, denoisers, measured, networks, noise, trajectory
from tests.problems import closed_family, gaussian, level, outcomes, rms

of_diffusers = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def forbidden(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("a level of weight zero was run")


# --- unbiased ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coins", ["systematic", "bernoulli", "nested"])
def test_the_mean_over_all_outcomes_is_the_top_level(coins: str) -> None:
    counts, chances = outcomes(coins, TABLE)
    assert len(counts) > 5
    x, times, levels = noise(4), TIMES[:3], denoisers()
    estimates = torch.stack(
        [call(MultilevelDenoiser(levels, Plan(TABLE, table, coins), schedule=COSINE), x, times) for table in counts]
    )
    top = torch.stack([levels[-1](x, at(t, 4)) for t in times])
    mean = (chances.view(-1, 1, 1, 1) * estimates).sum(0)
    torch.testing.assert_close(mean, top, rtol=0, atol=1e-12)
    assert rms(estimates[0] - top) > 0.01


@pytest.mark.parametrize("coins", ["bernoulli", "nested"])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm_solver_pp"])
def test_the_mean_sample_is_that_of_the_top_level_for_linear_denoisers(coins: str, solver: str) -> None:
    """Rows toss independently and steps are affine, so means pass through; over all outcomes of three rows."""

    def wrong(factor: float, shift: float) -> Denoiser:
        return lambda x, t: factor * gaussian(COSINE)(x, t) + shift

    levels, table = [wrong(0.9, 0.1), wrong(0.97, -0.02), gaussian(COSINE)], TABLE[[0, 2, 1]]
    counts, chances = outcomes(coins, table)
    ends = torch.stack([trajectory(levels, Plan(table, one, coins), solver, 3, 4)[0] for one in counts])
    top = trajectory(levels, None, solver, 3, 4)[0]
    torch.testing.assert_close((chances.view(-1, 1, 1) * ends).sum(0), top, rtol=0, atol=1e-10)
    assert rms(ends - top) > 0.01


def test_the_variance_of_one_estimate_is_that_of_its_coins() -> None:
    """Independent coins: `sum_k (1 / p_k - 1) g_k^2`, over all outcomes."""
    table = TABLE[:1]
    counts, chances = outcomes("bernoulli", table)
    x, levels = noise(4), denoisers()
    runs = [call(MultilevelDenoiser(levels, Plan(table, one, "b"), schedule=COSINE), x, [0.5])[0] for one in counts]
    f = torch.stack([one(x, at(0.5, 4)) for one in levels])
    corrections = f.diff(dim=0, prepend=torch.zeros_like(f[:1]))
    expected = ((1 / table[0] - 1).view(-1, 1, 1) * corrections.square()).sum(0)
    variance = (chances.view(-1, 1, 1) * (torch.stack(runs) - f[-1]).square()).sum(0)
    torch.testing.assert_close(variance, expected, rtol=0, atol=1e-12)


# --- all probabilities 1 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ALL, ids=str)
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm_solver_pp", "euler_maruyama", "heun"])
def test_certain_coins_are_the_top_level_bit_for_bit(solver: str, options: dict[str, Any]) -> None:
    """A row for each evaluation, so nine for five steps of Heun; and no other level is called."""
    if solver == "heun" and options["estimator"] == "hindsight":
        return
    rows = 9 if solver == "heun" else 5
    common: dict[str, Any] = {"indices": range(3), "solver": solver, "steps": 5, "seed": 2}
    result = sample(networks(), plan=Plan.draw(torch.ones(rows, 2), **options), **common)
    assert torch.equal(result.x, sample(networks(), **common).x)
    assert result.ledger.levels["xs"].calls == 0
    assert result.ledger.levels["s"].calls == result.ledger.levels["s"].expected_calls == 3 * rows


@pytest.mark.parametrize("coins", COINS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_certain_coins_of_every_kind_are_the_top_level(coins: str, per_sample: bool) -> None:
    common: dict[str, Any] = {"indices": range(8), "steps": 5}
    result = sample(networks(), plan=Plan.draw(torch.ones(5, 2), coins, per_sample=per_sample), **common)
    assert torch.equal(result.x, sample(networks(), **common).x)
    assert {name: cost.calls for name, cost in result.ledger.levels.items()} == {"xs": 0, "s": 40}


def test_a_plan_may_name_some_of_the_levels(float64: None) -> None:
    family = closed_family()
    plan = Plan.draw(torch.ones(4, 2), levels=("1", "2"))
    result = sample(family, indices=range(3), steps=4, plan=plan)
    assert torch.equal(result.x, sample(family, indices=range(3), steps=4, level="2").x)
    assert list(result.ledger.levels) == ["1", "2"]


# --- what runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ALL, ids=str)
def test_a_level_without_weight_is_never_run(options: dict[str, Any]) -> None:
    """p_1 = p_2 = 1: level 1 cancels. What is measured at every row holds nothing."""
    f2, f3 = denoisers()[1:]
    last = 1.0 if options["estimator"] != "jump" else 0.5
    plan = Plan.draw(torch.tensor([[1.0, 1.0, last]] * 5), **options)
    end, _ = trajectory([forbidden, f2, f3], plan, "ddim", 5)
    assert torch.isfinite(end).all()


@pytest.mark.parametrize("coins", COINS)
def test_only_levels_with_weight_are_run(coins: str) -> None:
    """Exactly those that the plan says, row by row."""
    table, called = TABLE.repeat(4, 1), []

    def spy(number: int, inner: Denoiser) -> Denoiser:
        return lambda x, t: called.append(number) or inner(x, t)

    plan = Plan.draw(table, coins, 1)
    multilevel = MultilevelDenoiser([spy(*one) for one in enumerate(denoisers())], plan, schedule=COSINE)
    for row in range(12):
        called.clear()
        multilevel(noise(2), at(0.5, 2))
        assert called == (plan.weights[row] != 0).nonzero().flatten().tolist()
    assert (plan.weights == 0).any()


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver_pp", "ddpm", "heun"])
@pytest.mark.parametrize("options", ALL, ids=str)
def test_the_ledger_counts_what_the_plan_says(float64: None, options: dict[str, Any], solver: str) -> None:
    if solver == "heun" and options["estimator"] == "hindsight":
        return
    family, steps = closed_family(), 12
    rows = make_solver(solver).evaluations(GridPoint.of(COSINE, make_solver(solver).grid(COSINE, steps)))
    for coins in COINS:
        plan = Plan.draw(torch.tensor([[1.0, 0.5, 0.3]] * rows), coins, 4, **options)
        ledger = sample(family, indices=range(5), batch_size=2, solver=solver, steps=steps, plan=plan).ledger
        costs = ledger.levels.values()
        assert [cost.calls for cost in costs] == [5 * calls for calls in plan.calls.tolist()]
        assert [cost.expected_calls for cost in costs] == pytest.approx((5 * plan.expected_calls).tolist())
        assert ledger.evaluations == pytest.approx(plan.calls.sum().item())


def test_each_level_runs_on_its_share_of_the_batch_alone(float64: None) -> None:
    family, batch = closed_family(), 20
    plan = Plan.draw(torch.tensor([[1.0, 0.5, 0.1]] * 6), "bernoulli", 2, per_sample=True)
    ledger = sample(family, indices=range(batch), steps=6, plan=plan).ledger
    shares = (plan.sample_weights(torch.arange(batch)) != 0).sum((0, 1))
    assert [cost.calls for cost in ledger.levels.values()] == shares.tolist()
    expected = [cost.expected_calls for cost in ledger.levels.values()]
    assert expected == pytest.approx((batch * plan.expected_calls).tolist())


# --- chance is data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [*ALL, {"per_sample": True}, {"per_sample": True, "coins": "poisson"}],
    ids=str,
)
def test_a_planned_image_does_not_know_its_batch(options: dict[str, Any]) -> None:
    """To 1e-5: convolutions may choose another algorithm. And again bitwise, from a file too."""
    table = torch.tensor([[1.0, 0.4]] * 6)
    plan = Plan.draw(table, seed=3, **options)
    common: dict[str, Any] = {"indices": range(32), "solver": "ddpm", "steps": 6, "seed": 5}
    whole = sample(networks(), batch_size=32, plan=plan, **common).x
    for batch_size, first in ((1, 26), (7, 0)):
        parts = sample(networks(), batch_size=batch_size, plan=plan, **common | {"indices": range(first, 32)}).x
        torch.testing.assert_close(parts, whole[first:], rtol=0, atol=1e-5)
    sampler = Sampler(networks(), plan=plan, solver="ddpm", steps=6, seed=5)
    assert torch.equal(sampler.run(range(32)).x, whole)
    assert torch.equal(sampler.run(range(32)).x, whole)
    assert not torch.allclose(sample(networks(), plan=replace_seed(plan), **common).x, whole, atol=1e-3)


def replace_seed(plan: Plan) -> Plan:
    """The same plan with other coins."""
    options: dict[str, Any] = {"estimator": plan.estimator, "order": plan.order, "per_sample": plan.per_sample}
    return Plan.draw(torch.tensor([[1.0, 0.4]] * 6), plan.coins, plan.seed + 1, **options)


@pytest.mark.parametrize("options", [*ALL, {"per_sample": True}], ids=str)
def test_a_plan_from_a_file_gives_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    plan = Plan.draw(torch.tensor([[1.0, 1 / 3]] * 6), "nested", 3, **options)
    plan.save(tmp_path / "plan.json")
    a, b = (
        sample(networks(), indices=range(5), steps=6, plan=one).x for one in (plan, Plan.load(tmp_path / "plan.json"))
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("coins", COINS)
def test_own_coins_are_those_of_a_shared_plan_sample_by_sample(float64: None, coins: str) -> None:
    family, table = closed_family(), TABLE.repeat(2, 1)
    own = Plan.draw(table, coins, 6, per_sample=True)
    indices = [4, 11, 0, 7, 30, 2, 9, 5, 3, 1]
    together = sample(family, indices=indices, solver="ddpm", steps=6, plan=own).x
    counts = COINS[coins].toss(table, 6, torch.tensor(indices))
    assert not torch.equal(counts[0], counts[1])
    for number, index in enumerate(indices):
        shared = Plan(table, counts[number], coins)
        alone = sample(family, indices=[index], solver="ddpm", steps=6, plan=shared).x[0]
        torch.testing.assert_close(together[number], alone, rtol=0, atol=1e-12)


# --- plain calls and other libraries -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ALL[:3], ids=str)
def test_plain_calls_begin_anew_after_the_last_row(options: dict[str, Any]) -> None:
    plan = Plan.draw(torch.tensor([[1.0, 0.4, 0.3]] * 5), seed=2)
    if options["estimator"] == "held":  # a gap after the first row: nothing of the last trajectory may be in it
        plan = measured(5, [0, 3], [0, 2], **options)
    multilevel = MultilevelDenoiser(denoisers(), plan, schedule=COSINE)
    first, second = (call(multilevel, noise(4), TIMES) for _ in range(2))
    assert torch.equal(first, second)
    multilevel(noise(4, 1), at(0.9, 4))  # a trajectory that is broken off
    multilevel.start()
    assert torch.equal(call(multilevel, noise(4), TIMES), first)
    assert multilevel.names == ["1", "2", "3"]


def test_trajectories_do_not_know_one_another() -> None:
    """Two at once, in turns, are what they are one after the other; and none goes on after its last evaluation."""
    plan = measured(5, [0, 3], [0, 2], estimator="held")
    multilevel = MultilevelDenoiser(denoisers(), plan, schedule=COSINE)
    alone = [call(multilevel, noise(4, seed), TIMES) for seed in (0, 1)]
    pair = multilevel.begin(), multilevel.begin()
    turns = [[one.evaluate(noise(4, seed), at(t, 4)) for seed, one in enumerate(pair)] for t in TIMES]
    for seed, one in enumerate(pair):
        assert torch.equal(torch.stack([turn[seed] for turn in turns]), alone[seed])
        assert one.row == 5
        with pytest.raises(ValueError, match=r"^this trajectory has made all 5 evaluations; begin another$"):
            one.evaluate(noise(4), at(0.1, 4))


@of_diffusers
@pytest.mark.parametrize("options", ALL[:3], ids=str)
def test_a_diffusers_scheduler_takes_a_plan(float64: None, options: dict[str, Any]) -> None:
    """Its DDIM is ours on its own grid; rounding is that of its float32 coefficients."""
    family = closed_family()
    plan = Plan.draw(torch.tensor([[1.0, 0.5, 0.4]] * 8), seed=1, **options)
    common: dict[str, Any] = {"indices": range(4), "steps": 8, "plan": plan}
    theirs = sample(family, solver="diffusers:DDIMScheduler", **common)
    ours = sample(family, solver="ddim", grid="trailing", **common)
    torch.testing.assert_close(theirs.x, ours.x, rtol=0, atol=1e-3)
    assert [cost.calls for cost in theirs.ledger.levels.values()] == [4 * calls for calls in plan.calls.tolist()]
    alone = sample(family, solver="diffusers:DDIMScheduler", indices=range(4), steps=8)
    assert rms(theirs.x - alone.x) > 1e-2


@of_diffusers
@pytest.mark.parametrize("estimator", ["jump", "held"])
def test_a_specification_fits_a_diffusers_scheduler(estimator: str) -> None:
    spec = networks().plan(probabilities=(1.0, 0.5), estimator=estimator)
    sampler = Sampler(networks(), solver="diffusers:DDIMScheduler", steps=6, plan=spec)
    assert sampler.plan is not None
    assert sampler.plan.about["solver"] == "diffusers:DDIMScheduler"
    assert sampler.run([0]).ledger.levels["s"].calls == sampler.plan.calls[1]


@of_diffusers
def test_hindsight_is_refused_where_the_state_cannot_be_moved() -> None:
    plan = measured(8, [0, 4])
    with pytest.raises(ValueError, match=r"^hindsight needs an mlem solver .* not diffusers:.*; use estimator=held$"):
        sample(networks(), indices=[0], solver="diffusers:DDIMScheduler", steps=8, plan=plan)
    held = measured(8, [0, 4], estimator="held")
    with pytest.raises(
        ValueError, match=r"^the plan has 8 rows, but diffusers:DDIMScheduler in 4 steps evaluates 4 ti"
    ):
        sample(networks(), indices=[0], solver="diffusers:DDIMScheduler", steps=4, plan=held)
    multilevel = MultilevelDenoiser(denoisers(2), plan, schedule=COSINE)
    with pytest.raises(ValueError, match=r"^hindsight moves the state between calls, .*; use estimator=held$"):
        multilevel(noise(2), at(1.0, 2))


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        (
            Plan.draw(torch.ones(5, 2)),
            {},
            "the plan has 5 rows, but ddim in 4 steps evaluates 4 times; draw it for these steps, or pass family.plan(",
        ),
        (Plan.draw(torch.ones(4, 2)), {"solver": "heun"}, "the plan has 4 rows, but heun in 4 steps evaluates 7 times"),
        (
            Plan.draw(torch.ones(4, 3)),
            {},
            "the plan is for 3 levels, but the family has 2 (xs, s); draw it for these leve",
        ),
        (Plan.draw(torch.ones(4, 2), levels=("xs", "l")), {}, "level must be one of xs, s, got 'l'"),
        (
            Plan.draw(torch.ones(4, 2)),
            {"level": "xs"},
            "level='xs' runs one level, plan= several; pass only one of them",
        ),
    ],
    ids=["rows", "heun", "levels", "names", "level"],
)
def test_a_plan_that_does_not_fit_gets_one_line(plan: Plan, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        sample(networks(), **{"indices": [0], "steps": 4, "plan": plan} | options)


@pytest.mark.parametrize("model", [gaussian(COSINE), level("xs")], ids=["bare", "level"])
def test_a_plan_needs_a_family(model: Any) -> None:
    with pytest.raises(ValueError, match=r"^plan= chooses between the levels of a family, but the model is not a Fam"):
        sample(model, indices=[0], steps=4, plan=Plan.draw(torch.ones(4, 1)), schedule=COSINE, shape=(3,))


def test_bare_levels_need_a_schedule_and_own_coins_their_samples() -> None:
    plan = Plan.draw(TABLE, per_sample=True)
    with pytest.raises(ValueError, match=r"^bare denoisers do not know their schedule; pass schedule=$"):
        MultilevelDenoiser(denoisers(), plan)
    multilevel = MultilevelDenoiser(denoisers(), plan, schedule=COSINE)
    with pytest.raises(ValueError, match=r"call start\(indices\) before the first step$"):
        multilevel(noise(2), at(1.0, 2))
    with pytest.raises(ValueError, match=r"call start\(indices\) before the first step$"):
        multilevel.start()


def test_a_level_that_becomes_nan_is_named() -> None:
    """Not the levels that ran beside it."""
    from mlem.sampling import NonFiniteError

    broken = Family([level("xs"), level("s", seed=1)])
    with torch.no_grad():
        next(iter(broken.levels[1].network.parameters())).fill_(math.nan)
    plan = measured(4, [0])
    with pytest.raises(NonFiniteError, match=r"sample 0 became NaN .* at step 1 of 4 .*, level s; 2 of 2 samples"):
        sample(broken, indices=range(2), steps=4, plan=plan)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan.draw(torch.ones(4, 2), per_sample=True), "per_sample=True"),
        (PlanSpec(probabilities=(1.0, 0.5), estimator="jump", per_sample=True), "per_sample=True"),
        (Plan.given(torch.ones(4, 2)), "estimator=hindsight"),
    ],
    ids=["plan", "spec", "hindsight"],
)
def test_rows_that_belong_together_are_not_spread(plan: Plan | PlanSpec, says: str) -> None:
    says = f"spread=True splits the rows of a call among ranks, but {says} needs all; leave out spread"
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        Sampler(networks(), steps=4, plan=plan, spread=True)
    Sampler(networks(), steps=4, plan=plan)
    Sampler(networks(), steps=4, plan=Plan.given(torch.ones(4, 2), estimator="held"), spread=True)
