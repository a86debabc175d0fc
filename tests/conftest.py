"""Fixtures that every test shares."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mlem.multilevel import pilot
from tests.commands import FOREIGN, TINY, TRAIN, run_here, run_in, succeed

for variable in filter(FOREIGN.fullmatch, [*os.environ]):
    del os.environ[variable]  # Lightning, imported later, would read them
os.environ["COLUMNS"] = "160"
torch.set_num_threads(1)
# A shell starts its background jobs with SIGINT ignored, and what we start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def float64() -> Iterator[None]:
    """Default dtype float64 within the test: samples, noise and new networks are in it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def float64_module() -> Iterator[None]:
    """Default dtype float64 and no gradients within the module: `usefixtures("float64_module")`."""
    torch.set_default_dtype(torch.float64)
    with torch.no_grad():
        yield
    torch.set_default_dtype(torch.float32)


def made_once(request: pytest.FixtureRequest, name: str, make: Callable[[Path], str]) -> Path:
    """A folder that `make` filled, for the first process of the suite that asks; each has a copy of its own.

    What `make` prints lies in printed.txt.
    """
    own: Path = request.getfixturevalue("tmp_path_factory").getbasetemp()
    shared = own.parent if hasattr(request.config, "workerinput") else own  # of all processes of xdist
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / name / "printed.txt").exists():
            shutil.rmtree(shared / name, ignore_errors=True)  # of a process that failed
            (shared / name).mkdir()
            printed = make(shared / name)
            (shared / name / "printed.txt").write_text(printed)
    return shared / name if shared == own else shutil.copytree(shared / name, own / name, symlinks=True)


SECRET = "xyzzy-0123456789"


@pytest.fixture(scope="session")
def trained(request: pytest.FixtureRequest) -> Path:
    """A folder where `train.py` made data/digits and the family runs/tiny (xs, s), with a secret in its options."""
    options = [*TINY[1:], "model=family", "model.levels=[xs,s]", "root=runs/tiny", "data.held_out=16"]
    options += ["callbacks=[{_target_: lightning.pytorch.callbacks.LearningRateMonitor}]"]
    options += [
        "allow=['${oc.env:MLEM_SECRET}','a ${oc.env:MLEM_SECRET} b','${allow.0}','${oc.${logger.project}:MLEM_SECRET}']"
    ]
    options += ["logger.project=env"]
    make = functools.partial(succeed, "train", *options, MLEM_SECRET=SECRET)
    return made_once(request, "trained", lambda folder: make(cwd=folder))


FEWER = {"ode": (4, 8, 16, 20, 32), "sde": (8, 32, 64)}
"""Step counts at which `made` is measured, a quarter of those of any other family."""


@pytest.fixture(scope="session")
def made(request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A folder in which `train.py model=family` made and calibrated runs/digits/family, and what was printed."""

    def make(folder: Path) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pilot, "STEPS", FEWER)  # for speed
            patch.setattr(pilot, "PAYS", 0.0)  # whatever the times, all kinds of reuse
            return run_in(folder, lambda: run_here("train", *TRAIN))

    folder = made_once(request, "made", make)
    return folder, (folder / "printed.txt").read_text()


@pytest.fixture
def here(made: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `made`, as the current one. Files with another family have their own."""
    monkeypatch.chdir(made[0])
    return made[0]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder for samples, not there yet."""
    return tmp_path / "out"


FIRST = (
    *("resume", "ddp", "benchmarks_midpoints", "inception", "multilevel_command", "cli", "interrupted"),
    *("coefficients_command", "packaging", "solvers", "demo", "checkpoints", "data_archives", "contributing"),
    *("dashboards", "sampling"),
)
"""Files that take longest, which begin before all others."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: with --dist loadfile, one that began last would be waited for."""
    rank = {f"test_{name}": number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(FIRST)))
