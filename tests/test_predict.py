"""What is predicted from a calibration: against closed forms, and against what happens."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlem.denoiser import gaussian_denoiser
from mlem.grids import TimeGrid
from mlem.multilevel.calibrate import measure
from mlem.multilevel.calibration import Calibration
from mlem.multilevel.coins import COINS
from mlem.multilevel.denoiser import MultilevelDenoiser
from mlem.multilevel.estimators import ESTIMATORS
from mlem.multilevel.plan import Plan
from mlem.multilevel.predict import Predictor
from mlem.multilevel.report import missing
from mlem.noise import reserved_indices
from mlem.solvers import GridPoint, make_solver, quadrature_weights
from mlem.trajectory import samples
from tests.waves import COSINE, every, family, measured_error, plan, predictor

pytestmark = pytest.mark.usefixtures("float64_module")


# --- what each row adds --------------------------------------------------------------------------------------------


def points_of(*times: float) -> tuple[list[GridPoint], list[float]]:
    points = GridPoint.of(COSINE, TimeGrid("custom", times))
    return points, [point.kappa for point in points]


def test_the_response_of_single_steps_by_hand() -> None:
    points, k = points_of(0.9, 0.6, 0.3, 0.0)
    for name, expected in (
        ("ddim", [b - a for a, b in itertools.pairwise(k)]),
        ("euler_maruyama", [2 * (b - a) for a, b in itertools.pairwise(k)]),
        ("ddpm", [(b * b - a * a) / a for a, b in itertools.pairwise(k)]),
    ):
        coefficients, rows = quadrature_weights(make_solver(name), COSINE, points)
        assert rows == points[:-1]
        assert coefficients.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_response_of_heun_by_hand() -> None:
    """Half a step each, at both of its ends; the last step is Euler's."""
    points, (a, b, c, _) = points_of(0.9, 0.6, 0.3, 0.0)
    coefficients, rows = quadrature_weights(make_solver("heun"), COSINE, points)
    assert rows == [points[i] for i in (0, 1, 1, 2, 2)]
    assert coefficients.tolist() == pytest.approx([(b - a) / 2, (b - a) / 2, (c - b) / 2, (c - b) / 2, -c], rel=1e-12)


def test_the_response_of_dpm_solver_by_hand() -> None:
    """2M in three steps, unrolled for one noise estimate at a time: a data estimate is `y - kappa eps`."""
    points, k = points_of(0.9, 0.6, 0.3, 0.0)
    h = [math.log(k[i] / k[i + 1]) for i in range(2)]
    expected = []
    for row in range(3):
        eps = [float(row == i) for i in range(3)]
        first = -k[0] * eps[0]
        y = (1 - k[1] / k[0]) * first
        second = y - k[1] * eps[1]
        y = k[2] / k[1] * y + (1 - k[2] / k[1]) * (second + h[1] / (2 * h[0]) * (second - first))
        expected.append(y - k[2] * eps[2])
    coefficients, rows = quadrature_weights(make_solver("dpm_solver_pp"), COSINE, points)
    assert rows == points[:-1]
    assert coefficients.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm_solver_pp", "heun"])
def test_the_weight_of_a_row_is_what_it_does_to_a_sample(solver: str) -> None:
    """A constant in v at one row alone, for round Gaussian data. Single steps: to the calibration's grid.

    What two evaluations or a memory do to one another is left out: to 12 percent in 40 steps.
    """
    top = gaussian_denoiser(COSINE, torch.zeros(3), 0.25 * torch.eye(3))

    def below(x: Tensor, t: Tensor) -> Tensor:
        return top(x, t) + COSINE.alpha(t)[:, None] * 0.1

    measured = measure([below, top], COSINE, (3,), reserved_indices("calibration", 2), times=24)
    found = Calibration(("1", "2"), (1.0, 2.0), {64: (1.0, 2.0)}, *measured, {})
    method = make_solver(solver)
    grid = method.grid(COSINE, 40)
    scale = Predictor(found, COSINE, method, grid).scale[0]
    rows, calls = len(scale), itertools.count()

    def eps(x: Tensor, t: Tensor) -> Tensor:
        """Sample j is moved at row j, the last one never."""
        return top(x, t) + COSINE.alpha(t)[:, None] * (torch.arange(rows + 1) == next(calls))[:, None]

    index = reserved_indices("pilots", 1).expand(rows + 1)
    ends = samples(eps, method, GridPoint.of(COSINE, grid), (3,), index, 0)[:, 0]
    moved = ends[:-1] - ends[-1]
    assert (moved - scale).abs().sum() < 0.12 * moved.abs().sum()
    if solver in ("ddim", "ddpm"):
        assert (moved / scale - 1).abs().max() < 0.03


# --- what a plan says in the place of corrections ------------------------------------------------------------------

HELD: list[dict[str, Any]] = [
    {"estimator": estimator, "order": order, "correlation_length": length}
    for estimator in ("held", "hindsight")
    for order in (0, 1)
    for length in (None, 0.7)
]


@pytest.mark.parametrize("how", HELD, ids=str)
@pytest.mark.parametrize("rows", [(0, 3, 4, 7, 10), (0, 1, 2, 8), (0,), (3, 5, 9), (1, 2), (6,), range(12)], ids=str)
def test_held_deviations_are_what_the_denoiser_says(how: dict[str, Any], rows: Any) -> None:
    """The denoiser itself on twelve samples, of which sample j has a correction of 1 in v at row j and 0 elsewhere.

    The response is chosen such that a row counts `scale`, hindsight's shrinkage undone.
    """
    points = GridPoint.of(COSINE, TimeGrid.make("log_snr", COSINE, 12))[:-1]
    times, scale = torch.tensor([-math.log(point.kappa) for point in points]), torch.linspace(-1.0, 2.0, 12) ** 3
    place = {point.t: row for row, point in enumerate(points)}

    def above(x: Tensor, t: Tensor) -> Tensor:
        return COSINE.alpha(t)[:, None] * torch.eye(12)[place[t[0].item()]][:, None]

    table = torch.zeros(12, 2, dtype=torch.bool)
    table[list(rows), 1] = True
    one = Plan.given(table, **how)
    denoiser = MultilevelDenoiser([lambda x, t: torch.zeros_like(x), above], one, schedule=COSINE)
    weights = [s * point.kappa / point.alpha for s, point in zip(scale.tolist(), points, strict=True)]
    denoiser.start(torch.arange(12), weights)
    total, y = -scale, torch.zeros(12, 1)
    for row, here in enumerate(points):
        move = denoiser.revise(y, here)[:, 0]
        said = denoiser(y, torch.full((12,), here.t))[:, 0] - here.alpha * here.sigma * move  # v stays, eps does not
        total += move / here.kappa + scale[row] * said / here.alpha
    said = ESTIMATORS[one.estimator].deviations(table[None, :, 1].numpy(), scale.numpy(), times.numpy(), one.holding)[0]
    torch.testing.assert_close(torch.from_numpy(said), total, rtol=0, atol=1e-10)
    assert bool(said.any()) is (len(rows) < 12)


def test_jump_plans_are_predicted_by_their_counts_over_probabilities() -> None:
    by, p = predictor(steps=6), torch.tensor([[1.0, 0.5, 0.25]] * 6)
    one = Plan.draw(p, "systematic", 3)
    assert one.counts is not None
    deviations = (by.scale.T * (one.counts / p - 1)[:, 1:]).T
    assert by.response_error(one) == pytest.approx(by.energy(deviations).item(), rel=1e-12)
    # independent coins, on average: the sum of their variances
    squares = torch.einsum("kr,krkr->kr", by.scale**2, whole_covariance(by).view(*by.scale.shape, *by.scale.shape)).T
    expected = ((1 / p - 1)[:, 1:] * squares).sum().item()
    assert by.response_error(Plan.draw(p, "bernoulli", 3)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("coins", COINS)
def test_own_coins_are_predicted_on_average(coins: str) -> None:
    """The quadratic form over 20,000 samples, each with coins of its own; systematic ones are predicted from 256."""
    by, p = predictor(steps=6), torch.tensor([[1.0, 0.6, 0.3]] * 5 + [[1.0, 1.0, 0.5]])
    counts = COINS[coins].toss(p, 1, torch.arange(20_000))
    errors = by.energy((by.scale.T * (counts / p - 1)[:, :, 1:]).transpose(1, 2))
    said = by.response_error(Plan.draw(p, coins, 3, per_sample=True))
    chance = errors.std().item() / math.sqrt(256 if coins == "systematic" else 20_000)
    assert said == pytest.approx(errors.mean().item(), abs=4 * chance)
    if coins != "systematic":
        assert by.response_error(Plan.draw(p, coins, 3)) == by.choice(Plan.draw(p, coins, 3)) == said


def test_a_plan_whose_first_level_may_not_run_is_not_predicted() -> None:
    by = predictor(steps=6)
    for coins in COINS:
        with pytest.raises(
            ValueError, match=r"^only a plan whose first level always runs can be predicted; give it pr"
        ):
            by.error(Plan.draw(torch.full((6, 3), 0.5), coins))


def whole_covariance(by: Predictor) -> Tensor:
    """Written out: (C R, C R)."""
    corrections, rows = by.scale.shape
    block = by.covariance.block(np.arange(corrections), np.arange(rows))
    return torch.from_numpy(block).reshape(corrections * rows, -1)


def test_the_energy_is_the_mean_square_of_the_sum() -> None:
    """Monte Carlo: 200,000 Gaussian q of that covariance, in standard errors."""
    by = predictor("ddpm", 16)
    size = by.scale.numel()
    values, axes = torch.linalg.eigh(whole_covariance(by))
    assert values.min() > -1e-10 * values.max()
    draws = torch.randn(200_000, size, generator=torch.Generator().manual_seed(0))
    q = draws @ (axes * values.clamp(min=0).sqrt()).T
    squares = torch.stack([(q @ d.flatten()).square() for d in (by.scale, -by.scale * torch.tensor([[1.0], [0.3]]))])
    expected = by.energy(torch.stack([by.scale, -by.scale * torch.tensor([[1.0], [0.3]])]))
    errors = (squares.mean(1) - expected) / (squares.std(1) / math.sqrt(squares.shape[1]))
    assert errors.abs().max() < 4


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm_solver_pp", "heun", "euler_maruyama"])
@pytest.mark.parametrize("grid", ["uniform", "log_snr"])
def test_the_covariance_is_one_on_any_grid(solver: str, grid: str) -> None:
    """Symmetric, no eigenvalue below 0 beyond rounding, also with several rows between two of the calibrated times."""
    by = predictor(solver, 40, grid)
    matrix = whole_covariance(by)
    torch.testing.assert_close(matrix, matrix.T)
    values = torch.linalg.eigvalsh(matrix)
    assert values.min() > -1e-10 * values.max()


def test_certain_plans_are_predicted_to_be_exact() -> None:
    by, ones = predictor(steps=8), torch.ones(8, 3)
    for coins in ("systematic", "bernoulli", "nested", "poisson"):
        assert by.error(Plan.draw(ones, coins)) == 0
    for options in HELD:
        assert by.error(Plan.given(ones, **options)) == pytest.approx(0, abs=1e-20)
    assert by.total(Plan.draw(ones)) == by.discretisation


@pytest.mark.parametrize(("solver", "kind"), [("ddim", "ode"), ("ddpm", "sde")])
@pytest.mark.parametrize("number", [0, 1])
def test_a_level_alone_is_predicted_as_the_report_says(solver: str, kind: str, number: int) -> None:
    """In many steps, within 20 percent; and that is what happens, within a third."""
    by, alone = predictor(solver, 192), Plan.given(torch.ones(192, 1), levels=(str(number + 1),))
    said = by.response_error(alone)
    assert missing(family().fitted.calibration_for(family()), kind, number) == pytest.approx(said, rel=0.2)
    assert measured_error([alone], by) == pytest.approx(said, rel=1 / 3)


def test_the_solvers_error_is_a_power_law_and_pilots_correct_a_plans() -> None:
    by = predictor(steps=32)
    assert by.discretisation == pytest.approx(2e-7)  # between 4e-7 in 16 steps and 1e-7 in 64
    assert by.discretisation_at(256) == pytest.approx(2.5e-8)
    assert by.discretisation_at(4) == pytest.approx(1.6e-6)
    one = every(4, 32, estimator="held")
    said = by.response_error(one)
    pilots = {"sde/held": [[said / 2, said / 2], [said * 2, said * 8]], "ode/held": [[said, said * 9]]}
    corrected = Predictor(replace(by.calibration, pilots=pilots), COSINE, by.solver, by.grid)
    assert corrected.error(one) == pytest.approx(2 * said)  # halfway, in logarithms, between 1 and 4 times as much
    assert corrected.error(every(4, 32, estimator="hindsight")) == by.error(every(4, 32, estimator="hindsight"))
    with pytest.raises(
        ValueError, match=r"^the error of heun/log_snr was not measured; choose from ddpm/uniform, ddim"
    ):
        predictor("heun", 8).total(every(2, 15, estimator="held"))


# --- predicted and measured ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize(("coins", "draws"), [("bernoulli", 20), ("systematic", 8)])
def test_coins_do_what_is_predicted(solver: str, coins: str, draws: int) -> None:
    """On average over the draws, within a factor of 1.5."""
    by = predictor(solver, 24)
    options = {"budget": 0.5, "estimator": "jump", "coins": coins, "levels": ("1", "2", "3")}
    plans = [plan(solver, 24, **options, seed=seed) for seed in range(draws)]
    said = sum(map(by.response_error, plans)) / draws
    assert 1 / 1.5 < measured_error(plans, by) / said < 1.5


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("options", HELD[:4], ids=str)
def test_held_corrections_do_what_is_predicted(solver: str, options: dict[str, Any]) -> None:
    """Measured at every third row, within a factor of 1.5."""
    by, one = predictor(solver, 32), every(3, 32, **options)
    assert 1 / 1.5 < measured_error([one], by) / by.response_error(one) < 1.5


@pytest.mark.parametrize("options", HELD[4:], ids=str)
def test_hindsight_does_what_is_predicted(options: dict[str, Any]) -> None:
    """DDPM: within a factor of 2. What a row got wrong has shrunk by a model until hindsight mends it."""
    by, one = predictor("ddpm", 32), every(3, 32, **options)
    assert 1 / 2 < measured_error([one], by) / by.response_error(one) < 2


@pytest.mark.parametrize("order", [0, 1])
def test_hindsight_of_a_smooth_correction_is_predicted_to_be_good_and_is(order: int) -> None:
    """DDIM: the prediction is smaller than what shrinking by a model leaves, and both are far below holding."""
    by = predictor("ddim", 32, "uniform")
    hindsight, held = (every(3, 32, estimator=estimator, order=order) for estimator in ("hindsight", "held"))
    assert by.response_error(hindsight) < measured_error([hindsight], by)
    factor = {0: 0.1, 1: 2.0}[order]
    assert by.response_error(hindsight) < factor * by.response_error(held)
    assert measured_error([hindsight], by) < factor * measured_error([held], by)
