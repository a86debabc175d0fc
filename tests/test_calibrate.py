"""Calibration against closed forms."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from mlem.brownian import BrownianPath
from mlem.denoiser import gaussian_denoiser
from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.multilevel.calibrate import measure
from mlem.multilevel.calibration import Calibration
from mlem.multilevel.fitted import Fitted
from mlem.noise import noise_dtype, reserved_indices
from mlem.solvers import GridPoint, make_solver
from mlem.trajectory import noise_estimate, starting_noise
from tests.waves import COSINE, family, level

pytestmark = pytest.mark.usefixtures("float64_module")


def gain_of_gaussian(times: int, deviation: float, kind: str) -> tuple[Tensor, Tensor]:
    """Measured gain for round Gaussian data, and kappa."""
    top = gaussian_denoiser(COSINE, torch.zeros(3), deviation**2 * torch.eye(3))

    def below(x: Tensor, t: Tensor) -> Tensor:
        return 0.9 * top(x, t) + 0.1 * COSINE.alpha(t)[:, None]

    log_snr, *_, responses = measure([below, top], COSINE, (3,), reserved_indices("calibration", 4), times=times)
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
    levels, index = [one.denoiser for one in family().levels], reserved_indices("calibration", 5)
    log_snr, differences, by_image, responses = measure(levels, COSINE, (3,), index, times=4)
    grid = TimeGrid.make("log_snr", COSINE, 8)
    points, squares, images = GridPoint.of(COSINE, grid), [], []
    torch.testing.assert_close(log_snr, COSINE.log_snr(torch.tensor(grid.times[:-1:2])))
    for kind, name in (("ode", "ddim"), ("sde", "ddpm")):
        path = BrownianPath(COSINE, 0, index, (3,), noise_dtype())
        y = starting_noise(0, index, (3,)) / points[0].alpha
        f = []
        for i, (here, there) in enumerate(itertools.pairwise(points)):
            if i % 2 == 0:
                f.append(torch.stack([noise_estimate(one, COSINE)(y, here) for one in levels]))
            y, _ = make_solver(name).step(noise_estimate(levels[-1], COSINE), y, None, here, there, path)
        told = torch.stack(f)  # (T, K, B, 3)
        squares.append([[(told[:, j] - told[:, k]).square().mean((1, 2)) for k in range(3)] for j in range(3)])
        images.append(told.diff(dim=1).square().mean((0, 3)))
        alpha = torch.tensor([point.alpha for point in points[:-1:2]])
        of_q = torch.einsum("ktkt->kt", responses[kind].inner)
        torch.testing.assert_close(of_q, (told.diff(dim=1).square().mean((2, 3)).T / alpha**2))
    expected = torch.stack([torch.stack([torch.stack(row) for row in one]) for one in squares]).mean(0)
    torch.testing.assert_close(differences, expected.permute(2, 0, 1))
    torch.testing.assert_close(by_image, torch.stack(images).mean(0))
    assert differences[:, 0, 2].min() > 0


def test_costs_are_those_of_the_largest_level_in_both_units() -> None:
    found = family().fitted.calibration_for(family())
    assert found.costs("seconds", 64).tolist() == [1 / 64, 1 / 8, 1.0]
    assert found.costs("seconds", 4).tolist() == pytest.approx([1 / 16, 1 / 4, 1.0])  # that of the nearest batch size
    assert found.costs("flops").tolist() == [one.flops / family().level().flops for one in family().levels]
    with pytest.raises(ValueError, match=r"^cost must be seconds or flops, got 'joules'$"):
        found.costs("joules")


def test_a_calibration_is_kept_as_json_of_these_weights() -> None:
    plain = json.loads(json.dumps(family().fitted.calibration_for(family()).to_dict()))
    found = Calibration.from_dict(plain)
    assert found.to_dict() == plain
    other = Family([level(1, 0.03, 1), level(2, 0.01, 4), level(3, 0.0, 3)], Fitted(found))
    with pytest.raises(
        ValueError,
        match=r"^the calibration is for other weights or guidance: python -m mlem\.multilevel calibrate",
    ):
        other.fitted.calibration_for(other)
    with pytest.raises(
        ValueError, match=r"^the calibration has format 0, but this version reads 1; calibrate again: python -m"
    ):
        Calibration.from_dict(plain | {"format": 0})
    with pytest.raises(ValueError, match=r"points is not calibrated: python -m mlem\.multilevel calibrate FAMILY$"):
        Fitted().calibration_for(other)


@pytest.mark.parametrize("field", [one.name for one in fields(Calibration)])
def test_a_damaged_calibration_gets_one_line(field: str) -> None:
    """A field that is missing, that is of another kind, or that does not fit the others."""
    plain = family().fitted.calibration_for(family()).to_dict()
    short = {"names": ["1"], "log_snr": plain["log_snr"][1:], "seconds": {}, "responses": {}}
    others = [None, 3, short.get(field, "x")]
    newer = ("outside", "stderr", "trimmed", "shallow")  # than some calibrations
    missing = [] if field in newer else [{key: plain[key] for key in plain if key != field}]
    for other in [*missing, *(plain | {field: value} for value in others)]:
        with pytest.raises(ValueError, match=r"^calibration\.json is damaged \([^\n]*\); calibrate again: [^\n]*$"):
            Calibration.from_dict(other, "calibration.json")
