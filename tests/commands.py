"""Running train.py and sample.py as a user does: real processes, in a folder of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]

TINY = (
    "model=unet_xs",
    "trainer=cpu",
    "logger=jsonl",
    "metric=none",
    "training.batch_size=16",
    "evaluation.every_n_epochs=0",
    "evaluation.indices=0-1",
    "evaluation.reference_steps=2",
)
"""The smallest training: add training.steps."""


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child: this checkout, one thread, no W&B key."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return own | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | extra


def start(script: str, *options: str, folder: Path, **extra: str) -> subprocess.Popen[str]:
    """Start `script` with `folder` as the working folder."""
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / script), *options],
        cwd=folder,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script: str, *options: str, folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `script` to its end."""
    process = start(script, *options, folder=folder, **extra)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def succeed(script: str, *options: str, folder: Path, **extra: str) -> str:
    """Run `script`, insist that it succeeds, and give its standard output."""
    done = run(script, *options, folder=folder, **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Poll until `condition` holds while `process` runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended first: {process.communicate()}"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.005)


def metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
