"""The coefficients of learned probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from mlem.multilevel.coefficients import CERTAIN, Coefficients, features
from mlem.schedule import NoiseSchedule

COSINE = NoiseSchedule.cosine()


def test_the_feature_has_mean_0_and_variance_1_in_log_snr() -> None:
    """Over times whose log-SNR is uniform from t = 1/1000 to t = 1."""
    high, low = COSINE.log_snr(1 / 1000).item(), COSINE.log_snr(1.0).item()
    middles = low + (high - low) * (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    assert features(COSINE, [1.0])[0, 0].item() == pytest.approx(-math.sqrt(3), abs=1e-9)
    u = features(COSINE, COSINE.time_from_log_snr(middles))[:, 0]
    assert u.mean().item() == pytest.approx(0, abs=1e-6)
    assert u.square().mean().item() == pytest.approx(1, abs=1e-5)


def test_coefficients_give_probabilities_and_are_fitted_back() -> None:
    times = [1.0, 0.7, 0.4, 0.1]
    found = Coefficients(torch.tensor([0.0, 0.8, -0.3]), torch.tensor([CERTAIN, 0.2, -1.0]))
    p = found.probabilities(COSINE, times)
    assert (p[:, 0] == 1).all()
    assert p[2, 1].item() == pytest.approx(1 / (1 + math.exp(-(0.8 * features(COSINE, times)[2, 0].item() + 0.2))))
    alpha, beta = Coefficients.fit(p, COSINE, times)
    torch.testing.assert_close(alpha, found.alpha, rtol=0, atol=1e-9)
    torch.testing.assert_close(beta, found.beta, rtol=0, atol=1e-9)


def test_knots_make_it_piecewise_linear() -> None:
    """Straight between the knots, of any shape that lines between them have, and found again."""
    times = COSINE.time_from_log_snr(torch.linspace(-9, 9, 40, dtype=torch.float64)).tolist()
    alpha = torch.tensor([[0.0] * 4, [2.0, -4.0, 1.5, 0.5]], dtype=torch.float64)
    found = Coefficients(alpha, torch.tensor([CERTAIN, -0.4]))
    p = found.probabilities(COSINE, times)
    u, logits = features(COSINE, times)[:, 0], torch.logit(p[:, 1])
    for slope, low, high in ((2.0, -2.0, -0.9), (-2.0, -0.8, -0.1), (-0.5, 0.1, 0.8), (0.0, 0.9, 2.0)):
        part = (u > low) & (u < high)
        torch.testing.assert_close(
            logits[part].diff() / u[part].diff(), torch.full((int(part.sum()) - 1,), slope).double()
        )
    fitted, beta = Coefficients.fit(p, COSINE, times, knots=3)
    torch.testing.assert_close(fitted, found.alpha, rtol=0, atol=1e-8)
    torch.testing.assert_close(beta, found.beta, rtol=0, atol=1e-8)
    again = Coefficients.from_dict(found.to_dict())
    assert torch.equal(again.probabilities(COSINE, times), p)


def test_delta_shifts_all_but_the_first_level() -> None:
    found = Coefficients(torch.tensor([0.5, 0.8]), torch.tensor([0.3, 0.2]))
    p, shifted = (found.probabilities(COSINE, [0.9, 0.2], delta) for delta in (0.0, 1.5))
    assert torch.equal(p[:, 0], shifted[:, 0])
    torch.testing.assert_close(torch.logit(shifted[:, 1]) - torch.logit(p[:, 1]), torch.full((2,), 1.5).double())
    assert (found.probabilities(COSINE, [0.5], -1000.0) > 0).all()


@pytest.mark.parametrize(
    ("alpha", "beta", "message"),
    [
        ([1.0], [1.0, 2.0], r"alpha must be \(levels,\) or \(levels, 1 \+ knots\) and beta .*, got \(1,\) and \(2,\)"),
        ([[1.0]], [[1.0]], r"alpha must be \(levels,\) or \(levels, 1 \+ knots\) and beta"),
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
