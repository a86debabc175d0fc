"""The coefficients of learned probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from mlem.multilevel.coefficients import CERTAIN, Coefficients, feature
from mlem.schedule import NoiseSchedule

COSINE = NoiseSchedule.cosine()


def test_the_feature_has_mean_0_and_variance_1_in_log_snr() -> None:
    """Over times whose log-SNR is uniform from t = 1/1000 to t = 1."""
    high, low = COSINE.log_snr(1 / 1000).item(), COSINE.log_snr(1.0).item()
    middles = low + (high - low) * (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    assert feature(COSINE, [1.0])[0].item() == pytest.approx(-math.sqrt(3), abs=1e-9)
    u = feature(COSINE, COSINE.time_from_log_snr(middles))
    assert u.mean().item() == pytest.approx(0, abs=1e-6)
    assert u.square().mean().item() == pytest.approx(1, abs=1e-5)


def test_coefficients_give_probabilities_and_are_fitted_back() -> None:
    times = [1.0, 0.7, 0.4, 0.1]
    found = Coefficients(torch.tensor([0.0, 0.8, -0.3]), torch.tensor([CERTAIN, 0.2, -1.0]))
    p = found.probabilities(COSINE, times)
    assert (p[:, 0] == 1).all()
    assert p[2, 1].item() == pytest.approx(1 / (1 + math.exp(-(0.8 * feature(COSINE, times)[2].item() + 0.2))))
    alpha, beta = Coefficients.fit(p, COSINE, times)
    torch.testing.assert_close(alpha, found.alpha, rtol=0, atol=1e-9)
    torch.testing.assert_close(beta, found.beta, rtol=0, atol=1e-9)


def test_delta_shifts_all_but_the_first_level() -> None:
    found = Coefficients(torch.tensor([0.5, 0.8]), torch.tensor([0.3, 0.2]))
    p, shifted = (found.probabilities(COSINE, [0.9, 0.2], delta) for delta in (0.0, 1.5))
    assert torch.equal(p[:, 0], shifted[:, 0])
    torch.testing.assert_close(torch.logit(shifted[:, 1]) - torch.logit(p[:, 1]), torch.full((2,), 1.5).double())
    assert (found.probabilities(COSINE, [0.5], -1000.0) > 0).all()


@pytest.mark.parametrize(
    ("alpha", "beta", "message"),
    [
        ([1.0], [1.0, 2.0], r"alpha and beta must be \(levels,\), got \(1,\) and \(2,\)"),
        ([[1.0]], [[1.0]], r"alpha and beta must be \(levels,\), got"),
        ([math.nan, 0.0], [1.0, 2.0], "alpha and beta must be finite; fit them again"),
        ([0.0, 0.0], [1.0, math.inf], "alpha and beta must be finite; fit them again"),
    ],
)
def test_bad_coefficients_are_refused(alpha: list[float], beta: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Coefficients(torch.tensor(alpha), torch.tensor(beta))


@pytest.mark.parametrize("field", ["alpha", "beta", "levels", "about"])
def test_damaged_coefficients_get_one_line(field: str) -> None:
    plain = Coefficients(torch.zeros(2), torch.ones(2)).to_dict()
    for other in ({key: plain[key] for key in plain if key != field}, plain | {field: 3}, plain | {field: None}):
        with pytest.raises(ValueError, match=r"^here is damaged \(.*\); fit them again: python train\.py model=coeff"):
            Coefficients.from_dict(other, "here")
