"""Calibration against closed forms, and what is predicted from it against what happens."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlem.denoiser import MixtureDenoiser, gaussian_denoiser
from mlem.family import Family, Level
from mlem.multilevel.calibrate import Calibration, measure
from mlem.multilevel.denoiser import MultilevelDenoiser
from mlem.multilevel.plan import Plan
from mlem.multilevel.predict import Predictor, Search, held_deviation
from mlem.multilevel.recipe import Recipe
from mlem.multilevel.report import missing
from mlem.multilevel.trial import CALIBRATION, PILOT, estimate, start, trial, trial_indices
from mlem.noise import BrownianPath
from mlem.sampling import sample
from mlem.schedule import NoiseSchedule, TimeGrid
from mlem.solvers import Point, make_solver, response
from tests.problems import MEAN

COSINE = NoiseSchedule.cosine()


@pytest.fixture(autouse=True, scope="module")
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    with torch.no_grad():
        yield
    torch.set_default_dtype(torch.float32)


class Waves(nn.Module):
    """The exact noise estimate of a mild mixture, and waves in v: as with networks, the error stays bounded.

    size: makes the FLOPs rise, and changes nothing else.
    """

    def __init__(self, size: int, error: float, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(512, 3, generator=torch.Generator().manual_seed(seed))[:size])
        means, variances = torch.stack([MEAN / 4, -MEAN / 4]), torch.tensor([0.5, 0.4])
        self.error, self.exact = error, MixtureDenoiser(COSINE, torch.tensor([0.3, 0.7]), means, variances)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        t = (timestep.double() + 1) / 1000
        wave = torch.cos(0.5 * x @ self.weight[:3].T + self.weight[:3, 0]) + 0 * (x @ self.weight.T)[:, :3]
        return self.exact(x, t) + self.error * COSINE.alpha(t)[:, None] * wave


def level(number: int, error: float, seed: int) -> Level:
    return Level(str(number), Waves(8**number, error, seed), COSINE, (3,), "eps", "points")


def fitted(levels: list[Level], images: int) -> Family:
    """A family with its calibration; the solver errors of ddpm and ddim are made up."""
    family = Family(levels)
    measured = measure([one.denoiser for one in levels], COSINE, (3,), trial_indices(CALIBRATION, images), times=24)
    seconds = {8: tuple(0.1 * 4.0**k for k in range(len(levels))), 64: tuple(8.0**k for k in range(len(levels)))}
    flops = tuple(float(one.flops) for one in levels)
    about = {"images": images, "seed": 0, "device": "cpu", "weights": family.weights_hash}
    errors = {name: {16: 4e-7, 64: 1e-7} for name in ("ddpm/uniform", "ddim/uniform")}
    family.fitted["calibration"] = Calibration(tuple(family.names), flops, seconds, *measured, about, errors).to_dict()
    return family


@functools.cache
def family() -> Family:
    """Three levels; the top one is exact."""
    return fitted([level(1, 0.03, 1), level(2, 0.01, 2), level(3, 0.0, 3)], 128)


def predictor(solver: str = "ddpm", steps: int = 48, grid: str | None = None, of: Family | None = None) -> Predictor:
    method, of = make_solver(solver), of or family()
    return Predictor(Calibration.of(of), COSINE, method, method.grid(COSINE, steps, grid))


def plan(solver: str, steps: int, **options: Any) -> Plan:
    method = make_solver(solver)
    return Recipe(**{"cost": "flops"} | options).plan(family(), method, method.grid(COSINE, steps))


def measured_error(plans: list[Plan], by: Predictor) -> float:
    """Mean squared distance to the top level with the same solver, on 256 samples that calibration has not seen."""
    index = trial_indices(PILOT, 256)

    def run(denoiser: Any) -> Tensor:
        return trial(denoiser, COSINE, (3,), by.solver, by.grid, index, 0)

    truth = run(family().level().denoiser)
    errors = [(run(MultilevelDenoiser(family(), one)) - truth).square().mean().item() for one in plans]
    return sum(errors) / len(errors)


def every(stride: int, rows: int, columns: int = 3, **options: Any) -> Plan:
    """Corrections measured at every `stride`-th row."""
    return Plan.given((torch.arange(rows) % stride == 0)[:, None].expand(-1, columns), **options)


# --- what is measured ----------------------------------------------------------------------------------------------


def gain_of_gaussian(times: int, deviation: float, kind: str) -> tuple[Tensor, Tensor]:
    """Measured gain for round Gaussian data, and kappa."""
    top = gaussian_denoiser(COSINE, torch.zeros(3), deviation**2 * torch.eye(3))

    def below(x: Tensor, t: Tensor) -> Tensor:
        return 0.9 * top(x, t) + 0.1 * COSINE.alpha(t)[:, None]

    log_snr, *_, responses = measure([below, top], COSINE, (3,), trial_indices(CALIBRATION, 4), times=times)
    return responses[kind].gain[0], torch.exp(-log_snr / 2)


@pytest.mark.parametrize("deviation", [0.5, 2.0])
def test_the_gain_of_the_sde_is_exact_for_gaussian_data(deviation: float) -> None:
    """`sigma s^2 / (s^2 + kappa^2)`; DDPM steps are exact for the mean of Gaussian data, so for any grid."""
    gain, kappa = gain_of_gaussian(12, deviation, "sde")
    sigma = kappa / (1 + kappa**2).sqrt()
    torch.testing.assert_close(gain, sigma * deviation**2 / (deviation**2 + kappa**2), rtol=1e-7, atol=0)


@pytest.mark.parametrize("deviation", [0.5, 2.0])
def test_the_gain_of_the_ode_tends_to_the_exact_one_for_gaussian_data(deviation: float) -> None:
    """`sigma s / sqrt(s^2 + kappa^2)`, up to the error of DDIM in twice as many steps, which is of first order."""
    errors = {}
    for times in (24, 96):
        gain, kappa = gain_of_gaussian(times, deviation, "ode")
        sigma = kappa / (1 + kappa**2).sqrt()
        errors[times] = (gain / (sigma * deviation / (deviation**2 + kappa**2).sqrt()) - 1).abs().max().item()
    assert errors[24] < 0.07
    assert errors[96] == pytest.approx(errors[24] / 4, rel=0.05)


def test_the_gain_of_the_ode_is_the_product_of_the_steps_for_gaussian_data() -> None:
    """DDIM multiplies y by `1 + (kappa' - kappa) kappa / (s^2 + kappa^2)` in each step."""
    gain, kappa = gain_of_gaussian(6, 0.5, "ode")
    steps = COSINE.kappa(torch.tensor(TimeGrid.make("log_snr", COSINE, 12).times))
    factors = 1 + steps.diff() * steps[:-1] / (0.25 + steps[:-1] ** 2)
    to_the_end = factors.flip(0).cumprod(0).flip(0)[::2]
    torch.testing.assert_close(gain, kappa / (1 + kappa**2).sqrt() * to_the_end, rtol=1e-7, atol=0)


def test_differences_and_inner_products_are_those_along_the_trajectories() -> None:
    """Brute force, over DDIM and DDPM trajectories of the top level."""
    levels, index = [one.denoiser for one in family().levels], trial_indices(CALIBRATION, 5)
    log_snr, differences, by_image, responses = measure(levels, COSINE, (3,), index, times=4)
    grid = TimeGrid.make("log_snr", COSINE, 8)
    points, squares, images = Point.of(COSINE, grid), [], []
    torch.testing.assert_close(log_snr, COSINE.log_snr(torch.tensor(grid.times[:-1:2])))
    for kind, name in (("ode", "ddim"), ("sde", "ddpm")):
        path, y = BrownianPath(COSINE, 0, index, (3,), torch.float32), start(COSINE, (3,), index, 0)
        f = []
        for i, (here, there) in enumerate(itertools.pairwise(points)):
            if i % 2 == 0:
                f.append(torch.stack([estimate(one, COSINE)(y, here) for one in levels]))
            y, _ = make_solver(name).step(estimate(levels[-1], COSINE), y, None, here, there, path)
        told = torch.stack(f)  # (T, K, B, 3)
        squares.append([[(told[:, j] - told[:, k]).square().mean((1, 2)) for k in range(3)] for j in range(3)])
        images.append(told.diff(dim=1).square().mean((0, 3)))
        alpha = torch.tensor([point.alpha for point in points[:-1:2]])
        of_q = torch.einsum("ktkt->kt", responses[kind].inner)
        torch.testing.assert_close(of_q, (told.diff(dim=1).square().mean((2, 3)).T / alpha**2))
    expected = torch.stack([torch.stack([torch.stack(row) for row in one]) for one in squares]).mean(0)
    torch.testing.assert_close(differences, expected.permute(2, 0, 1))
    torch.testing.assert_close(by_image, torch.cat(images, 1))
    assert differences[:, 0, 2].min() > 0


def test_costs_are_those_of_the_largest_level_in_both_units() -> None:
    found = Calibration.of(family())
    assert found.costs("seconds", 64).tolist() == [1 / 64, 1 / 8, 1.0]
    assert found.costs("seconds", 4).tolist() == pytest.approx([1 / 16, 1 / 4, 1.0])  # that of the nearest batch size
    assert found.costs("flops").tolist() == [one.flops / family().level().flops for one in family().levels]
    with pytest.raises(ValueError, match=r"^cost must be seconds or flops, got 'joules'$"):
        found.costs("joules")


def test_a_calibration_is_kept_as_json_of_these_weights() -> None:
    plain = family().fitted["calibration"]
    found = Calibration.from_dict(plain)
    assert found.to_dict() == plain
    other = Family([level(1, 0.03, 1), level(2, 0.01, 4), level(3, 0.0, 3)], {"calibration": plain})
    with pytest.raises(ValueError, match=r"^the calibration is of other weights: python -m mlem\.multilevel calibrate"):
        Calibration.of(other)
    with pytest.raises(ValueError, match=r"^a calibration of format 0, this version reads 1; calibrate again$"):
        Calibration.from_dict(plain | {"format": 0})
    with pytest.raises(ValueError, match=r"points is not calibrated: python -m mlem\.multilevel calibrate FAMILY$"):
        Calibration.of(Family(other.levels))


# --- what each row adds --------------------------------------------------------------------------------------------


def points_of(*times: float) -> tuple[list[Point], list[float]]:
    points = Point.of(COSINE, TimeGrid("custom", times))
    return points, [point.kappa for point in points]


def test_the_response_of_single_steps_by_hand() -> None:
    points, k = points_of(0.9, 0.6, 0.3, 0.0)
    for name, expected in (
        ("ddim", [b - a for a, b in itertools.pairwise(k)]),
        ("euler_maruyama", [2 * (b - a) for a, b in itertools.pairwise(k)]),
        ("ddpm", [(b * b - a * a) / a for a, b in itertools.pairwise(k)]),
    ):
        coefficients, rows = response(make_solver(name), COSINE, points)
        assert rows == points[:-1]
        assert coefficients.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_response_of_heun_by_hand() -> None:
    """Half a step each, at both of its ends; the last step is Euler's."""
    points, (a, b, c, _) = points_of(0.9, 0.6, 0.3, 0.0)
    coefficients, rows = response(make_solver("heun"), COSINE, points)
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
    coefficients, rows = response(make_solver("dpm_solver_pp"), COSINE, points)
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

    measured = measure([below, top], COSINE, (3,), trial_indices(CALIBRATION, 2), times=24)
    found = Calibration(("1", "2"), (1.0, 2.0), {64: (1.0, 2.0)}, *measured, {})
    method = make_solver(solver)
    grid = method.grid(COSINE, 40)
    scale = Predictor(found, COSINE, method, grid).scale[0]
    rows, calls = len(scale), itertools.count()

    def eps(x: Tensor, t: Tensor) -> Tensor:
        """Sample j is moved at row j, the last one never."""
        return top(x, t) + COSINE.alpha(t)[:, None] * (torch.arange(rows + 1) == next(calls))[:, None]

    index = trial_indices(PILOT, 1).expand(rows + 1)
    ends = trial(eps, COSINE, (3,), method, grid, index, 0)[:, 0]
    moved = ends[:-1] - ends[-1]
    assert (moved - scale).abs().sum() < 0.12 * moved.abs().sum()
    if solver in ("ddim", "ddpm"):
        assert (moved / scale - 1).abs().max() < 0.03


# --- what a plan says in the place of corrections ------------------------------------------------------------------

HELD: list[dict[str, Any]] = [
    {"estimator": estimator, "order": order, "memory": memory}
    for estimator in ("held", "hindsight")
    for order in (0, 1)
    for memory in (None, 0.7)
]


@pytest.mark.parametrize("how", HELD, ids=str)
@pytest.mark.parametrize("rows", [(0, 3, 4, 7, 10), (0, 1, 2, 8), (0,), range(12)], ids=str)
def test_held_deviations_are_what_the_denoiser_says(how: dict[str, Any], rows: Any) -> None:
    """The denoiser itself on twelve samples, of which sample j has a correction of 1 in v at row j and 0 elsewhere.

    The response is chosen such that a row counts `scale`, hindsight's shrinkage undone.
    """
    points = Point.of(COSINE, TimeGrid.make("log_snr", COSINE, 12))[:-1]
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
        total += denoiser.revise(y, here)[:, 0] / here.kappa
        total += scale[row] * denoiser(y, torch.full((12,), here.t))[:, 0] / here.alpha
    said = held_deviation(table[None, :, 1], scale, times, **how)[0]
    torch.testing.assert_close(said, total, rtol=0, atol=1e-10)
    assert bool(said.any()) is (len(rows) < 12)


def test_jump_plans_are_predicted_by_their_counts_over_probabilities() -> None:
    by, p = predictor(steps=6), torch.tensor([[1.0, 0.5, 0.25]] * 6)
    one = Plan.draw(p, "systematic", 3)
    assert one.counts is not None
    deviations = (by.scale.T * (one.counts / p - 1)[:, 1:]).T
    assert by.response_error(one) == pytest.approx(by.energy(deviations).item(), rel=1e-12)
    # independent coins, on average: the sum of their variances
    squares = torch.einsum("kr,krkr->kr", by.scale**2, by.covariance).T
    expected = ((1 / p - 1)[:, 1:] * squares).sum().item()
    assert by.response_error(Plan.draw(p, "bernoulli", 3)) == pytest.approx(expected, rel=1e-12)
    assert by.response_error(Plan.draw(p, "systematic", 3, per_sample=True)) == pytest.approx(expected, rel=1e-12)


def test_the_energy_is_the_mean_square_of_the_sum() -> None:
    """Monte Carlo: 200,000 Gaussian q of that covariance, in standard errors."""
    by = predictor("ddpm", 16)
    size = by.scale.numel()
    values, axes = torch.linalg.eigh(by.covariance.reshape(size, size))
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
    matrix = by.covariance.reshape(by.scale.numel(), -1)
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
    assert missing(Calibration.of(family()), kind, number) == pytest.approx(said, rel=0.2)
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
    with pytest.raises(ValueError, match=r"^the error of heun/karras was not measured; choose of ddpm/uniform, ddim"):
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
    by = predictor("ddim", 32)
    hindsight, held = (every(3, 32, estimator=estimator, order=order) for estimator in ("hindsight", "held"))
    assert by.response_error(hindsight) < measured_error([hindsight], by)
    factor = {0: 0.1, 1: 2.0}[order]
    assert by.response_error(hindsight) < factor * by.response_error(held)
    assert measured_error([hindsight], by) < factor * measured_error([held], by)


# --- plans that are searched for -----------------------------------------------------------------------------------

LEVELS = [("1", "2", "3"), ("1", "3"), ("2", "3"), ("3",)]


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("estimator", ["held", "hindsight"])
@pytest.mark.parametrize("levels", LEVELS[:3], ids=str)
def test_a_search_spends_its_budget_well(solver: str, estimator: str, levels: tuple[str, ...]) -> None:
    """At most the budget, all but what one more measurement costs, and not worse than evenly spread rows."""
    by, costs = predictor(solver, 32), Calibration.of(family()).costs("flops")
    own = costs[[int(name) - 1 for name in levels]]
    search = Search(by, levels, costs, 0, estimator)
    for budget in (7.0, 16.0):
        found = search.plan(budget)
        assert found is not None
        assert budget - 2.5 < found.cost(own) <= budget
        for stride in (2, 3, 4, 6, 8, 16):
            even = every(stride, 32, len(levels), estimator=estimator, order=0, levels=levels)
            assert even.cost(own) > found.cost(own) or by.response_error(found) <= by.response_error(even) * 1.0001


def test_a_search_finds_nothing_for_too_little() -> None:
    by, costs = predictor("ddpm", 32), Calibration.of(family()).costs("flops")
    for levels in LEVELS:
        assert Search(by, levels, costs, 0, "held").plan(0.9) is None
    assert Search(by, ("3",), costs, 0, "held").plan(31.9) is None
    alone = Search(by, ("3",), costs, 0, "held").plan(32.0)
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
    by, costs = predictor(solver, 32), Calibration.of(family()).costs("flops")
    mse = 2e-7 + {"ddpm": 3e-6, "ddim": 3e-8}[solver]
    found = plan(solver, 32, mse=mse, **options)
    assert by.total(found) <= mse
    assert found.about["predicted_mse"] == pytest.approx(by.total(found))
    own = costs[[int(name) - 1 for name in found.levels]]
    less = plan(solver, 32, budget=0.95 * found.expected_cost(own) / 32, **options)
    assert by.total(less) > mse


def test_an_error_below_the_solvers_own_gets_one_line() -> None:
    says = "mse=1e-07: the error of ddpm in 32 steps on the uniform grid alone is 2e-07; take more steps, or another"
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        plan("ddpm", 32, mse=1e-7)
    says = "mse=0.1: the error of heun in 8 steps on the karras grid alone was not measured; take more steps"
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        plan("heun", 8, mse=0.1, estimator="held")


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
    recipe = family().plan(budget=0.4, cost="flops", **options)
    result = sample(family(), indices=range(3), solver="ddpm", steps=24, plan=recipe)
    found = plan("ddpm", 24, budget=0.4, **options)
    spent = sum(cost.flops for cost in result.ledger.levels.values()) / 3 / family().level().flops
    assert spent == pytest.approx(found.about["cost"], rel=1e-12)
    expected = sum(cost.expected_calls * family().level(name).flops for name, cost in result.ledger.levels.items())
    assert expected / 3 / family().level().flops == pytest.approx(found.about["expected_cost"], rel=1e-12)
    if options.get("coins") is None or options["estimator"] == "jump":
        assert 0.4 * 24 * 0.75 < found.about["expected_cost"] <= 0.4 * 24


@pytest.mark.parametrize("coins", ["bernoulli", "systematic"])
def test_own_coins_cost_what_was_promised(coins: str) -> None:
    """On 1024 samples within 3 percent: chance, and the padding of sub-batches."""
    options = {"budget": 0.4, "estimator": "jump", "coins": coins, "per_sample": True}
    result = sample(
        family(),
        indices=range(1024),
        batch_size=1024,
        solver="ddpm",
        steps=24,
        plan=family().plan(cost="flops", **options),
    )
    spent = sum(cost.flops for cost in result.ledger.levels.values()) / 1024 / family().level().flops
    found = plan("ddpm", 24, **options)
    assert found.about["cost"] == found.about["expected_cost"]
    assert spent == pytest.approx(found.about["cost"], rel=0.03)


def test_the_best_levels_leave_out_a_useless_one() -> None:
    """Level 2 says what level 1 says, and costs more."""
    useless = fitted([level(1, 0.03, 1), level(2, 0.03, 1), level(3, 0.0, 3)], 16)
    method = make_solver("ddpm")
    grid = method.grid(COSINE, 32)
    for options in ({"estimator": "hindsight"}, {"estimator": "jump", "coins": "bernoulli"}):
        for budget in (0.2, 0.5):
            recipe = Recipe(budget=budget, cost="flops", **options)
            found = recipe.plan(useless, method, grid)
            assert found.levels == ("1", "3")
            all_levels = replace(recipe, levels=("1", "2", "3")).plan(useless, method, grid)
            by = predictor("ddpm", 32, of=useless)
            assert by.choice(found) <= by.choice(all_levels)


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
