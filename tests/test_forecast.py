"""Forecasts: against loops written out by hand, exact on polynomials, what they cost, and mistakes."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from mlem import Plan, PlanSpec, Sampler
from mlem.multilevel.denoiser import MultilevelDenoiser
from mlem.solvers import EvaluationPoint, GridPoint, make_solver, model_input
from mlem.trajectory import starting_noise
from tests.hierarchy import at
from tests.waves import COSINE, family, predictor

pytestmark = pytest.mark.usefixtures("float64_module")

INDICES = range(8)
TIMES = (0.95, 0.9, 0.8, 0.65, 0.5, 0.3)


def by_hand(solver_name: str, steps: int, every: int, order: int) -> Tensor:
    """A loop that keeps the outputs of the largest level, and joins them by Lagrange's polynomial in -ln kappa."""
    solver, kept, number = make_solver(solver_name), list[tuple[float, Tensor]](), iter(range(10 * steps))
    points = GridPoint.of(COSINE, solver.grid(COSINE, steps))

    def estimate(y: Tensor, place: EvaluationPoint) -> Tensor:
        assert isinstance(place, GridPoint)
        now = -math.log(place.kappa)
        if next(number) % every == 0:
            kept.append((now, family().level().denoiser(*model_input(COSINE, y, place))))
            return kept[-1][1]
        nodes = kept[-(order + 1) :]
        total = torch.zeros_like(y)
        for i, (then, output) in enumerate(nodes):
            others = [other for j, (other, _) in enumerate(nodes) if j != i]
            total += output * math.prod((now - other) / (then - other) for other in others)
        return total

    index = torch.arange(len(INDICES))
    y = starting_noise(0, index, (3,)) / points[0].alpha
    return solver.integrate(estimate, y, points, None, index, 0) * points[-1].alpha


@pytest.mark.parametrize(("every", "order"), [(2, 0), (2, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("solver", ["ddim", "dpm_solver_pp"])
def test_it_is_the_loop_written_out(solver: str, every: int, order: int) -> None:
    plan = Plan.forecast([row % every == 0 for row in range(12)], "3", order=order)
    result = Sampler(family(), solver=solver, steps=12, plan=plan).run(INDICES)
    due = by_hand(solver, 12, every, order)
    torch.testing.assert_close(result.x, due, rtol=0 if order == 0 else 1e-12, atol=0 if order == 0 else 1e-12)
    calls = {name: cost.calls / len(INDICES) for name, cost in result.ledger.levels.items()}
    assert calls == {"3": 12 / every}
    assert plan.calls.tolist() == plan.expected_calls.tolist() == [12 / every]
    assert Plan.from_dict(plan.to_dict()).fingerprint() == plan.fingerprint()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_it_is_exact_on_polynomials_of_its_order_and_not_beyond(order: int) -> None:
    def outputs(degree: int, plan: Plan) -> tuple[Tensor, Tensor]:
        def level(x: Tensor, t: Tensor) -> Tensor:
            return (-COSINE.kappa(t).log())[:, None].expand_as(x) ** degree

        multilevel = MultilevelDenoiser([level], plan, schedule=COSINE)
        x = torch.zeros(2, 3)
        pairs = [(multilevel(x, at(t, 2)), level(x, at(t, 2))) for t in TIMES]
        return torch.stack([one for one, _ in pairs]), torch.stack([due for _, due in pairs])

    plan = Plan.forecast([True] * (order + 1) + [False] * (len(TIMES) - order - 1), "", order=order)
    torch.testing.assert_close(*outputs(order, plan), rtol=1e-9, atol=1e-9)
    found, due = outputs(order + 1, plan)
    assert (found - due)[order + 1 :].abs().min() > 1e-2


def test_a_solver_that_asks_twice_at_one_time_divides_by_nothing() -> None:
    rows = make_solver("heun").evaluations(GridPoint.of(COSINE, make_solver("heun").grid(COSINE, 6)))
    plan = Plan.forecast([row % 5 < 3 for row in range(rows)], "3", order=2)
    truth = Sampler(family(), solver="heun", steps=6, level="3").run(INDICES).x
    assert (Sampler(family(), solver="heun", steps=6, plan=plan).run(INDICES).x - truth).square().mean() < 1e-2


def test_nothing_is_predicted_of_it() -> None:
    with pytest.raises(ValueError, match="only a plan whose first level always runs can be predicted"):
        predictor("ddim", 4).error(Plan.forecast([True, False, True, False], "3"))


def test_mistakes_get_one_line() -> None:
    made_by = "a forecast has one level, which runs at the first evaluation; use Plan.forecast"
    for running, order, message in (
        ([False, True], 1, made_by),
        ([], 1, made_by),
        ([True, False], 3, "order of a forecast must be 0, 1 or 2, got 3"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            Plan.forecast(running, "3", order=order)
    with pytest.raises(ValueError, match=r"^estimator must be one of jump, held, hindsight, switch, got 'forecast'$"):
        PlanSpec(budget=0.5, estimator="forecast")
