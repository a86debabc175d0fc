"""metrics.jsonl and W&B: everything is there once, and nothing that goes wrong there stops a run."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mlem.training.loggers import JSONLinesLogger, wandb_logger
from tests.commands import TINY, environment, execute, execute_code, succeed

OPTIONS = {"project": "mlem", "name": "test", "group": "tests"}


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No W&B key anywhere; afterwards no run is open."""
    import wandb

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    yield
    wandb.finish()


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(run: Path) -> list[dict[str, Any]]:
    """What an offline run holds, read back by W&B's own program."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(run)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def logged(run: Path) -> set[str]:
    """Names of all metrics of an offline run."""
    return {name for record in records(run) if record["type"] == "history" for name in record["history"]["item"]}


def test_lines_parse_and_not_a_number_is_null(tmp_path: Path) -> None:
    logger = JSONLinesLogger(tmp_path / "run" / "metrics.jsonl")
    logger.log_metrics({"a": 1.5, "b": float("nan"), "c": float("-inf"), "d": torch.tensor(2.0)}, step=3)  # type: ignore[dict-item]
    logger.log_metrics({"a": 0}, step=4)
    first, second = lines_of(logger.path)
    assert first.pop("time") > 1e9
    assert first == {"step": 3, "a": 1.5, "b": None, "c": None, "d": 2.0}
    assert (second["step"], second["a"]) == (4, 0)


def test_a_resume_drops_what_comes_again_and_what_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step, "x": step}) + "\n" for step in (0, 1, 1, 2, 3))
    path.write_text(whole + '{"step": 1, "x": 0.')
    JSONLinesLogger(path, 2).log_metrics({"x": 7}, step=2)
    assert [(line["step"], line["x"]) for line in lines_of(path)] == [(0, 0), (1, 1), (1, 1), (2, 7)]
    path.write_text('7\nnull\n\n{"x": 1}\n{"step": 0}\n')
    JSONLinesLogger(path, 1)
    assert lines_of(path) == [{"step": 0}]


def test_steps_rise_in_a_real_run(trained: Path) -> None:
    for level in ("xs", "s"):
        lines = lines_of(trained / f"runs/tiny/unet_{level}/metrics.jsonl")
        steps = [line["step"] for line in lines]
        assert steps == sorted(steps)
        names = [name for line in lines for name in line]
        for name in ("train/loss", "val/error", f"eval/{level}/ddpm@2/mse", "lr-AdamW"):
            assert name in names


def test_a_resumed_run_logs_nothing_twice(trained: Path, tmp_path: Path) -> None:
    options = [*TINY, "logger=jsonl", "metric=none", "training.epoch_steps=1", "evaluation.every_n_epochs=2"]
    options += [f"data.folder={trained / 'data/digits'}", "root=."]
    succeed("train", *options, cwd=tmp_path)
    run = tmp_path / "unet_xs"
    whole = lines_of(run / "metrics.jsonl")
    assert [line["step"] for line in whole if "train/loss" in line] == [0, 1, 2, 3]
    for path in [*run.glob("checkpoints/step-00000004.*"), run / "level/mlem.json"]:
        path.unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "train')
    assert "resuming from unet_xs/checkpoints/step-00000003.ckpt" in succeed("train", *options, cwd=tmp_path)
    again = lines_of(run / "metrics.jsonl")

    def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        measured = ("time", "seconds", "system/")
        return [{key: line[key] for key in line if not any(word in key for word in measured)} for line in lines]

    assert timeless(again) == timeless(whole)


def test_an_offline_run_holds_everything(trained: Path) -> None:
    (run,) = (trained / "runs/tiny/unet_s/wandb").glob("offline-run-*")
    names = logged(run)
    assert {
        "train/loss",
        "val/error",
        "eval/s/ddpm@2/mse",
        "eval/s/ddpm@2/fid_random256@5",
        "eval/grids.count",
    } <= names
    assert "trainer/global_step" in names
    (config,) = [record for record in records(run) if record["type"] == "config" and "training" in str(record)]
    assert "oc.env:MLEM_SECRET" in str(config)
    (last,) = (trained / "runs/tiny/wandb").glob("offline-run-*")
    assert {"test/xs/error", "eval/xs/ddpm@2/mse", "eval/s/ddpm@3/mse"} <= logged(last)


@pytest.mark.usefixtures("no_key")
def test_without_a_key_the_run_is_offline_and_its_id_is_kept(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        logger = wandb_logger(tmp_path, mode="auto", **OPTIONS)
        assert logger is not None
        assert logger.experiment.settings._offline
        ids.append(logger.experiment.id)
    assert ids[0] == ids[1] == json.loads((tmp_path / "wandb_run.json").read_text())["id"]


def test_other_modes(tmp_path: Path) -> None:
    assert wandb_logger(tmp_path, mode="disabled", **OPTIONS) is None
    with pytest.raises(ValueError, match=r"logger\.mode must be auto, online, offline or disabled, got 'on'"):
        wandb_logger(tmp_path, mode="on", **OPTIONS)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_key")
def test_wandb_that_cannot_start_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match=r"^W&B is off: it could not start \(.*\); metrics\.jsonl has everything$"):
        assert wandb_logger(tmp_path / "file", mode="offline", **OPTIONS) is None
    import wandb

    def refuse(**settings: Any) -> None:
        raise wandb.errors.CommError("no service")

    monkeypatch.setattr(wandb, "init", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert all(wandb_logger(tmp_path / "run", mode="offline", **OPTIONS) is None for _ in range(3))
    assert len(caught) == 1


def test_training_goes_on_without_wandb(trained: Path, tmp_path: Path) -> None:
    """W&B's own settings are bad here, in a way that it finds when it starts."""
    options = [
        *TINY,
        "metric=none",
        "training.steps=1",
        "training.epoch_steps=1",
        f"data.folder={trained / 'data/digits'}",
        "root=.",
    ]
    done = execute("train", *options, cwd=tmp_path, WANDB_X_STATS_SAMPLING_INTERVAL="often")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B is off: it could not start") == 1
    assert (tmp_path / "unet_xs/level/mlem.json").is_file()
    assert "train/loss" in (tmp_path / "unet_xs/metrics.jsonl").read_text()
    assert not list((tmp_path / "unet_xs").glob("wandb/offline-run-*"))


def test_wandb_that_dies_in_a_run_is_one_warning(tmp_path: Path) -> None:
    """In a process of its own, which ends W&B's process: its child."""
    code = """
import os, pathlib, signal, time
from mlem.training.loggers import wandb_logger
logger = wandb_logger(pathlib.Path("."), project="mlem", name="test", group="tests", mode="offline")
logger.log_metrics({"a": 1}, 1)
children = [int(pid) for path in pathlib.Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
assert children
for pid in children:
    os.kill(pid, signal.SIGKILL)
time.sleep(0.5)
for step in range(2, 5):
    logger.log_metrics({"a": step}, step)
print("went on")
"""
    done = execute_code(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "went on\n"
    assert done.stderr.count("W&B is off: the connection was lost (") == 1
