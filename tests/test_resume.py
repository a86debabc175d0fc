"""Exact resume: runs that are really killed end with the bits of a run that was not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from mlem.comparison.lineup import Lineup
from mlem.files import read_json
from tests.commands import PLAIN, metrics, reached, run_here, run_in, start, succeed, wait_until
from tests.forkserver import Forked

# shuffling, dropout, gradient accumulation and two loader workers
OPTIONS = (
    *PLAIN,
    "model.dropout=0.2",
    "training.steps=60",
    "training.epoch_steps=16",
    "training.checkpoint_every=5",
    "training.accumulate=2",
    "training.workers=2",
    "training.warmup_steps=10",
)
RUN = Path("runs/digits/unet_xs")


def _last_checkpoint(folder: Path) -> dict[str, Any]:
    paths = sorted((folder / RUN / "checkpoints").glob("*.ckpt"))
    assert paths[-1].name == "step-00000060.ckpt"
    return torch.load(paths[-1], weights_only=True)


def _assert_same(a: Any, b: Any, place: str = "") -> None:
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert list(a) == list(b), place
        for key in a:
            _assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            _assert_same(one, other, f"{place}[{number}]")
    else:
        assert a == b, place


def _curves(folder: Path) -> dict[tuple[int, str], float]:
    """Every value that training logged, by step and name; a value logged twice fails."""
    found: dict[tuple[int, str], float] = {}
    for line in metrics(folder / RUN / "metrics.jsonl"):
        for name, value in line.items():
            if name.startswith(("train/", "val/")):
                assert (line["step"], name) not in found, f"{name} twice at step {line['step']}"
                found[line["step"], name] = value
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    succeed("train", *OPTIONS, cwd=folder)
    return folder


def _assert_equal_runs(folder: Path, undisturbed: Path) -> None:
    ours, theirs = _last_checkpoint(folder), _last_checkpoint(undisturbed)
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        _assert_same(ours[key], theirs[key], key)
    assert ours["global_step"] == theirs["global_step"] == 60
    weights = RUN / "level" / "diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (undisturbed / weights).read_bytes()
    assert _curves(folder) == _curves(undisturbed)


def test_killed_at_three_points(tmp_path: Path, undisturbed: Path) -> None:
    """SIGKILL at a checkpoint just begun, in mid-epoch, and while validating or just after."""
    checkpoints = tmp_path / RUN / "checkpoints"

    def being_written() -> bool:
        return any(checkpoints.glob(".step-*.tmp")) or any(checkpoints.glob("step-*.ckpt"))

    def in_mid_epoch() -> bool:
        return reached(checkpoints, 25)

    def after_validation() -> bool:
        lines = metrics(tmp_path / RUN / "metrics.jsonl")
        return any(line["step"] >= 47 and "val/error" in line for line in lines)

    for moment in (being_written, in_mid_epoch, after_validation):
        process = start("train", *OPTIONS, cwd=tmp_path)
        wait_until(moment, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    out = succeed("train", *OPTIONS, cwd=tmp_path)
    assert "resuming from" in out
    _assert_equal_runs(tmp_path, undisturbed)


def _wait_for(step: int, folder: Path, process: Forked) -> None:
    wait_until(lambda: any(line.get("step", 0) >= step for line in metrics(folder / RUN / "metrics.jsonl")), process)


def test_sigterm_saves_and_exits_143(tmp_path: Path, undisturbed: Path) -> None:
    """The process saves at the end of the step, exits with 143, and the same command goes on: sent once, then twice."""
    for times, step, epoch in ((1, 19, 16), (2, 33, 32)):
        process = start("train", *OPTIONS, "training.checkpoint_every=1000", cwd=tmp_path)
        _wait_for(step, tmp_path, process)
        for _ in range(times):
            process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 143, err
        saved = sorted(path.name for path in (tmp_path / RUN / "checkpoints").glob("*.ckpt"))
        assert saved[0] == f"step-{epoch:08d}.ckpt"  # of the end of the epoch
        assert len(saved) == 2
        assert f"step-{step:08d}.ckpt" <= saved[1] < "step-00000060.ckpt"
    succeed("train", *OPTIONS, cwd=tmp_path)
    _assert_equal_runs(tmp_path, undisturbed)


def test_a_finished_run_is_left_alone(undisturbed: Path) -> None:
    level = undisturbed / RUN / "level" / "mlem.json"
    before = level.stat().st_mtime_ns
    assert "already trained" in succeed("train", *OPTIONS, cwd=undisturbed)
    assert level.stat().st_mtime_ns == before


EPOCHS = (
    *PLAIN,
    "training.steps=24",
    "training.epoch_steps=8",
    "training.checkpoint_every=8",
    "training.accumulate=2",
    "training.warmup_steps=1",
    "evaluation.every_n_epochs=2",
    "evaluation.indices=0-3",
    "evaluation.batch_size=2",
    "evaluation.samplers=[{solver:ddpm,steps:[2]}]",
    "allow=[tests]",
)
"""Every checkpoint is at the end of an epoch, as by default; evaluated after 16 steps."""


def _measured(folder: Path) -> dict[tuple[int, str], float]:
    """What validations in training and the evaluation logged, but for times; a value logged twice fails."""
    found: dict[tuple[int, str], float] = {}
    for line in metrics(folder / RUN / "metrics.jsonl"):
        if "val/error" in line and line["step"] < 24:
            line["val/epoch"] = line["epoch"]
        for name, value in line.items():
            if name.startswith(("val/", "eval/")) and not name.endswith("seconds_per_image"):
                assert (line["step"], name) not in found, f"{name} twice at step {line['step']}"
                found[line["step"], name] = value
    return found


def _last_seconds(folder: Path) -> float:
    path = max((folder / RUN / "checkpoints").glob("*.ckpt"))
    return torch.load(path, weights_only=True)["callbacks"]["Checkpoints"]["seconds"]


def test_no_validation_is_missing_or_there_twice(tmp_path: Path) -> None:
    """Ended in, before and after validations: the resumed run makes up for what is missing, and for no more."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()  # type: ignore[func-returns-value]
    run_in(whole, lambda: run_here("train", *EPOCHS))
    ends = (
        ("hook: on_validation_batch_start, at: 8, signalled: true", SystemExit, 8),
        ("hook: on_train_batch_start, at: 12", RuntimeError, 8),
        ("hook: on_validation_epoch_end, at: 16", RuntimeError, 16),  # evaluated, but not yet validated
        ("hook: on_validation_end, at: 16", RuntimeError, 16),  # nothing is pending
        ("hook: on_train_batch_end, at: 18, signalled: true", SystemExit, 18),
        ("hook: on_validation_start, at: 24", RuntimeError, 24),  # nothing is left to train
        ("hook: on_train_end, at: 24", RuntimeError, 24),
    )
    for options, kind, last in ends:
        ending = f"callbacks=[{{_target_: tests.dying.Ending, {options}}}]"
        with pytest.raises(kind) as ended:
            run_in(parts, lambda ending=ending: run_here("train", *EPOCHS, ending))
        assert kind is RuntimeError or ended.value.code == 143  # type: ignore[union-attr]
        assert max((parts / RUN / "checkpoints").glob("*.ckpt")).name == f"step-{last:08d}.ckpt", options
    before = _last_seconds(parts)
    assert before > 0
    run_in(parts, lambda: run_here("train", *EPOCHS))
    assert read_json(parts / RUN / "level" / "mlem.json")["measured"]["training_seconds"] > before
    assert _measured(parts) == _measured(whole)
    assert {step for step, name in _measured(whole) if name == "val/error"} == {7, 15, 23, 24}
    assert {step for step, name in _measured(whole) if name.startswith("eval/")} == {15}
    weights = RUN / "level" / "diffusion_pytorch_model.safetensors"
    assert (parts / weights).read_bytes() == (whole / weights).read_bytes()


def test_sigterm_between_batches_of_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def signalled(*arguments: Any) -> None:
        begun.append(arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Lineup, "add", signalled)
    with pytest.raises(SystemExit) as ended:
        run_in(tmp_path, lambda: run_here("train", *EPOCHS))
    assert ended.value.code == 143
    assert len(begun) == 1
    assert (tmp_path / RUN / "checkpoints" / "step-00000016.ckpt.sha256").exists()
