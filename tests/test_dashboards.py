"""What W&B is told, read back from its files: every series, each step once, one run after a kill and on two ranks."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from mlem.files import read_json
from tests.commands import TINY, execute, metrics, succeed, succeed_ranks
from tests.test_loggers import records

AXIS = "trainer/global_step"
LEARN = (
    "model=coefficients",
    "trainer=cpu",
    "root=.",
    "family=family",
    "model.steps=4",
    "model.budget=0.6",
    "model.updates=6",
    "model.batch_size=2",
    "model.images=4",
    "model.draws=2",
    "model.held_out=4",
    "model.checkpoint_every=3",
    "evaluation.reference_steps=6",
)
TIMES = [f"t0.{digit}5" for digit in range(10)]
POINTS = [f"{sampler}@{steps}" for sampler, steps in (("ddpm", 2), ("ddpm", 3), ("dpm_solver_pp_karras", 2))]
SCORES = ("mse", "seconds_per_image", "evaluations", "fid_random256@5")


class Run:
    """All files of one W&B run: metric -> how often each step has it; config; names of files that were saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = sorted((folder / "wandb").glob("offline-run-*"))
        self.records = [record for file in self.files for record in records(file)]
        self.series: dict[str, Counter[int]] = {}
        for item in self.all("history"):
            for name in item["item"]:
                self.series.setdefault(name, Counter())[item["item"][AXIS]] += 1

    @property
    def summary(self) -> dict[str, Any]:
        return {name: value for one in self.all("summary") for name, value in one["update"].items()}

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]

    def check(self, *names: str, steps: list[int]) -> None:
        """Every one of these series is there, at these steps, once for each."""
        for name in names:
            assert self.series.get(name) == Counter(steps), name

    def check_whole(self) -> None:
        """Nothing is there twice; one run; its axis, config, commit and system figures are known; as metrics.jsonl."""
        for name, steps in self.series.items():
            assert name.startswith("_") or name in (AXIS, "epoch") or set(steps.values()) == {1}, name
        assert len({run["run_id"] for run in self.all("run")}) == 1
        defined = str(self.all("metric"))
        assert AXIS in defined
        assert "step_metric" in defined
        (config, *more) = [one["update"] for one in self.all("config") if "seed" in one["update"]]
        assert read_json(self.folder / "run.json")["commit"] in [one["commit"] for one in (config, *more)]
        assert {"data", "model", "schedule", "trainer", "version"} <= config.keys()
        assert any("memory" in name for stats in self.all("stats") for name in stats["item"])
        written: dict[str, set[int]] = {}
        for line in metrics(self.folder / "metrics.jsonl"):
            for name in line.keys() - {"step", "time", "epoch"}:
                written.setdefault(name, set()).add(line["step"])
        assert {name: set(self.series[name]) for name in written} == written


def test_training(trained: Path) -> None:
    run = Run(trained / "runs/tiny/unet_s")
    assert len(run.files) == 1
    run.check_whole()
    run.check("train/loss", "system/images_per_second", "system/memory_gib", steps=[1, 3])
    run.check("val/error", *(f"val/error_{time}" for time in TIMES), steps=[1, 3, 4])
    run.check(*(f"eval/s/{point}/{score}" for point in POINTS for score in (*SCORES, "calls_s")), steps=[1, 3])
    run.check("eval/grids.count", "eval/error_vs_time.count", steps=[1, 3])


def test_evaluation(trained: Path) -> None:
    """Error by noise level, error against time, FID against evaluations, calls of each level, samples side by side."""
    run = Run(trained / "runs/tiny")
    assert len(run.files) == 1
    run.check_whole()
    for level in ("xs", "s"):
        run.check(*(f"eval/{level}/{point}/{score}" for point in POINTS for score in SCORES), steps=[0])
        run.check(*(f"eval/{level}/{point}/calls_{level}" for point in POINTS), steps=[0])
        run.check(*(f"test/{level}/error_{time}" for time in TIMES), steps=[0])
    for figure in ("grids", "strips", "error_vs_time", "quality_vs_evaluations", "error_by_noise_level"):
        run.check(f"eval/{figure}.count", steps=[0])
    (shown,) = [item["item"] for item in run.all("history") if "eval/grids.count" in item["item"]]
    assert shown["eval/grids.captions"] == sorted(
        f"{level}_{point.replace('@', '_')}" for level in ("xs", "s") for point in POINTS
    )
    (aligned,) = [item["item"] for item in run.all("history") if "eval/strips.count" in item["item"]]
    assert aligned["eval/strips.captions"] == sorted(
        ["reference_ddpm", "reference_dpm_solver_pp", *shown["eval/grids.captions"]]
    )
    run.check("eval/samplers.nrows", steps=[0])
    assert run.summary["recommendation"].startswith("Nothing is recommended: this family is not calibrated.")
    assert run.summary["recommendation_command"] == "python -m mlem.multilevel calibrate runs/tiny/family"


def test_two_ranks_are_one_run(trained: Path, tmp_path: Path) -> None:
    options = ("evaluation.every_n_epochs=0", "evaluation.indices=0-3", "evaluation.reference_steps=2")
    samplers = "evaluation.samplers=[{solver:ddpm,steps:[2]}]"
    succeed_ranks("train", *TINY, *options, samplers, "root=.", f"data.folder={trained / 'data/digits'}", cwd=tmp_path)
    run = Run(tmp_path / "unet_xs")
    assert len(run.files) == 1
    run.check_whole()
    run.check("train/loss", "system/images_per_second", steps=[1, 3])
    run.check("val/error", *(f"val/error_{time}" for time in TIMES), steps=[1, 3, 4])


def test_a_killed_run_goes_on_as_the_same_run(trained: Path, tmp_path: Path) -> None:
    """Killed after steps that no checkpoint holds: they are computed again, and told once."""
    shutil.copytree(trained / "runs/tiny/family", tmp_path / "family")
    dying = "callbacks=[{_target_: tests.dying.Dying, at: 5}]"
    assert execute("train", *LEARN, dying, "allow=[tests]", cwd=tmp_path).returncode == -signal.SIGKILL
    home = tmp_path / "coefficients"
    Run(home).check("objective", steps=[0, 1, 2, 3, 4])
    assert "resuming from coefficients/checkpoints/step-00000003.ckpt" in succeed("train", *LEARN, cwd=tmp_path)
    run = Run(home)
    assert len(run.files) == 2
    run.check_whole()
    p = [f"p/s/t{time}" for time in ("0.05", "0.2", "0.35", "0.5", "0.65", "0.8", "0.95")]
    run.check("objective", "mse", "cost", "alpha/s", "beta/s", *p, steps=[0, 1, 2, 3, 4, 5])
    run.check("held_out/objective_after", "p/probabilities.count", steps=[6])
