"""`sample.py experiment=scaling_law`: the figure, both fits, plain warnings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mlem.comparison.scaling import ERRORS, draw_scaling, plain_fits, scaling_fits
from mlem.family import Family
from mlem.files import read_json
from mlem.level import Level
from mlem.multilevel.fitted import Fitted
from mlem.networks import unet
from mlem.schedule import NoiseSchedule
from tests.commands import run_here, run_in

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/demo/family: three levels with random weights, timed but not calibrated."""
    folder, schedule, shape = tmp_path_factory.mktemp("scaling"), NoiseSchedule.cosine(), (1, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        levels = [Level(size, unet(size, shape), schedule, shape, data="digits") for size in ("xs", "s", "m")]
    for number, level in enumerate(levels, 1):
        level.measured["seconds"] = 0.1 * number
    Family(levels).save(folder / "runs/demo/family")
    return folder


def test_the_command_writes_figure_and_numbers(folder: Path) -> None:
    options = ("experiment=scaling_law", "data.held_out=12", "eval.replicates=100", "eval.cost=seconds")
    printed = run_in(folder, lambda: run_here("sample", *options))
    out = folder / "runs/demo/scaling_law"
    assert (out / "scaling_law.png").read_bytes().startswith(b"\x89PNG")
    found = read_json(out / "scaling_law.json")
    assert (found["data"], found["images"], found["unit"]) == ("digits", 12, "seconds")
    fit = found["fits"]["denoising error - floor"]
    assert fit["levels"] == ["xs", "s", "m"]
    assert fit["costs"] == pytest.approx([0.1, 0.2, 0.3])
    assert "scaling law, denoising error - floor: " in printed
    assert "left out: level differences: this family has no calibration; measure it with: python -m mlem" in printed


@pytest.mark.parametrize("option", ["seeds=0-3", "budget=0.5", "batch_size=3", "metric=fid_random256"])
def test_options_of_samples_are_refused(folder: Path, option: str) -> None:
    with pytest.raises(ValueError, match=f"^eval=scaling does not use {option.split('=')[0]}=.*: leave it out$"):
        run_in(folder, lambda: run_here("sample", "experiment=scaling_law", option))


def test_another_data_set_is_refused(folder: Path) -> None:
    levels = Family.load(folder / "runs/demo/family").levels
    for level in levels:
        level.data = "leaves"
    Family(levels).save(folder / "other")
    with pytest.raises(ValueError, match=r"data=digits has images \(1, 8, 8\), but the family was trained on leaves"):
        run_in(folder, lambda: run_here("sample", "experiment=scaling_law", "family=other"))


def test_errors_that_do_not_level_off_are_warned_of(folder: Path, tmp_path: Path) -> None:
    family = Family.load(folder / "runs/demo/family")
    images = np.random.default_rng(0).gamma(50, 1 / 50, (3, 200))
    fits = scaling_fits(family, np.array([0.19, 0.16, 0.12])[:, None] * images, replicates=100)
    (said,) = draw_scaling(family, fits, 200, tmp_path / "law.png")
    assert said.startswith("warning: scaling law")
    assert said.endswith("; but the floor is at its bound, 0, so this gamma says little")


def test_a_calibration_of_other_weights_is_left_out(folder: Path) -> None:
    """A training that renewed a level, without calibration, ends with the fit of its errors."""
    family = Family.load(folder / "runs/demo/family")
    pretrained = Family.load("pretrained:dead_leaves16").fitted
    images = np.random.default_rng(0).gamma(50, 1 / 50, (3, 200))
    errors = np.array([0.19, 0.16, 0.12])[:, None] * images
    family.fitted = pretrained
    assert [*scaling_fits(family, errors, replicates=100)] == [ERRORS]
    family.fitted = Fitted(damaged={"calibration": "cut off"})
    with pytest.raises(ValueError, match="cut off"):
        scaling_fits(family, errors, replicates=100)


@pytest.mark.parametrize(("gamma", "warns"), [(1.5, True), (4.0, False)])
def test_a_small_gamma_is_warned_of(folder: Path, tmp_path: Path, gamma: float, warns: bool) -> None:
    family = Family.load(folder / "runs/demo/family")
    costs = np.array([level.flops for level in family.levels])
    images = np.random.default_rng(0).gamma(50, 1 / 50, (3, 200))
    fits = scaling_fits(family, (0.1 + (costs / costs[0]) ** (-2 / gamma))[:, None] * images, replicates=100)
    (said,) = draw_scaling(family, fits, 200, tmp_path / "law.png")
    assert said.startswith("warning: scaling law") == warns
    assert "the floor is at its bound" not in said
    plain = plain_fits(fits, family.names)["denoising error - floor"]
    assert plain["gamma"] == pytest.approx(gamma, rel=0.5)
    assert plain["gamma_plotted"] == plain["gamma"] / 2
