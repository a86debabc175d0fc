"""Ctrl-C and SIGTERM: one line that says what is kept and how to go on, the signal's status, nothing half-written."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mlem.cli.main import run
from mlem.comparison.lineup import Lineup
from tests.commands import (
    PLAIN,
    RANKS,
    REPOSITORY,
    environment,
    metrics,
    run_here,
    run_in,
    start,
    succeed,
    wait_until,
)
from tests.forkserver import Forked, children

RUN = Path("runs/digits/unet_xs")
TRAINING = (*PLAIN, "training.steps=100000", "training.epoch_steps=10", "training.checkpoint_every=100000")
SAMPLES = ("root=runs/tiny", "trainer=cpu", "level=xs", "batch_size=2")


def _end(process: Forked, number: int = signal.SIGINT, pids: tuple[int, ...] = ()) -> tuple[int | None, list[str]]:
    """Send the signal to the process and these others; its status, and what it says but for bars and warnings."""
    for pid in (*pids, process.pid):
        os.kill(pid, number)
    err = process.communicate(timeout=60)[1]
    return process.returncode, [line for line in err.splitlines() if not re.search("━|^Initializing distributed", line)]


def _logged(folder: Path, step: int) -> bool:
    return any((line.get("step") or 0) >= step for line in metrics(folder / RUN / "metrics.jsonl"))


@pytest.mark.parametrize("ranks", [(), RANKS], ids=["with workers", "on two ranks"])
def test_a_training_saves_and_says_so(tmp_path: Path, ranks: tuple[str, ...]) -> None:
    """As a terminal does it: the processes that it started get the signal too. The same command goes on."""
    options = (*TRAINING, *ranks, f"training.workers={0 if ranks else 1}")
    process = start("train", *options, cwd=tmp_path)
    wait_until(lambda: _logged(tmp_path, 9), process)
    status, lines = _end(process, pids=tuple(children(process.pid)))
    saved = max((tmp_path / RUN / "checkpoints").glob("*.ckpt"))
    kept = f"saved {saved.relative_to(tmp_path)}; the same command continues from there"
    assert (status, lines) == (130, [f"train.py: interrupted; {kept}"])
    assert not [*tmp_path.rglob(".*.tmp")]
    if not ranks:
        step = int(saved.stem.removeprefix("step-"))
        assert f"resuming from {saved.relative_to(tmp_path)}" in succeed(
            "train", *options, f"training.steps={step + 1}", "resume=force", cwd=tmp_path
        )


def test_a_training_removes_the_half_files_of_killed_ones(tmp_path: Path) -> None:
    half = tmp_path / RUN / "checkpoints" / ".step-00000002.ckpt.1-2.tmp"
    half.parent.mkdir(parents=True)
    half.touch()
    run_in(tmp_path, lambda: run_here("train", *PLAIN, "training.steps=1"))
    assert not half.exists()


def test_pressed_again_a_training_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing asks, as in a step that hangs."""

    def pressed(*arguments: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(Lineup, "add", pressed)
    monkeypatch.chdir(tmp_path)
    options = (*PLAIN, "training.steps=2", "training.epoch_steps=2", "evaluation.every_n_epochs=1")
    assert _status("train", options, monkeypatch) == 130


def _status(name: str, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended:
            run(name, lambda _: run_here(name, *options))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return ended.value.code


@pytest.mark.parametrize(("number", "word"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")])
def test_the_last_evaluation_heeds_signals(
    number: int,
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """That of the finished network, in which no checkpoint is due any more."""
    begun = []

    def signalled(*arguments: Any) -> None:
        begun.append(arguments)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(Lineup, "add", signalled)
    monkeypatch.chdir(tmp_path)
    options = (*PLAIN, "training.steps=2", "training.epoch_steps=2", "evaluation.batch_size=1")
    assert _status("train", options, monkeypatch) == 128 + number
    assert len(begun) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        said == f"train.py: {word}; saved {RUN}/checkpoints/step-00000002.ckpt; the same command continues from there"
    )
    assert (RUN / "level" / "mlem.json").exists()


def _started(folder: Path, module: str, *options: str) -> Forked:
    return Forked([str(REPOSITORY / "mlem" / module / "__main__.py"), *options], folder, environment())


def test_sampling_keeps_what_is_finished(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with start("sample", *SAMPLES, "steps=50", "seeds=0-999", f"out={out}", cwd=trained) as process:
        wait_until(lambda: len([*out.glob("*.png")]) >= 3, process)
        status, lines = _end(process)
    kept = f"finished images are kept in {out}; the same command makes the others"
    assert (status, lines) == (130, [f"sample.py: interrupted; {kept}"])
    assert not [*out.rglob(".*.tmp")]


def test_calibrating_leaves_the_family_as_it_was(made: tuple[Path, str], tmp_path: Path) -> None:
    family = tmp_path / "family"
    shutil.copytree(made[0] / "runs/digits/family", family)
    before = {path: path.read_bytes() for path in family.rglob("*") if path.is_file()}
    process = _started(tmp_path, "multilevel", "calibrate", "family", "--images", "64", "--reference-steps", "100000")
    wait_until(lambda: "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    wait_until(lambda: _seconds(process.pid) > 1, process)
    status, lines = _end(process)
    assert (status, lines) == (
        130,
        ["mlem.multilevel: interrupted; family is unchanged; the same command starts again"],
    )
    assert {path: path.read_bytes() for path in family.rglob("*") if path.is_file()} == before


def _seconds(pid: int) -> float:
    """Processor time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    "command", [["-m", "mlem.outputs", "verify", "runs"], ["sample.py", "eval=ref", "metric=fid_random256"]]
)
def test_a_command_that_is_still_importing_says_one_line(command: list[str]) -> None:
    pipe = subprocess.PIPE
    words = [sys.executable, *command]
    with subprocess.Popen(words, cwd=REPOSITORY, env=environment(), stderr=pipe, text=True) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while "libc10" not in maps.read_text():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode in (130, -signal.SIGINT)  # for the shell that is the same
    assert len(lines) == 1
    assert re.match(r"(sample.py: )?interrupted; ", lines[0])


TOOLS: dict[str, tuple[str, str]] = {
    "mlem.outputs.command": ("verify", "mlem.outputs.command.verify"),
    "mlem.report.command": ("", "mlem.report.command.write_report"),
    "mlem.runs": ("", "mlem.runs.runs"),
}


@pytest.mark.parametrize("module", TOOLS)
def test_every_tool_says_one_line(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, inner = TOOLS[module]

    def pressed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inner, pressed)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert importlib.import_module(module).main([*verb.split(), str(tmp_path)]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    (line,) = capsys.readouterr().err.splitlines()
    assert ": interrupted; " in line


def test_the_reason_of_a_failing_rank_is_said_before_it_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When it has left them, the launcher may end it at any moment."""
    said = []

    def work(job: Any) -> None:
        raise RuntimeError("the reason")

    monkeypatch.setattr(sys, "argv", ["sample.py", "seeds=0-1"])
    monkeypatch.setattr("mlem.cli.main.several", lambda: True, raising=False)
    monkeypatch.setattr("mlem.cli.main.leave", lambda: said.append(capsys.readouterr().err))
    with pytest.raises((SystemExit, RuntimeError)):
        run("sample", work)
    assert said[0].endswith("RuntimeError: the reason\n")
