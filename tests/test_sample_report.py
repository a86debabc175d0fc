"""What `sample.py` says of a plan's error: only what was predicted for this solver, grid, steps and weights."""

from __future__ import annotations

import pytest

from mlem.cli.sample import _report_plan
from mlem.family import Family
from mlem.sampling import Sampler
from tests.waves import family, plan

pytestmark = pytest.mark.usefixtures("float64_module")


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_kept_plan_is_judged_by_the_calibration_it_was_made_by(
    calibrated: bool, capsys: pytest.CaptureFixture
) -> None:
    kept = plan("ddpm", 8, budget=0.6)
    assert kept.about["predicted_mse"] > 0
    model = family() if calibrated else Family(family().levels)
    sampler = Sampler(model, solver="ddpm", steps=8, plan=kept)
    _report_plan(sampler.run([0, 1]).ledger, model, sampler)
    said = capsys.readouterr().out
    assert "it alone would make 8" in said
    assert ("predicted mean squared error" in said) is calibrated
