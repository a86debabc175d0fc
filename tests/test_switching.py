"""Plans that switch: one level at each evaluation, which is what runs, what is predicted, and what is searched for."""

from __future__ import annotations

import itertools

import pytest
import torch

from mlem import Plan, Sampler, sample
from mlem.multilevel.spec import PlanSpec
from mlem.multilevel.switching import switches
from mlem.solvers import GridPoint, make_solver, model_input
from mlem.solvers.base import EvaluationPoint
from mlem.trajectory import starting_noise
from tests.waves import COSINE, family, measured_error, predictor

pytestmark = pytest.mark.usefixtures("float64_module")

INDICES = range(8)


def test_at_each_evaluation_the_level_runs_that_is_named() -> None:
    """Against a loop that asks one level by itself at each step."""
    running, names = [0, 2, 2, 1, 0, 1], family().names
    solver, rows = make_solver("dpm_solver_pp"), iter(running)
    points = GridPoint.of(COSINE, solver.grid(COSINE, len(running)))

    def estimate(y: torch.Tensor, place: EvaluationPoint) -> torch.Tensor:
        return family().levels[next(rows)].denoiser(*model_input(COSINE, y, place))

    index = torch.arange(len(INDICES))
    y = starting_noise(0, index, (3,)) / points[0].alpha
    due = solver.integrate(estimate, y, points, None, index, 0) * points[-1].alpha
    plan = Plan.switching(running, names)
    sampler = Sampler(family(), solver="dpm_solver_pp", steps=len(running), plan=plan)
    result = sampler.run(INDICES)
    torch.testing.assert_close(result.x, due)
    calls = {name: cost.calls / len(INDICES) for name, cost in result.ledger.levels.items()}
    assert calls == {"1": 2, "2": 2, "3": 2}
    assert plan.calls.tolist() == plan.expected_calls.tolist() == [2, 2, 2]
    assert Plan.from_dict(plan.to_dict()).fingerprint() == plan.fingerprint()


@pytest.mark.parametrize(("solver", "rel"), [("ddim", 0.4), ("ddpm", 0.4)])
def test_its_error_is_predicted(solver: str, rel: float) -> None:
    by = predictor(solver, 24)
    plan = Plan.switching([1] * 10 + [2] * 8 + [1] * 6, family().names)
    assert by.response_error(plan) == pytest.approx(measured_error([plan], by), rel=rel)


@pytest.mark.parametrize("budget", [2.0, 3.5])
def test_the_search_comes_close_to_the_best_of_all(budget: float) -> None:
    """All 2,187 sequences of three levels in seven steps; better than any two windows, or as good."""
    by, costs = predictor("ddim", 7), family().fitted.calibration_for(family()).costs("seconds", 8)
    found = switches(by, [tuple(family().names)], costs, budget)
    assert found is not None
    index = [family().names.index(name) for name in found.levels]
    assert found.cost(costs[index]) <= budget
    plans = [Plan.switching(running, family().names) for running in itertools.product(range(3), repeat=7)]
    least = min(by.response_error(plan) for plan in plans if plan.cost(costs) <= budget)
    assert by.response_error(found) <= 1.1 * least


def test_it_is_asked_for_as_other_plans_are() -> None:
    spec = family().plan(budget=0.3, estimator="switch", cost="flops")
    sampler = Sampler(family(), solver="ddim", steps=12, plan=spec)
    assert sampler.plan is not None
    assert sampler.plan.about["cost"] <= 0.3 * 12
    assert sampler.plan.about["predicted_mse"] > 0
    truth = sample(family(), solver="ddim", steps=12, indices=INDICES).x
    error = (sampler.run(INDICES).x - truth).square().mean().item()
    assert 0 < error < 4 * sampler.plan.about["predicted_mse_of_plan"]
    assert switches(predictor("ddim", 7), [("1", "2", "3")], torch.tensor([0.5, 0.7, 1.0]), 2.9) is None


def test_mistakes_get_one_line() -> None:
    with pytest.raises(ValueError, match=r"^estimator=switch tosses no coins: leave out coins= and probabilities="):
        PlanSpec(budget=0.5, estimator="switch", coins="systematic")
    with pytest.raises(ValueError, match=r"^a switching plan runs one level at each evaluation"):
        Plan.draw(torch.ones(4, 2), estimator="switch", per_sample=True)
    with pytest.raises(
        ValueError, match=r"evaluations of the largest level.*: no plan is that cheap; raise it, or use f"
    ):
        Sampler(family(), solver="ddim", steps=12, plan=family().plan(budget=1e-3, estimator="switch", cost="flops"))
    assert switches(predictor("ddim", 7), [], torch.tensor([0.5, 0.7, 1.0]), 1.0) is None
