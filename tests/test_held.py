"""Held corrections and hindsight: exact where the extension is right, by hand where it is not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mlem.denoiser import Denoiser
from mlem.multilevel.denoiser import MultilevelDenoiser
from mlem.multilevel.holding import Holding, Measurement
from mlem.solvers import GridPoint, make_solver, quadrature_weights
from tests.hierarchy import COSINE, TIMES, at, call, denoisers, measured, noise, trajectory
from tests.problems import MEAN, gaussian, mixture, point_mass, rms


def corrected(below: Denoiser, correction: Any) -> Denoiser:
    """A level above `below` by a correction in v, a function of `-ln kappa`: (f - below) / alpha."""

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return below(x, t) + COSINE.alpha(t)[:, None] * correction(-COSINE.kappa(t).log())[:, None]

    return eps


def test_order_0_holds_a_constant_correction_exactly() -> None:
    f1 = gaussian(COSINE)
    f2 = corrected(f1, lambda time: 0 * time + 0.3)
    levels = [f1, f2, corrected(f2, lambda time: 0 * time - 0.1)]
    plan = measured(5, [0, 3], [0, 2], estimator="held", order=0)
    for x in (noise(4), noise(4, 1)):
        said = call(MultilevelDenoiser(levels, plan, schedule=COSINE), x, TIMES)
        top = torch.stack([levels[-1](x, at(t, 4)) for t in TIMES])
        torch.testing.assert_close(said, top, rtol=0, atol=1e-12)


def test_order_1_extends_a_correction_linear_in_log_kappa_exactly() -> None:
    """From the second measurement on; order 0 does not."""
    f1 = gaussian(COSINE)
    f2 = corrected(f1, lambda time: 0.3 - 0.2 * time)
    levels, x = [f1, f2, corrected(f2, lambda time: 0.1 + 0.05 * time)], noise(4)
    top = torch.stack([levels[-1](x, at(t, 4)) for t in TIMES])
    for order, exact in ((1, True), (0, False)):
        plan = measured(5, [0, 1, 3], [0, 1], estimator="held", order=order)
        said = call(MultilevelDenoiser(levels, plan, schedule=COSINE), x, TIMES)
        assert torch.allclose(said, top, rtol=0, atol=1e-12) is exact


@pytest.mark.parametrize("order", [0, 1])
def test_between_measurements_a_correction_is_the_line_through_the_last(order: int) -> None:
    """A correction in sin(-ln kappa), by hand."""
    levels, x = [gaussian(COSINE), corrected(gaussian(COSINE), torch.sin)], noise(4)
    plan = measured(5, [0, 2], estimator="held", order=order)
    said = call(MultilevelDenoiser(levels, plan, schedule=COSINE), x, TIMES)
    time = [-math.log(COSINE.kappa(t).item()) for t in TIMES]
    slope = (math.sin(time[2]) - math.sin(time[0])) / (time[2] - time[0]) if order else 0.0
    expected = [math.sin(time[0])] * 2 + [math.sin(time[2]) + slope * (now - time[2]) for now in time[2:]]
    for row, t in enumerate(TIMES):
        eps = levels[0](x, at(t, 4)) + COSINE.alpha(t) * expected[row]
        torch.testing.assert_close(said[row], eps, rtol=0, atol=1e-12)


def test_two_measurements_at_one_time_have_no_slope() -> None:
    levels, x = denoisers(2), noise(4)
    plan = measured(3, [0, 1], estimator="held", order=1)
    multilevel = MultilevelDenoiser(levels, plan, schedule=COSINE)
    for y in (x, x + 0.1):
        multilevel(y, at(0.5, 4))
    held = (levels[1](x + 0.1, at(0.5, 4)) - levels[0](x + 0.1, at(0.5, 4))) / COSINE.alpha(0.5)
    said = multilevel(x, at(0.4, 4))
    expected = levels[0](x, at(0.4, 4)) + held * COSINE.alpha(0.4)
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm_solver_pp", "euler_maruyama"])
def test_held_and_hindsight_change_nothing_where_the_extension_is_right(solver: str) -> None:
    """A correction of which every extension is exact: the trajectory is the top level's, to rounding."""
    f1 = mixture(COSINE)
    constant = [f1, corrected(f1, lambda time: 0 * time + 0.1)]
    linear = [f1, corrected(f1, lambda time: 0.1 + 0.05 * time)]
    for order, levels in ((0, constant), (1, constant), (1, linear)):
        top, _ = trajectory(levels, None, solver, 16)
        for estimator in ("held", "hindsight"):
            plan = measured(16, [0, 1, 5, 9, 15], estimator=estimator, order=order)
            end, _ = trajectory(levels, plan, solver, 16)
            torch.testing.assert_close(end, top, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm_solver_pp"])
def test_hindsight_mends_what_holding_got_wrong(solver: str) -> None:
    """The correction is linear, the extension constant: interpolation knows it afterwards, up to what has passed."""
    levels = [gaussian(COSINE), corrected(gaussian(COSINE), lambda time: 0.1 + 0.05 * time)]
    errors = {}
    for steps in (32, 128):
        top, _ = trajectory(levels, None, solver, steps)
        for estimator in ("held", "hindsight"):
            plan = measured(steps, [*range(0, steps, 4), steps - 1], estimator=estimator, order=0)
            errors[estimator, steps] = rms(trajectory(levels, plan, solver, steps)[0] - top)
    assert errors["hindsight", 32] < 0.5 * errors["held", 32]
    assert errors["hindsight", 128] < 0.15 * errors["held", 128]
    assert errors["held", 32] > 0.01


@pytest.mark.parametrize(("order", "right"), [(0, False), (1, True)])
def test_interpolation_is_a_parabola_through_three_measurements(order: int, right: bool) -> None:
    holding, times = Holding(order, None), (-2.0, -1.5, 0.3)
    points = [Measurement(time, torch.tensor(3 + 2 * time - 0.7 * time**2, dtype=torch.float64)) for time in times]
    for time in (-1.5, -1.0, 0.0, 0.3):
        ends = time in times
        assert (abs(holding.interpolated(points, time).item() - (3 + 2 * time - 0.7 * time**2)) < 1e-12) is (
            right or ends
        )
        line = 3 + 2 * -1.5 - 0.7 * 1.5**2 + (time + 1.5) / 1.8 * (2 * 1.8 - 0.7 * (0.09 - 2.25))
        assert holding.interpolated(points[1:], time).item() == pytest.approx(line)


def test_a_correction_that_is_measured_late_is_nothing_until_then() -> None:
    levels, x = [gaussian(COSINE), corrected(gaussian(COSINE), torch.sin)], noise(4)
    said = call(MultilevelDenoiser(levels, measured(5, [2], estimator="held"), schedule=COSINE), x, TIMES)
    for row in (0, 1):
        torch.testing.assert_close(said[row], levels[0](x, at(TIMES[row], 4)), rtol=0, atol=0)
    time = [-math.log(COSINE.kappa(t).item()) for t in TIMES]
    slope = math.sin(time[2]) / (time[2] - time[0])  # from nothing at the first row
    expected = levels[0](x, at(TIMES[3], 4)) + COSINE.alpha(TIMES[3]) * (
        math.sin(time[2]) + slope * (time[3] - time[2])
    )
    torch.testing.assert_close(said[3], expected, rtol=0, atol=1e-12)


def test_one_move_of_hindsight_by_hand() -> None:
    """DDIM, measured at rows 0 and 2: at row 2 the state moves by what row 1 got wrong."""
    levels = [point_mass(COSINE, MEAN), corrected(point_mass(COSINE, MEAN), torch.sin)]
    solver = make_solver("ddim")
    points = GridPoint.of(COSINE, solver.grid(COSINE, 4, "log_snr"))
    plan = measured(4, [0, 2], order=0)
    multilevel = MultilevelDenoiser(levels, plan, schedule=COSINE)
    multilevel.start(None, quadrature_weights(solver, COSINE, points)[0].tolist())
    y = noise(4) / points[0].alpha
    for here in points[:2]:
        assert multilevel.revise(y, here) is y
        multilevel(y * here.alpha, at(here.t, 4))
    at_once = multilevel.revise(y, points[2])
    moved = at_once - y
    time = [-math.log(point.kappa) for point in points[:3]]
    line = math.sin(time[0]) + (math.sin(time[2]) - math.sin(time[0])) * (time[1] - time[0]) / (time[2] - time[0])
    wrong = (line - math.sin(time[0])) * points[1].alpha * (points[2].kappa - points[1].kappa)
    # every sample and element alike; what became of it since row 1 is a model: it shrinks at most as kappa does
    torch.testing.assert_close(moved, torch.full_like(y, moved[0, 0].item()), rtol=0, atol=1e-9)
    assert points[2].kappa / points[1].kappa - 1e-9 <= moved[0, 0].item() / wrong <= 1 + 1e-9
    # nothing runs again: v is that of the largest level before the move
    here = points[2]
    said, before = multilevel(at_once * here.alpha, at(here.t, 4)), levels[1](y * here.alpha, at(here.t, 4))
    v = [(eps - here.sigma * state * here.alpha) / here.alpha for eps, state in ((said, at_once), (before, y))]
    torch.testing.assert_close(v[0], v[1], rtol=0, atol=1e-12)


def test_what_ran_before_a_move_does_not_hold_after_another_change() -> None:
    """The correction of the state before, and the cheapest level at the state that came of it."""
    levels = [gaussian(COSINE), corrected(gaussian(COSINE), torch.sin)]
    solver = make_solver("ddim")
    points = GridPoint.of(COSINE, solver.grid(COSINE, 4, "log_snr"))
    for changed in (False, True):
        run = MultilevelDenoiser(levels, measured(4, [0, 2], order=0), schedule=COSINE).begin(
            None, quadrature_weights(solver, COSINE, points)[0].tolist()
        )
        y = noise(4) / points[0].alpha
        for here in points[:2]:
            run.revise(y, here)
            run.estimate(y, here)
        here = points[2]
        before = run.revise(y, here)
        after = before + 0.3 * changed
        run.changed(before, after)
        at_row = at(here.t, 4)
        there = levels[0]((after if changed else y) * here.alpha, at_row)
        there = there if changed else there + here.alpha * here.sigma * (before - y)
        correction = levels[1](y * here.alpha, at_row) - levels[0](y * here.alpha, at_row)
        torch.testing.assert_close(run.estimate(after, here), there + correction, rtol=0, atol=1e-12)
