"""Which levels run along a trajectory: the numbers of a plan, in words and in figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mlem import NoiseSchedule, Plan
from mlem.comparison.calls import FIGURES, Calls, draw_calls, read_calls, write_calls
from mlem.solvers import GridPoint, make_solver

NAMES = ("xs", "s", "m")
MEASURED = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)


def calls_of(plan: Plan, name: str = "a plan") -> Calls | None:
    schedule, solver = NoiseSchedule.cosine(), make_solver("ddim")
    return Calls.of(name, plan, NAMES, solver, GridPoint.of(schedule, solver.grid(schedule, len(MEASURED))))


@pytest.fixture(scope="module")
def calls() -> Calls:
    found = calls_of(Plan.given(MEASURED, estimator="held"))
    assert found is not None
    return found


def test_they_are_those_of_the_plan(calls: Calls) -> None:
    plan = Plan.given(MEASURED, estimator="held")
    assert torch.tensor(calls.runs).equal(plan.runs)
    assert calls.times[0] == 1
    assert list(calls.times) == sorted(calls.times, reverse=True)
    assert len(calls.times) == len(MEASURED)


def test_where_no_coin_is_tossed_rates_add_up_to_the_measurements(calls: Calls) -> None:
    p = torch.tensor(calls.probabilities, dtype=torch.float64)
    torch.testing.assert_close(p.sum(0), MEASURED.sum(0).double())
    torch.testing.assert_close(p[:, 1], torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 1, 1], dtype=torch.float64))


def test_coins_have_their_own_probabilities() -> None:
    p = torch.tensor([[1.0, 0.5, 0.25]], dtype=torch.float64).expand(len(MEASURED), 3)
    found = calls_of(Plan.draw(p))
    assert found is not None
    assert torch.tensor(found.probabilities, dtype=torch.float64).equal(p)
    assert calls_of(Plan.draw(p, per_sample=True)) is None  # there is no one trajectory


def test_words_say_where_a_level_runs() -> None:
    found = calls_of(Plan.switching([0, 0, 2, 2, 2, 0, 2], NAMES), "a switch")
    assert found is not None
    assert found.text == "a switch: xs at 3: 1 to 2, 6; s at none of 7 evaluations; m at 4: 3 to 5, 7"


def test_they_are_read_back_and_drawn(calls: Calls, tmp_path: Path) -> None:
    write_calls(tmp_path / "calls.json", [calls])
    assert read_calls(tmp_path / "calls.json") == [calls]
    assert read_calls(tmp_path / "others.json") == []
    draw_calls([calls], tmp_path)
    for name in FIGURES:
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 1000
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_calls([], tmp_path)
