"""The factored covariance of corrections, against the formula written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mlem.multilevel.calibration import LinearResponse
from mlem.multilevel.covariance import CorrectionCovariance, knot_weights

CORRECTIONS, KNOTS, ROWS = 3, 7, 60
Array = NDArray[np.float64]


def written_out(times: Array, knots: Array, found: LinearResponse) -> Array:
    """(C, R, C, R), pair by pair."""
    inner, rough = found.inner.numpy(), found.roughness.numpy()
    whole = np.zeros((CORRECTIONS, len(times), CORRECTIONS, len(times)))
    inside = np.clip(times, knots[0], knots[-1])
    for i, a in enumerate(inside):
        for j, b in enumerate(inside):
            m, n = (min(max(np.searchsorted(knots, x, side="right") - 1, 0), KNOTS - 2) for x in (a, b))
            s, r = (a - knots[m]) / (knots[m + 1] - knots[m]), (b - knots[n]) / (knots[n + 1] - knots[n])
            square = inner[:, m : m + 2, :, n : n + 2]
            whole[:, i, :, j] = np.einsum("a,kalb,b->kl", [1 - s, s], square, [1 - r, r])
            if m == n:
                change = square[:, 1, :, 1] - square[:, 0, :, 1] - square[:, 1, :, 0] + square[:, 0, :, 0]
                whole[:, i, :, j] += change * np.sqrt(rough[:, None] * rough) * (min(s, r) - s * r)
    return whole


@pytest.fixture(params=["rising", "falling", "shuffled", "far apart"])
def both(request: pytest.FixtureRequest) -> tuple[CorrectionCovariance, Array]:
    """Times in several orders, two of them equal, some beyond the knots and some on them; cells without any."""
    draws = np.random.default_rng(0)
    root = draws.normal(size=(CORRECTIONS * KNOTS, CORRECTIONS * KNOTS))
    inner = torch.from_numpy((root @ root.T).reshape(CORRECTIONS, KNOTS, CORRECTIONS, KNOTS))
    found = LinearResponse(inner, torch.ones(CORRECTIONS, KNOTS), torch.tensor([0.2, 0.7, 1.0]))
    knots = np.sort(draws.uniform(-4, 4, KNOTS))
    times = np.sort(draws.uniform(-5, 5, ROWS))
    times[10], times[20:23] = times[11], knots[1:4]
    times = {"rising": np.sort(times), "falling": np.sort(times)[::-1], "far apart": np.linspace(-5, 5, 3)}.get(
        request.param, draws.permutation(times)
    )
    return CorrectionCovariance(times, knots, found), written_out(times, knots, found)


def test_energy(both: tuple[CorrectionCovariance, Array]) -> None:
    factored, whole = both
    d = np.random.default_rng(1).normal(size=(2, 5, CORRECTIONS, whole.shape[1]))
    np.testing.assert_allclose(factored.energy(d), np.einsum("abkr,krls,abls->ab", d, whole, d), rtol=1e-12)


def test_times(both: tuple[CorrectionCovariance, Array]) -> None:
    factored, whole = both
    d = np.random.default_rng(1).normal(size=(CORRECTIONS, whole.shape[1]))
    np.testing.assert_allclose(factored.times(d), np.einsum("krls,ls->kr", whole, d), rtol=1e-10, atol=1e-10)


def test_parts(both: tuple[CorrectionCovariance, Array]) -> None:
    factored, whole = both
    corrections, rows = np.array([2, 0]), np.array([1, 0, 2]) * (whole.shape[1] // 3)
    part = whole[corrections][:, rows][:, :, corrections][..., rows]
    np.testing.assert_allclose(factored.block(corrections, rows), part, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(factored.at_same_row(), np.einsum("krlr->klr", whole), rtol=1e-12, atol=1e-12)


def test_knot_weights() -> None:
    knots = np.array([0.0, 1.0, 3.0])
    weights = knot_weights(np.array([-1.0, 0.25, 1.0, 2.0, 9.0]), knots)
    np.testing.assert_allclose(weights, [[1, 0, 0], [0.75, 0.25, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]])
