"""Plan specifications: what they refuse, what they make plans of; and what is stored with a family."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.calibration import Calibration, LinearResponse
from mlem.multilevel.coefficients import CERTAIN, Coefficients
from mlem.multilevel.coins import COINS
from mlem.multilevel.estimators import ESTIMATORS
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.memorise import memorise
from mlem.multilevel.pilot import pilot
from mlem.multilevel.plan import Plan
from mlem.multilevel.planner import make_plan
from mlem.multilevel.spec import PlanSpec
from mlem.sampling import Sampler, sample
from mlem.schedule import NoiseSchedule
from mlem.solvers import make_solver
from tests.commands import environment
from tests.problems import closed_family, level

COSINE = NoiseSchedule.cosine()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5, "mse": 0.1}, "give only one of budget, mse and delta, got budget and mse"),
        ({"budget": 0.5, "delta": 0.1}, "give only one of budget, mse and delta, got budget and delta"),
        ({"budget": 0.0}, "budget must be in (0, 1], a share of the largest level's cost, got 0.0"),
        ({"budget": 1.5}, "budget must be in (0, 1], a share of the largest level's cost, got 1.5"),
        ({"mse": 0.0}, "mse must be positive, got 0.0"),
        ({"mse": math.nan}, "mse must be positive, got nan"),
        ({"mse": math.inf}, "mse must be positive, got inf"),
        ({"budget": "half"}, "budget must be a number, got 'half'"),
        ({"mse": True}, "mse must be a number, got True"),
        ({"delta": math.nan, "probabilities": "learned"}, "delta must be finite, got nan"),
        ({"probabilities": 0.5}, "probabilities must be one number per level, got 0.5"),
        ({"probabilities": (1.0, "s")}, "probabilities must be in (0, 1], got 1.0, s"),
        (
            {"budget": 0.5, "per_sample": True},
            "per_sample must be true or false, and true only with estimator=jump, got True with hind",
        ),
        (
            {"budget": 0.5, "estimator": "jump", "per_sample": "maybe"},
            "per_sample must be true or false, and true only with estimator=jump, got 'm",
        ),
        ({"budget": 0.5, "levels": ()}, "levels must be a list of names, as in levels=[xs,s], got ()"),
        ({"budget": 0.5, "levels": "xs"}, "levels must be a list of names, as in levels=[xs,s], got 'xs'"),
        ({"budget": 0.5, "cost": "euros"}, "cost must be seconds or flops, got 'euros'"),
        ({"budget": 0.5, "probabilities": "theory", "gamma": 0.0}, "gamma must be positive, got 0.0"),
        ({"budget": 0.5, "batch_size": 0}, "batch_size must be positive, got 0"),
        ({"probabilities": "guess"}, "probabilities must be calibrated, learned, theory or numbers, got 'guess'"),
        ({"budget": 0.5, "coins": "fair"}, "coins must be one of systematic, bernoulli, nested, poisson, got 'fair'"),
        ({"budget": 0.5, "estimator": "guess"}, "estimator must be one of jump, held, hindsight, switch, got 'guess'"),
        ({}, "calibrated probabilities need budget= or mse=, such as budget=0.25"),
        ({"probabilities": "theory"}, "theory probabilities need budget= or mse=, such as budget=0.25"),
        (
            {"budget": 0.5, "estimator": "hindsigt"},
            "estimator must be one of jump, held, hindsight, switch, got 'hindsigt'; d",
        ),
        ({"budget": 0.5, "order": 2}, "order of a held correction must be 0 or 1, got 2"),
        ({"budget": 0.5, "seed": "1"}, "seed must be a whole number, got '1'"),
        ({"budget": 0.5, "batch_size": "8"}, "batch_size must be a number, got '8'"),
        ({"delta": 0.5, "probabilities": (1.0, 0.5)}, "delta shifts learned coefficients; add probabilities=learned"),
    ],
    ids=str,
)
def test_bad_specifications_get_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*$"):
        PlanSpec(**options)


def test_a_misspelt_option_names_its_nearest() -> None:
    with pytest.raises(TypeError, match=r"^family\.plan\(\) has no argument 'bugdet'; did you mean budget\?$"):
        pair().plan(bugdet=0.5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"^entry: bugdet: there is no such option; did you mean budget\?$"):
        PlanSpec.from_options({"bugdet": 0.5}, "entry: ")


def test_options_may_come_from_a_config() -> None:
    """None is left out, lists stand for tuples, and errors begin with the place."""
    options = {"budget": None, "probabilities": [1.0, 0.5], "levels": ["xs", "s"], "coins": None}
    assert PlanSpec.from_options(options) == PlanSpec(probabilities=(1.0, 0.5), levels=("xs", "s"))
    assert hash(PlanSpec.from_options(options)) == hash(PlanSpec(probabilities=[1.0, 0.5], levels=["xs", "s"]))
    with pytest.raises(ValueError, match=r"^entry: budget must be in \(0, 1\], "):
        PlanSpec.from_options({"budget": 2}, "entry: ")


def test_options_describe_themselves() -> None:
    for one in fields(PlanSpec):
        assert one.metadata["help"]
        assert one.metadata["value"]
        assert f"\n    {one.name}: " in str(inspect.getdoc(PlanSpec))
    choices = {one.name: one.metadata["choices"] for one in fields(PlanSpec)}
    assert choices["coins"] == tuple(COINS)
    assert choices["estimator"] == tuple(name for name in ESTIMATORS if name != "forecast")  # made by hand alone


def test_specifications_need_no_torch() -> None:
    code = "import sys; from mlem import PlanSpec; PlanSpec(budget=0.5); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


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
    ],
    ids=str,
)
def test_specifications_say_what_the_family_lacks(options: dict[str, Any], message: str) -> None:
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
    spec = family.plan(probabilities="theory", gamma=3.0, budget=budget, estimator="jump", coins=coins)
    plan = make_plan(spec, family, solver := make_solver("ddim"), solver.grid(COSINE, 20))
    costs = torch.tensor([one.flops / family.levels[-1].flops for one in family.levels], dtype=torch.float64)
    assert plan.expected_cost(costs) <= 20 * budget
    assert plan.expected_cost(costs) == pytest.approx(20 * budget, rel=1e-6)
    scaled = plan.probabilities[0, 1:]
    assert (scaled[1] / scaled[0]).item() == pytest.approx((costs[2] / costs[1]).item() ** -(0.5 + 1 / 3), rel=1e-9)


def test_budgets_of_a_family_that_was_not_timed_are_in_flops() -> None:
    """And the plan says so, although cost is seconds by default."""
    family = pair()
    plan = Sampler(family, steps=6, plan=family.plan(probabilities=(1.0, 0.5), estimator="jump")).plan
    assert plan is not None
    assert plan.about["cost_unit"] == "flops"
    family.fitted = Fitted(calibration(family))
    plan = Sampler(family, steps=6, plan=family.plan(probabilities=(1.0, 0.5), estimator="jump")).plan
    assert plan is not None
    assert plan.about["cost_unit"] == "seconds"


def test_learned_coefficients_are_of_their_own_levels() -> None:
    """As many numbers as levels are not enough."""
    family = closed_family()
    smaller = tuple(family.names[:2])
    learned = Coefficients(torch.zeros(2), torch.tensor([CERTAIN, 0.0]), smaller)
    family.fitted = Fitted(coefficients=learned)
    solver = make_solver("ddim")
    grid = solver.grid(COSINE, 4)
    assert make_plan(family.plan(probabilities="learned", levels=smaller), family, solver, grid).levels == smaller
    others = (family.names[0], family.names[2])
    with pytest.raises(ValueError, match=f"^learned coefficients are for {', '.join(smaller)}, got levels="):
        make_plan(family.plan(probabilities="learned", levels=others), family, solver, grid)


def test_learned_coefficients_of_smaller_levels_say_nothing_of_budgets() -> None:
    """They were learned without the largest level: that is no budget which was too small, and warned of."""
    family = closed_family()
    learned = Coefficients(torch.zeros(2), torch.tensor([CERTAIN, 0.0]), tuple(family.names[:2]))
    family.fitted = Fitted(coefficients=learned)
    plan = Sampler(family, solver="ddim", steps=4, plan=family.plan(probabilities="learned", estimator="jump")).plan
    assert plan is not None
    assert plan.levels == tuple(family.names[:2])


def test_memorising_needs_coins() -> None:
    with pytest.raises(ValueError, match=r"^this spec tosses no coins, so all its draws are equal; add coins="):
        memorise(pair(), PlanSpec(budget=0.5))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"images": 0}, "images must be >= 1, got 0; the best is chosen by its error on them"),
        ({"images": -1}, "images must be >= 1, got -1; the best is chosen by its error on them"),
        ({"reference_steps": 0}, "reference_steps must be a whole number >= 1, got 0"),
        ({"solver": "heun"}, "hindsight needs an mlem solver with one evaluation per step, not heun; use estimator="),
        (
            {"solver": "parallel_midpoint"},
            "parallel_midpoint evaluates many times at once, but a plan once per row; leave out plan=",
        ),
    ],
    ids=str,
)
def test_bad_choices_are_refused_before_any_plan_is_tried(
    options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[memorise.__module__], "plan_samples", None)
    spec = PlanSpec(coins="systematic", probabilities=(1.0, 0.5))
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        memorise(pair(), spec, **{"steps": 4} | options)


def test_pilots_need_reference_steps() -> None:
    with pytest.raises(ValueError, match=r"^reference_steps must be a whole number >= 1, got 0$"):
        pilot(pair(), calibration(pair()), reference_steps=0)


@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".x"])
def test_a_plan_is_stored_nowhere_else(name: str, tmp_path: Path) -> None:
    family = pair()
    plan = Plan.draw(torch.tensor([[1.0, 0.5]] * 4))
    family.fitted = Fitted(calibration(family), plans={name: plan})
    with pytest.raises(ValueError, match=rf"^name of a plan must be letters, digits, .*, got '{name}'$"):
        family.save_fitted(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"images": 1}, "images of a calibration must be >= 2, got 1"),
        ({"times": 2}, "times of a calibration must be >= 3, got 2"),
        ({"batch_sizes": ()}, "batch sizes of a calibration must be one or more numbers >= 1, got []"),
        ({"batch_sizes": (8, 0)}, "batch sizes of a calibration must be one or more numbers >= 1, got [8, 0]"),
    ],
    ids=str,
)
def test_calibrations_too_small_to_say_anything_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        calibrate(pair(), **options)


def test_plans_are_found_by_name(tmp_path: Path) -> None:
    family = pair()
    with pytest.raises(ValueError, match=r"^plan=best: there are none; memorise one with: "):
        family.fitted.plan_for(family, "best")
    plan = Plan.draw(torch.tensor([[1.0, 0.5]] * 4), levels=("xs", "s"))
    family.fitted = Fitted().with_plan("best", plan).with_plan("cheap", plan)
    assert family.fitted.plan_for(family, "best").to_dict() == plan.to_dict()
    with pytest.raises(ValueError, match=r"^plan=other: there are best, cheap; memorise one with: "):
        family.fitted.plan_for(family, "other")
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "best.json").write_text('{"format": 1}')
    family.fitted = Fitted.load(tmp_path)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/plans/best\.json is damaged \(no 'counts'\); draw it again: "):
        family.fitted.plan_for(family, "best")
    family.fitted = Fitted(plans={"best": replace(plan, about={"weights": "others"})})
    with pytest.raises(
        ValueError,
        match=r"^plan=best was memorised for other weights or guidance: python -m mlem\.multilevel mem",
    ):
        family.fitted.plan_for(family, "best")


# --- what is stored with a family ----------------------------------------------------------------------------------


def calibration(family: Family) -> Calibration:
    """Made up, but of these weights."""
    one = LinearResponse(torch.eye(4).view(1, 4, 1, 4).double(), torch.ones(1, 4).double(), torch.zeros(1).double())
    differences = torch.tensor([[0.0, 0.1], [0.1, 0.0]], dtype=torch.float64).repeat(4, 1, 1)
    log_snr = torch.linspace(COSINE.log_snr(1.0).item(), COSINE.log_snr(0.01).item(), 4, dtype=torch.float64)
    errors = {"ddim/log_snr": {4: 0.1, 8: 0.025}}
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
    family.fitted = Fitted(own, learned, {"best": plan})
    family.save(tmp_path)
    again = Family.load(tmp_path)
    assert again.weights_hash == family.weights_hash
    read = again.fitted.calibration_for(again)
    assert read.to_dict() == own.to_dict()
    assert read.responses["ode"].inner.dtype == torch.float64
    assert read.costs("seconds", 50).tolist() == [0.25, 1.0]
    assert read.costs("seconds", 2).tolist() == [0.6, 1.0]
    assert read.costs("flops").tolist() == [0.25, 1.0]
    with pytest.raises(ValueError, match=r"^cost must be seconds or flops, got 'euros'$"):
        read.costs("euros")
    assert again.fitted.coefficients_for(again).to_dict() == learned.to_dict()
    assert again.fitted.plan_for(again, "best").to_dict() == plan.to_dict()
    # and it is used: no error, no measurement
    made = Sampler(again, steps=4, plan=again.plan(budget=0.6)).plan
    assert made is not None
    assert made.cost(read.costs()) <= 0.6 * 4
    assert made.about["predicted_mse"] >= 0.1


def test_a_family_without_fits_stores_none(tmp_path: Path) -> None:
    pair().save(tmp_path)
    assert not (tmp_path / "calibration.json").exists()
    fitted = Family.load(tmp_path).fitted
    assert (fitted.calibration, fitted.coefficients, fitted.plans, fitted.damaged) == (None, None, {}, {})
    assert not fitted.has("calibration")
    assert not fitted.has("coefficients")


def test_what_was_fitted_to_other_weights_is_refused() -> None:
    family = pair()
    learned = Coefficients(torch.zeros(2), torch.zeros(2), about={"weights": family.weights_hash})
    assert pair().weights_hash == family.weights_hash
    other = pair()
    with torch.no_grad():
        next(iter(other.levels[0].network.parameters())).view(-1)[0] += 1e-3
    assert other.weights_hash != family.weights_hash
    other.fitted = Fitted(calibration(family), learned)
    with pytest.raises(
        ValueError,
        match=r"^the calibration is for other weights or guidance: python -m mlem\.multilevel calibrate",
    ):
        sample(other, indices=[0], steps=4, plan=other.plan(budget=0.5))
    with pytest.raises(ValueError, match=r"^the coefficients are for other weights or guidance; fit them again: "):
        other.fitted.coefficients_for(other)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 0}', '{"format": 1}', '{"format": 1, "names": 3}'])
def test_damaged_files_are_no_error_until_they_are_asked_for(text: str, tmp_path: Path) -> None:
    """A family can be sampled plainly whatever became of its calibration; new fits take the place of damaged ones."""
    family = pair()
    family.save(tmp_path)
    for name in ("calibration", "coefficients"):
        (tmp_path / f"{name}.json").write_text(text)
    again = Family.load(tmp_path)
    assert again.fitted.has("calibration")
    assert again.fitted.has("coefficients")
    plain = sample(again, indices=range(2), steps=2)
    assert torch.equal(plain.x, sample(family, indices=range(2), steps=2).x)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/calibration\.json "):
        sample(again, indices=[0], steps=4, plan=again.plan(budget=0.5))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/coefficients\.json "):
        again.fitted.coefficients_for(again)
    again.save_fitted(tmp_path)
    assert (tmp_path / "calibration.json").read_text() == text
    again.fitted = replace(again.fitted, calibration=calibration(family))
    assert again.fitted.calibration_for(again).to_dict() == calibration(family).to_dict()


def used(plan: Plan, **options: Any) -> Plan | None:
    """The plan as a sampler of `pair()` takes it."""
    return Sampler(pair(), **{"solver": "ddim", "steps": 6, "plan": plan} | options).plan


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"solver": "ddpm"},
            "^the plan was made for the solver ddim, but is used with ddpm in 6 steps on the uniform grid; ",
        ),
        (
            {"grid": "karras"},
            "^the plan was made for the grid log_snr, but is used with ddim in 6 steps on the karras grid; ",
        ),
        (
            {"grid": TimeGrid("log_snr", (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.0))},
            "^the plan was made for other times of the grid",
        ),
    ],
)
def test_a_plan_is_refused_for_what_it_was_not_made_for(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    """As many rows are not enough; a file knows it too. What a user made by hand says nothing, and runs."""
    plan = Sampler(pair(), steps=6, plan=PlanSpec(probabilities=(1.0, 0.5), estimator="jump")).plan
    assert plan is not None
    plan.save(tmp_path / "plan.json")
    for one in (plan, Plan.load(tmp_path / "plan.json")):
        assert used(one) is one
        with pytest.raises(ValueError, match=says):
            used(one, **options)
    by_hand = Plan.draw(plan.probabilities, seed=plan.seed, estimator="jump", levels=plan.levels)
    assert by_hand.fingerprint() == plan.fingerprint()
    assert used(by_hand, **options) is by_hand


def test_a_plan_knows_options_schedule_and_weights() -> None:
    spec = PlanSpec(probabilities=(1.0, 0.5), estimator="jump")
    plan = Sampler(pair(), solver="randomized_midpoint", steps=3, plan=spec).plan
    assert plan is not None
    with pytest.raises(ValueError, match=r"^the plan was made for other options of the solver, but is used with rand"):
        used(plan, solver=make_solver("randomized_midpoint", midpoints="shared"), steps=3)
    for part, said in (("schedule", "another noise schedule"), ("weights", "other weights or guidance")):
        other = replace(plan, about=plan.about | {part: "0"})
        with pytest.raises(ValueError, match=f"^the plan was made for {said}, "):
            used(other, solver="randomized_midpoint", steps=3)


def test_coefficients_of_another_solver_are_said() -> None:
    family = pair()
    learned = Coefficients(torch.zeros(2), torch.tensor([CERTAIN, 0.0]), (), {"solver": "ddpm", "grid": "uniform"})
    family.fitted = Fitted(coefficients=learned)
    spec = family.plan(probabilities="learned", estimator="jump")
    with pytest.warns(
        UserWarning, match="^the coefficients were learned for ddpm on the uniform grid, but are used with"
    ):
        Sampler(family, solver="ddim", steps=4, plan=spec)
    Sampler(family, solver="ddpm", steps=4, plan=spec)


def test_a_calibration_of_another_schedule_is_refused() -> None:
    family = pair()
    found = calibration(family)
    family.fitted = Fitted(replace(found, about=found.about | {"schedule": "0"}))
    with pytest.raises(
        ValueError, match=r"^the calibration is for another noise schedule: python -m mlem\.multilevel cal"
    ):
        Sampler(family, steps=4, plan=family.plan(budget=0.6))
