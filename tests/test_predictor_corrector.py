"""The corrector leaves its noise level's law alone; predictor and corrector in turn; sizes from Lipschitz constants."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mlem.denoiser import MixtureDenoiser
from mlem.grids import TimeGrid
from mlem.sampling import Sampler, sample
from mlem.schedule import NoiseSchedule
from mlem.solvers import EvaluationPoint, GridPoint, make_solver, model_input
from mlem.solvers.lipschitz import Lipschitz, estimate_lipschitz
from mlem.solvers.predictor_corrector import PredictorCorrector
from mlem.solvers.underdamped_langevin import METHODS, UnderdampedLangevin
from tests.problems import COVARIANCE, MEAN, closed_family, gaussian

COSINE = NoiseSchedule.cosine()
pytestmark = pytest.mark.usefixtures("float64")


def point(t: float) -> GridPoint:
    return GridPoint.at(COSINE, t)


# --- the corrector -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("method", METHODS)
def test_the_corrector_keeps_the_law(method: str, t: float) -> None:
    """Mean and covariance of Gaussian data at noise level t, within 4 standard errors."""
    # in parallel it is what it is in turn (below), for every sample
    count, here, denoiser = 4000 if method == "parallel" else 20_000, point(t), gaussian(COSINE)
    covariance = COVARIANCE + here.kappa**2 * torch.eye(3)
    z = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    y = MEAN + z @ torch.linalg.cholesky(covariance).T

    def eps(y: Tensor, place: EvaluationPoint) -> Tensor:
        return denoiser(*model_input(COSINE, y, place))

    corrector = UnderdampedLangevin(time=2.0, step=0.1, method=method, rounds=20)
    after = corrector.correct(eps, y, here, 1.0, torch.arange(count), 0, 0)
    assert not torch.allclose(after, y)
    variances = covariance.diagonal()
    assert ((after.mean(0) - MEAN).abs() < 4 * (variances / count).sqrt()).all()
    error = ((torch.outer(variances, variances) + covariance**2) / count).sqrt()
    assert ((torch.cov(after.T) - covariance).abs() < 4 * error).all()


def test_the_corrector_brings_a_wrong_law_back() -> None:
    count, here, denoiser = 4000, point(0.6), gaussian(COSINE)
    y = MEAN + 3 * here.kappa * torch.randn(count, 3, generator=torch.Generator().manual_seed(0))

    def eps(y: Tensor, place: EvaluationPoint) -> Tensor:
        return denoiser(*model_input(COSINE, y, place))

    after = UnderdampedLangevin(time=20.0, step=0.1).correct(eps, y, here, 1.0, torch.arange(count), 0, 0)
    covariance = COVARIANCE + here.kappa**2 * torch.eye(3)
    ratio = torch.cov(after.T).diagonal() / covariance.diagonal()
    assert ((ratio - 1).abs() < 5 * math.sqrt(2 / count)).all()


def test_correctors_in_parallel_are_correctors_in_turn() -> None:
    """On the same noise, with as many rounds as steps."""
    here, denoiser = point(0.5), gaussian(COSINE)
    y = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))

    def eps(y: Tensor, place: EvaluationPoint) -> Tensor:
        return denoiser(*model_input(COSINE, y, place))

    both = [
        UnderdampedLangevin(1.0, 0.1, method=method, rounds=10).correct(eps, y, here, 0.5, torch.arange(10), 0, 3)
        for method in ("underdamped", "parallel")
    ]
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-10)


# --- predictor and corrector ---------------------------------------------------------------------------------------


def well_separated(d: int) -> tuple[Tensor, Tensor, MixtureDenoiser]:
    """Weights (3,), means (3, d) at distance 3 of the origin in random directions, and the denoiser; deviations 0.2."""
    means = torch.randn(3, d, generator=torch.Generator().manual_seed(0))
    weights, means = torch.tensor([0.2, 0.3, 0.5]), 3 * means / means.norm(dim=1, keepdim=True)
    return weights, means, MixtureDenoiser(COSINE, weights, means, torch.full((3,), 0.04))


@pytest.mark.parametrize("d", [2, 16, 64])
def test_mode_weights(d: int) -> None:
    """Within 4 standard errors of the truth."""
    count, (weights, means, denoiser) = 4000, well_separated(d)
    options: dict[str, Any] = {"schedule": COSINE, "shape": (d,), "indices": range(count), "batch_size": count}
    x = sample(denoiser, solver="predictor_corrector", steps=25, **options).x
    found = torch.bincount(torch.cdist(x, means).argmin(1), minlength=3) / count
    assert ((found - weights).abs() < 4 * (weights * (1 - weights) / count).sqrt()).all(), found


@pytest.mark.parametrize("predictor", ["randomized_midpoint", "parallel_midpoint"])
@pytest.mark.parametrize("corrector", METHODS)
def test_evaluations_are_counted(predictor: str, corrector: str) -> None:
    """Five corrections over ten steps, none of them at kappa = 0, the last at the last point that has noise."""
    solver = PredictorCorrector(predictor, corrector)
    sampler = Sampler(gaussian(COSINE), solver=solver, schedule=COSINE, shape=(3,), steps=10)
    result = sampler.run(range(4))
    most = solver.evaluations(sampler.points)
    assert (
        result.ledger.evaluations == most if predictor == "randomized_midpoint" else result.ledger.evaluations <= most
    )
    assert torch.equal(sampler.run([2]).x[0], result.x[2]) or torch.allclose(sampler.run([2]).x[0], result.x[2])


def test_corrections_come_after_stretches() -> None:
    kappas = [point(t).kappa for t in TimeGrid.make("ou_uniform", COSINE, 12).times]
    assert PredictorCorrector(every=4)._corrected(kappas) == [3, 7, 10]
    assert PredictorCorrector()._corrected(kappas) == [2, 5, 8, 10]
    by_time = PredictorCorrector(lipschitz=1.0)._corrected(kappas)
    ends = [0.5 * math.log1p(kappas[0] ** 2) - 0.5 * math.log1p(kappas[i + 1] ** 2) for i in by_time[:-1]]
    step = 0.5 * math.log1p(kappas[0] ** 2) / 11
    assert all(0 <= end - (n + 1) < step for n, end in enumerate(ends))
    solver = PredictorCorrector(lipschitz=1.0)
    sampler = Sampler(gaussian(COSINE), solver=solver, schedule=COSINE, shape=(3,), steps=12, grid="ou_uniform")
    promised = sampler.solver.evaluations(sampler.points)
    assert sampler.run(range(2)).ledger.evaluations == promised == 24 + 4 * len(by_time)


def test_a_drawn_plan_has_a_row_for_each_evaluation_but_none_is_searched() -> None:
    family = closed_family()
    plan = family.plan(probabilities=(1.0, 0.5, 0.2), estimator="jump")
    with pytest.raises(ValueError, match=r"^predictor_corrector is not linear in its noise estimates"):
        Sampler(family, solver="predictor_corrector", steps=5, plan=plan)


# --- Lipschitz constants -------------------------------------------------------------------------------------------


def test_the_estimate_of_gaussian_data_is_the_largest_curvature() -> None:
    """The score of x_t is linear, with matrix -(alpha^2 Sigma + sigma^2)^-1."""
    smallest = torch.linalg.eigvalsh(COVARIANCE)[0].item()
    for t, constant in estimate_lipschitz(lambda _: gaussian(COSINE), COSINE, (3,), iterations=40):
        alpha, sigma = COSINE.alpha(t).item(), COSINE.sigma(t).item()
        assert abs(constant * (alpha**2 * smallest + sigma**2) - 1) < 0.01


def test_constants_are_numbers_or_tables() -> None:
    here = point(0.5)
    variance = (here.alpha * here.kappa) ** 2
    assert Lipschitz.of(None).scaled(here) == 1.0
    assert Lipschitz.of(0.5).scaled(here) == 0.5 * variance
    assert Lipschitz.of(1e9).scaled(here) == 1.0
    assert abs(Lipschitz.of([(0.6, 0.1), (0.4, 0.4)]).scaled(here) / (0.2 * variance) - 1) < 1e-12
    for bad, message in (
        (0.0, "lipschitz must be a positive number, got 0.0"),
        (math.nan, "lipschitz must be a positive number, got nan"),
        ("big", r"lipschitz must be a positive number or a table of \(t, L\), got 'big'"),
        ([(0.4, 1.0), (0.6, 1.0)], "lipschitz: a table needs falling times t and positive constants"),
        ([(0.6, -1.0)], "lipschitz: a table needs falling times t and positive constants"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            Lipschitz.of(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": "ddim"}, "predictor must be one of randomized_midpoint, parallel_midpoint, got 'ddim'"),
        ({"corrector": "over"}, "corrector must be one of underdamped, midpoint, parallel, got 'over'"),
        ({"every": 0}, "every must be a whole number of steps >= 1, got 0"),
        ({"friction": 0.0}, "friction of the corrector must be a positive number, got 0.0"),
        ({"friction": -1}, "friction of the corrector must be a positive number, got -1"),
        ({"time": math.inf}, "time of the corrector must be a positive number, got inf"),
        ({"step": 2.0}, "step of the corrector must be at most its time 1, got 2"),
        ({"rounds": 0}, "rounds of the corrector must be a whole number >= 1, got 0"),
        ({"clock": "x"}, "clock must be one of kappa, ou, got 'x'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_solver("predictor_corrector", **options)
