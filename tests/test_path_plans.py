"""Calibration, pilots, plans, coins and learning under EDM and flows, guided: the same code, other paths."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mlem.family import Family
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.learning import Objective, frozen
from mlem.multilevel.pilot import pilot
from mlem.sampling import sample
from mlem.solvers import make_solver
from tests.labelled import labelled_family, labels


@pytest.fixture(scope="module", params=["edm", "flow"])
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    """Labelled Gaussians under guidance, calibrated, with pilots."""
    torch.set_default_dtype(torch.float64)
    made = labelled_family((1.2, 1.0), request.param).guided(1.5)
    found = calibrate(made, images=6, times=8, batch_sizes=[8])
    made.fitted = Fitted(pilot(made, found, images=3, reference_steps=64))
    yield made
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm_solver_pp"])
def test_hindsight_is_near_the_largest_level_at_less_cost(family: Family, solver: str) -> None:
    """And far nearer than the small level alone."""
    options = {"indices": range(12), "solver": solver, "steps": 24, "grid": "log_snr", "conditions": labels([2, 0, 1])}
    plan = family.plan(budget=0.7, cost="flops", estimator="hindsight")
    top, small = (sample(family, **options, level=name).x for name in ("2", "1"))  # type: ignore[arg-type]
    found = sample(family, **options, plan=plan)  # type: ignore[arg-type]
    assert found.ledger.levels["2"].calls < 0.8 * 2 * 12 * 24
    assert (found.x - top).square().mean() < 0.1 * (small - top).square().mean()


def test_coins_of_each_sample_are_the_same_in_any_batch(family: Family) -> None:
    plan = family.plan(budget=0.7, cost="flops", estimator="jump", coins="bernoulli", per_sample=True)
    whole, apart = (
        sample(family, indices=range(12), solver="ddpm", steps=16, plan=plan, batch_size=size).x for size in (12, 5)
    )
    assert whole.isfinite().all()
    assert (whole - apart).abs().max() < 1e-6


def test_learning_differentiates_from_where_sampling_begins(family: Family) -> None:
    """Forward mode, through the weights of the coins, against differences."""
    solver, index, told = make_solver("ddim"), torch.arange(5), labels([2, 0, 1])
    grid, costs = solver.grid(family.schedule, 6), torch.tensor([0.25, 1.0])
    levels, shape = frozen(family), family.shape
    problem = Objective(levels, family.schedule, shape, solver, grid, costs, conditions=lambda i: [told(i)] * 2)
    truth = problem.reference(index)
    plain = sample(family, solver="ddim", grid=grid, indices=range(5), conditions=told).x
    assert (truth - plain).abs().max() < 1e-6
    theta = torch.tensor([[0.3], [-0.4]], dtype=torch.float64)
    counts = problem.draw(theta, 0, 3).counts

    def errors(theta: torch.Tensor) -> torch.Tensor:
        weights = problem.weights(counts, problem.probabilities(theta))
        return problem.errors(weights, counts, index.expand(3, -1), truth.expand(3, -1, -1)).mean(1)

    mse, slopes = problem.differentiate(theta, counts, index, truth, None)
    torch.testing.assert_close(mse, errors(theta), rtol=1e-6, atol=0)
    for which in range(2):
        step = torch.zeros_like(theta)
        step[which] = 1e-3
        by_difference = (errors(theta + step) - errors(theta - step)) / 2e-3
        torch.testing.assert_close(slopes[:, which, 0], by_difference, rtol=1e-3, atol=1e-6)
