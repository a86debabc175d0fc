"""Running the command line in tests: as a process, or composed here."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch.distributed import TCPStore

from mlem.cli.compose import compose, plain, without_secrets
from mlem.cli.options import read
from tests.forkserver import Forked

REPOSITORY = Path(__file__).resolve().parents[1]

TINY = [
    "model=unet_xs",
    "trainer=cpu",
    "data.held_out=16",
    "training.steps=4",
    "training.batch_size=8",
    "training.epoch_steps=2",
    "training.checkpoint_every=2",
    "training.warmup_steps=1",
    "evaluation.every_n_epochs=1",
    "evaluation.indices=0-4",
    "evaluation.batch_size=2",
    "evaluation.reference_steps=3",
    "calibration.images=0",
    "evaluation.samplers=[{solver:ddpm,steps:[2,3]},{solver:dpm_solver_pp,steps:[2],grid:karras}]",
]
"""A training that is over in seconds."""

PLAIN = (
    "model=unet_xs",
    "trainer=cpu",
    "logger=jsonl",
    "metric=none",
    "training.batch_size=16",
    "evaluation.every_n_epochs=0",
    "evaluation.indices=0-1",
    "evaluation.reference_steps=2",
    "calibration.images=0",
)
"""A training in which next to nothing is evaluated: add training.steps."""

TRAIN = (
    *TINY[1:],
    "model=family",
    "model.levels=[xs,s]",
    "logger=jsonl",
    "metric=none",
    "evaluation.every_n_epochs=0",
    "calibration.images=2",
    "calibration.times=4",
    "calibration.reference_steps=20",
    "evaluation.samplers=[{solver:ddpm,steps:[2]},{solver:ddpm,steps:[8],plan:{budget:0.6,cost:flops}}]",
)
"""A family of two levels, trained and calibrated in seconds."""

LIMIT = 540
"""Seconds of a command; on a busy machine, two ranks that take 25 s of processor time were seen to need 300."""

RANKS = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
STORES: list[TCPStore] = []

FOREIGN = re.compile(
    r"(SLURM|TORCHELASTIC|PMI|JSM_NAMESPACE)_.*|((LOCAL|GROUP|ROLE|NODE)_)?RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE"
    r"|MASTER_(ADDR|PORT)|FORCE_COLOR|TTY_(COMPATIBLE|INTERACTIVE)"
)
"""Variables of a cluster's job or of a terminal around the tests, which would change what they see."""


def environment(**extra: str) -> dict[str, str]:
    """No W&B key, one thread, this checkout, no cluster, no terminal."""
    own = re.compile(rf"WANDB.*|NETRC.*|{FOREIGN.pattern}")
    kept = {key: value for key, value in os.environ.items() if not own.fullmatch(key)}
    fixed = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "NETRC": "/nonexistent", "COLUMNS": "160"}
    fixed |= {"PYTHONFAULTHANDLER": "1"}  # where a process stands that is ended for taking too long
    return kept | fixed | extra


def start(script: str, *options: str, cwd: Path, **extra: str) -> Forked:
    """`python <script>.py options`, running, without the time of its imports."""
    return Forked([str(REPOSITORY / f"{script}.py"), *options], cwd, environment(**extra))


def execute(script: str, *options: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """`python <script>.py options`, to its end."""
    return finish(start(script, *options, cwd=cwd, **extra))


def finish(process: Forked) -> subprocess.CompletedProcess[str]:
    """Wait for its end."""
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def execute_code(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python -c code arguments`, to its end."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "code.py"
        script.write_text(textwrap.dedent(code))
        return finish(Forked([str(script), *arguments], cwd or Path(folder), environment()))


def start_ranks(script: str, *options: str, cwd: Path, **extra: str) -> list[Forked]:
    """The command on two gloo ranks, running, as torchrun starts it on one machine: without Lightning's launcher."""
    return [start(script, *options, *RANKS, cwd=cwd, **one, **extra) for one in rank_variables()]


def rank_variables() -> list[dict[str, str]]:
    """What torchrun adds to the environment of each of two ranks."""
    # where they meet: kept open here as torchrun does it, so that nobody else can take the port
    STORES.append(store := TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    about = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test"}
    about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    each = [about | {"RANK": rank, "LOCAL_RANK": rank} for rank in (0, 1)]
    return [{name: str(value) for name, value in one.items()} for one in each]


def succeed_ranks(script: str, *options: str, cwd: Path, **extra: str) -> str:
    """What the ranks print, the first before the second; both must end well."""
    done = [finish(process) for process in start_ranks(script, *options, cwd=cwd, **extra)]
    for one in done:
        assert one.returncode == 0, one.stderr
    return "".join(one.stdout for one in done)


def succeed(script: str, *options: str, cwd: Path, **extra: str) -> str:
    """What it prints; it must end well."""
    done = execute(script, *options, cwd=cwd, **extra)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_until(condition: Callable[[], bool], process: Forked, seconds: float = 240) -> None:
    """Poll until `condition` holds while `process` runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended first: {process.communicate()}"
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"not after {seconds} s")
        time.sleep(0.005)


def reached(checkpoints: Path, step: int) -> bool:
    """Whether a whole checkpoint of this step or of a later one is there."""
    return any(int(path.name.split(".")[0].removeprefix("step-")) >= step for path in checkpoints.glob("*.sha256"))


def metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def run_here(name: str, *options: str) -> Any:
    """The job itself, in this process."""
    work = getattr(importlib.import_module(f"mlem.cli.{name}"), name)
    return work(job(name, *options))


def configure(name: str, *options: str) -> DictConfig:
    """The composed config."""
    return compose(name, list(options))


def job(name: str, *options: str) -> Any:
    """The typed options of a command, not checked."""
    config = configure(name, *options)
    return read(plain(config), without_secrets(config))


def run_in(folder: Path, command: Callable[[], Any]) -> str:
    """What a command prints that is run in this process, from `folder`."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        command()
    return printed.getvalue()
