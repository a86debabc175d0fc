"""Fixtures that every test shares."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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


SECRET = "xyzzy-0123456789"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where `train.py` made data/digits and the family runs/tiny (xs, s), with a secret in its options."""
    folder = tmp_path_factory.mktemp("trained")
    options = [*TINY[1:], "model=family", "model.levels=[xs,s]", "root=runs/tiny", "data.held_out=16"]
    options += ["callbacks=[{_target_: lightning.pytorch.callbacks.LearningRateMonitor}]"]
    options += [
        "allow=['${oc.env:MLEM_SECRET}','a ${oc.env:MLEM_SECRET} b','${allow.0}','${oc.${logger.project}:MLEM_SECRET}']"
    ]
    printed = succeed("train", *options, "logger.project=env", cwd=folder, MLEM_SECRET=SECRET)
    (folder / "printed.txt").write_text(printed)
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which `train.py model=family` made and calibrated runs/digits/family, and what was printed."""
    folder = tmp_path_factory.mktemp("multilevel")
    return folder, run_in(folder, lambda: run_here("train", *TRAIN))


@pytest.fixture
def here(made: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `made`, as the current one. Files with another family have their own."""
    monkeypatch.chdir(made[0])
    return made[0]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder for samples, not there yet."""
    return tmp_path / "out"


FIRST = ("resume", "data_archives", "demo", "dashboards", "coefficients_command", "learn", "contributing", "ddp")
"""Files that take longest, which begin before all others."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: with --dist loadfile, one that began last would be waited for."""
    rank = {f"test_{name}": number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(FIRST)))
