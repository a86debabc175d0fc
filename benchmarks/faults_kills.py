"""The kills part of `faults.py`: commands, in forked processes that need no imports, and their results."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlem.cli import main as commands
from mlem.cli import sample as sample  # imported before the fork
from mlem.cli import train as train
from mlem.data.command import main as data
from mlem.files import read_json
from mlem.multilevel.command import main as multilevel

TRAINING = (
    "train",
    "model=unet_xs",
    "trainer=cpu",
    "logger=jsonl",
    "metric=none",
    "training.steps=40",
    "training.batch_size=16",
    "training.epoch_steps=10",
    "training.checkpoint_every=3",
    "evaluation.every_n_epochs=0",
    "evaluation.indices=0-1",
    "evaluation.reference_steps=2",
    "evaluation.samplers=[{solver:ddpm,steps:[2]}]",
)
SAMPLING = ("sample", "root=runs/tiny", "trainer=cpu", "level=xs", "steps=10", "batch_size=4", "seeds=0-63", "out=out")


def _files(folder: Path, *patterns: str) -> dict[str, str]:
    paths = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _trained(folder: Path) -> Any:
    home = folder / "runs/digits/unet_xs"
    lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    numbers = [{key: line[key] for key in line if key.startswith(("step", "train/loss", "val/"))} for line in lines]
    return _files(home, "level/*.safetensors", "settings.json"), [line for line in numbers if len(line) > 1]


def _calibrated(folder: Path) -> Any:
    found = read_json(folder / "runs/tiny/family/calibration.json")
    return {key: value for key, value in found.items() if key not in ("seconds", "outside")}  # timings


@dataclass(frozen=True)
class Job:
    """A command, its prerequisites, and the results that no kill may change.

    Args:
        command: its name and options.
        needs: folders of the trained ones to start from.
        before: a command that is run first, undisturbed.
        left: (folder) -> results to compare.
    """

    command: Sequence[str]
    left: Callable[[Path], Any]
    needs: Sequence[str] = ()
    before: Sequence[str] | None = None


PREPARING = ("data", "dead_leaves", "--out", "made", "--size", "16", "--count", "600", "--shard-size", "100")
CALIBRATING = ("multilevel", "calibrate", "runs/tiny/family", "--images", "4", "--times", "6")
CALIBRATING = (*CALIBRATING, "--reference-steps", "60", "--batch-sizes", "2")
JOBS = {
    "training": Job(TRAINING, _trained, ("data",)),
    "preparing": Job(PREPARING, lambda folder: _files(folder / "made", "*.tar", "manifest.json")),
    "calibrating": Job(CALIBRATING, _calibrated, ("runs/tiny/family",)),
    "sampling": Job(
        SAMPLING,
        lambda folder: _files(folder / "out", "*.png", "manifest.json", "images.sha256"),
        ("data", "runs/tiny/family"),
    ),
    "packing": Job(
        (*SAMPLING, "format=shards"),
        lambda folder: _files(folder / "out", "shards/*.tar", "shards/manifest.json", "*.png"),
        ("data", "runs/tiny/family"),
        before=SAMPLING,
    ),
}


def kills(
    trained: Path, scratch: Path, count: int, seed: int, kinds: Sequence[str] = tuple(JOBS)
) -> Iterator[tuple[str, str, str]]:
    """Kill each kind of job in turn; kind, outcome and moment of each."""
    chance, whole = random.Random(seed), dict[str, tuple[Any, float]]()
    for number in range(count):
        kind = kinds[number % len(kinds)]
        job = JOBS[kind]
        if kind not in whole:
            begin = _begin(job, trained, scratch / "whole")
            started = time.monotonic()
            assert run(job.command, begin) == 0, (begin / "said.txt").read_text()
            whole[kind] = job.left(begin), time.monotonic() - started
        expected, duration = whole[kind]
        moment = chance.uniform(0, duration)
        folder = _begin(job, trained, scratch / "killed")
        run(job.command, folder, kill_after=moment)
        status = run(job.command, folder)
        outcome = f"exit {status}" if status else "equal" if job.left(folder) == expected else "another end"
        left = [path.name for path in folder.rglob(".*.tmp")]
        said = (folder / "said.txt").read_text().strip().splitlines()[-1:] if status else left
        yield kind, "left files" if outcome == "equal" and left else outcome, f"after {moment:.3f} s {said}"


def _begin(job: Job, trained: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for need in job.needs:
        shutil.copytree(trained / need, folder / need)
    if job.before is not None:
        assert run(job.before, folder) == 0, (folder / "said.txt").read_text()
    return folder


def run(command: Sequence[str], folder: Path, kill_after: float | None = None) -> int:
    """Run a command in a fork of this process, in `folder`, with its output in `said.txt`; return its status."""
    sys.stdout.flush()
    sys.stderr.flush()
    if (child := os.fork()) == 0:
        _become(command, folder)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


def _become(command: Sequence[str], folder: Path) -> None:
    code = 1
    try:
        os.setsid()  # leave Ctrl-C to the parent
        os.chdir(folder)
        said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        name, *options = command
        sys.argv = [f"{name}.py", *options]
        if name in ("train", "sample"):
            {"train": commands.train, "sample": commands.sample}[name]()
            code = 0
        else:
            code = {"data": data, "multilevel": multilevel}[name](options)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
