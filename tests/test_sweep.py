"""Sweeps (-m): every point, each with a folder of its own."""

from __future__ import annotations

import itertools
import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from mlem.cli.compose import sweep
from mlem.cli.main import refuse_one_folder
from tests.commands import execute, job, succeed


def test_a_sweep_runs_every_point(tmp_path: Path) -> None:
    printed = succeed("train", "-m", "model=unet_xs,unet_s", "seed=3", "dry_run=true", cwd=tmp_path)
    assert [printed.count(f"\n{size}: ") for size in ("xs", "s")] == [1, 1]
    assert not list(tmp_path.iterdir())
    done = execute("train", "-m", "training.steps=1,0", "dry_run=true", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")  # nothing was run


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        (
            "train",
            ["seed=0,1"],
            "-m: seed=0 and seed=1 both write to runs/digits/unet_s: give each its own folder",
        ),
        ("train", ["model=family,unet_m"], "with 'root=runs/${model.name}'"),
        (
            "train",
            ["model=unet_xs", "model.size=xs,s", "seed=0,1"],
            "seed=0 and seed=1 both write to runs/digits/unet_xs",
        ),
        (
            "sample",
            ["level=xs,s"],
            "both write to runs/digits/samples/ddim_50: give each its own folder, as with 'out=",
        ),
        ("sample", ["eval=scaling", "seed=0,1"], "seed=0 and seed=1 both write to runs/digits/scaling_law"),
        ("train", ["seed=0,1", "root=runs/${seed}"], None),
        ("train", ["seed=0,1", "dry_run=true"], None),
        ("train", ["model=unet_xs,unet_s"], None),
        ("sample", ["steps=10,20"], None),
        ("sample", ["seeds='0-3','4-7'", "format=png,npz"], None),
        ("sample", ["eval=folder", "folder=a,b"], None),
    ],
)
def test_jobs_of_a_sweep_have_their_own_folders(name: str, arguments: list[str], says: str | None) -> None:
    points = sweep(["-m", *arguments])
    jobs = [job(name, *point) for point in points]
    with nullcontext() if says is None else pytest.raises(ValueError, match=re.escape(says)):
        refuse_one_folder(points, jobs)


def test_a_sweep_spans_all_its_commas() -> None:
    jobs = sweep(["--multirun", "seed=0,1", "model=unet_xs", "training.learning_rate=1e-3,2e-3", "allow=[a,b]"])
    assert len(jobs) == 4
    pairs = [(job[0], float(job[2].split("=")[1])) for job in jobs]
    assert pairs == list(itertools.product(("seed=0", "seed=1"), (1e-3, 2e-3)))
    assert all(job[1] == "model=unet_xs" and job[3] == "allow=[a,b]" for job in jobs)
