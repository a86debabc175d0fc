"""The demo, made small, and the Python of the first tutorial, run on what it leaves."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlem import Family
from mlem.comparison.calls import read_calls
from mlem.comparison.recommended import Recommended
from mlem.files import read_json
from tests.commands import configure, metrics, succeed
from tests.test_dashboards import Run
from tests.test_notebooks import execute
from tests.test_your_own_family import blocks

SMALL = (
    "experiment=demo",
    "model.levels=[xs,s]",
    "training.steps=10",
    "training.epoch_steps=5",
    "training.batch_size=32",
    "evaluation.indices=0-7",
    "evaluation.reference_steps=10",
    "evaluation.samplers=[{solver:ddpm,steps:[10,20]},{solver:ddim,steps:[5]},{solver:dpm_solver_pp,steps:[5]},"
    "{solver:ddpm,steps:[20],plan:{budget:0.4,cost:flops}}]",
    "calibration.images=2",
    "calibration.times=4",
    "calibration.reference_steps=20",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, succeed("tests/few_pilots", *SMALL, cwd=folder)


def test_demo_leaves_what_it_promises(demo: tuple[Path, str]) -> None:
    folder, out = demo
    root = folder / "runs" / "demo"
    family = Family.load(root / "family")
    assert family.names == ["xs", "s"]
    rows = read_json(root / "evaluation.json")["rows"]
    *alone, shared = rows
    assert {(row["level"], row["sampler"], row["steps"]) for row in alone} == {
        (level, sampler, steps)
        for level in family.names
        for sampler, steps in (("ddpm", 10), ("ddpm", 20), ("ddim", 5), ("dpm_solver_pp", 5))
    }
    assert (shared["level"], shared["sampler"], shared["steps"]) == ("mlem", "ddpm_hindsight", 20)
    assert 0 < shared["flops_per_image"] <= 0.4 * 20 * family.level().flops * (1 + 1e-9)
    assert read_json(root / "family" / "calibration.json")["about"]["weights"] == family.weights_hash
    for row in alone:
        assert row["evaluations"] == row["steps"]
        assert 0 < row["network_seconds_per_image"] <= row["seconds_per_image"]
        # the reference from itself
        if (row["level"], row["sampler"], row["steps"]) == ("s", "ddpm", 10):
            assert row["mse"] == 0
    for picture in ("error_vs_time.png", "error_by_noise_level.png", "grids/s_ddpm_20.png"):
        with Image.open(root / picture) as image:
            image.verify()
    assert any("eval/s/ddpm@20/mse" in line for line in metrics(root / "metrics.jsonl"))
    assert any("val/error" in line for line in metrics(root / "unet_s" / "metrics.jsonl"))
    assert list(root.glob("wandb/offline-run-*/*.wandb"))
    for named in ("runs/demo/family", "error_vs_time.png", "samplers", "levels"):
        assert named in out


def test_demo_tells_wandb_what_to_run_and_shows_what_runs(demo: tuple[Path, str]) -> None:
    folder, out = demo
    root = folder / "runs" / "demo"
    found = Recommended.load(root / "recommendation.json")
    run = Run(root)
    said = run.summary["recommendation"]
    assert said in out
    if found.advice is None:
        assert said == "Nothing is recommended for this family."
    else:
        assert said.startswith(f"Run {found.advice.text}: ")
        assert run.summary["recommendation_command"] == (
            f"python sample.py family=runs/demo/family sampler=auto mse={found.advice.target:g}"
        )
    shown = [one.name for one in read_calls(root / "calls.json")]
    assert shown == ["ddpm_hindsight, 20 steps, budget0.4_flops"]
    run.check("eval/calls_along_trajectory.count", "eval/plan_probabilities.count", "eval/strips.count", steps=[0])
    page = (root / "report.html").read_text()
    assert f'<p class="first">{said}</p>' in page
    assert f"{shown[0]}: xs at " in page


def test_the_demo_itself_is_of_three_levels() -> None:
    assert configure("train", "experiment=demo").model.levels == ["xs", "s", "m"]


def test_the_first_tutorial_runs(
    demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(demo[0])
    names: dict[str, Any] = {}
    for block in blocks("docs/first_family.md"):
        exec(compile(block.replace("steps=200", "steps=40"), "docs/first_family.md", "exec"), names)
    with Image.open("levels.png") as image:
        assert image.width > 3 * image.height  # 8 columns, 2 levels
    *compared, smallest, largest = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"all levels: error \S+, \d+ MFLOPs per image, calls: xs \d+, s \d+", compared[0])
    assert re.fullmatch(r"the largest: error \S+, \d+ MFLOPs per image, calls: s 13", compared[2])
    assert re.fullmatch(r" xs [.1]{32}", smallest)
    assert re.fullmatch(r"  s [.1]*1[.1]*", largest)
    assert len(largest) == len(smallest)


def test_the_notebook_of_pictures_runs(demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo[0])
    names = execute("multilevel_in_pictures")
    assert names["runs"].shape == (32, 2)
    own, others = names["own"], names["others"]
    assert own.shape == (32, 16, 1, 8, 8)
    apart = {name: (x[-1] - own[-1]).square().mean() for name, x in others.items()}
    assert max(apart["held"], apart["hindsight"]) < apart["xs alone"]


def test_a_line_of_sampling_runs(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    succeed("sample", "sampler=ddpm", "steps=3", "seeds=0-5", cwd=folder)
    assert len(list((folder / "runs/digits/samples/ddpm_3").glob("0*.png"))) == 6
    assert os.path.exists(folder / "runs/digits/samples/ddpm_3/ledger.json")
