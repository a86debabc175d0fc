"""A search looks at what changes near a measurement that moves: the same numbers as looking at all."""

# pyright: reportPrivateUsage=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mlem.multilevel.holding import Holding
from mlem.multilevel.search import _Candidate, _moved, _Moving, _Search
from tests.waves import predictor

pytestmark = pytest.mark.usefixtures("float64_module")


@pytest.mark.parametrize("estimator", ["held", "hindsight"])
@pytest.mark.parametrize("order", [0, 1])
def test_a_move_changes_nothing_beyond_its_window(estimator: str, order: int) -> None:
    """What is computed near a measurement that moves, cost and deviations, is what computing all gives."""
    by, draws, tried = predictor("ddpm", 60), np.random.default_rng(0), 0
    one = _Search(by, ("1", "2", "3"), torch.tensor([0.1, 0.4, 1.0]), order, estimator, math.inf)
    for _ in range(220):
        table = draws.random((60, 3)) < draws.choice([0.1, 0.3, 0.7])
        table[0, 1:] |= draws.random() < 0.5
        table[:, 0] = True
        holding = Holding(order, draws.choice([None, 2.0]))
        before, cost = one._deviations(table[None], holding)[0], one._cost(table[None]).item()
        state = _Moving(_Candidate(table, None, 0.0), before, cost, by.covariance)
        row = int(draws.choice([draws.integers(60), draws.integers(6)]))
        place = row + int(draws.choice([-4, -2, -1, 1, 2, 4]))
        if 0 <= place < 60 and state.taken[row] and not state.taken[place]:
            moved, tried = _moved(table, row, place), tried + 1
            assert one._cost_after(state, row, place) == pytest.approx(one._cost(moved[None]).item(), abs=1e-9)
            change = one._change(state, row, [place], holding)
            after = before.copy()
            after[change.corrections[:, None], change.rows] += change.by[0]
            np.testing.assert_allclose(after, one._deviations(moved[None], holding)[0], atol=1e-12)
            gain = by.covariance.energy(after) - by.covariance.energy(before)
            assert state.gains(change)[0] == pytest.approx(gain, rel=1e-6, abs=1e-15)
    assert tried > 20
