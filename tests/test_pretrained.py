"""Families that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mlem import Family, sample
from mlem.pretrained import folder_of, pretrained
from tests.commands import run_here, run_in

MOST_MEGABYTES = 12.0
"""Of all of them together."""


def test_they_are_small_and_there() -> None:
    assert pretrained() == ["dead_leaves16", "digits_labels"]
    home = folder_of("pretrained:dead_leaves16").parent
    assert sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) < MOST_MEGABYTES * 1e6
    with pytest.raises(ValueError, match=r"^no family 'dead_leave16' comes with mlem; did you mean dead_leaves16\?$"):
        Family.load("pretrained:dead_leave16")


@pytest.mark.parametrize("name", pretrained())
def test_each_is_calibrated_and_computes_in_float32(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    family = Family.load(f"pretrained:{name}")
    assert {weight.dtype for level in family.levels for weight in level.network.parameters()} == {torch.float32}
    assert family.fitted.calibration_for(family).about["pilot_images"] >= 32
    assert (folder_of(f"pretrained:{name}") / f"level_{family.names[0]}" / "README.md").is_file()
    before = {path.name for path in folder_of(f"pretrained:{name}").iterdir()}
    choice = family.recommend(mse=3e-2)
    x = sample(family, indices=range(2), **choice.options).x
    truth = sample(family, solver="dpm_solver_pp", steps=60, indices=range(2)).x
    assert (x - truth).square().mean() < 0.15
    assert {path.name for path in folder_of(f"pretrained:{name}").iterdir()} == before


def test_the_command_line_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ["family=pretrained:dead_leaves16", "sampler=auto", "mse=0.05", "seeds=0-3"]
    printed = run_in(tmp_path, lambda: run_here("sample", *options))
    assert printed.startswith("recommended: ")
    assert len(list(tmp_path.glob("runs/dead_leaves16/samples/auto_*/0*.png"))) == 4  # not among the digits
