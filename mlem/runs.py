"""`python -m mlem.runs [ROOT]`: the training runs below a folder, their progress and results.

Finds run folders (those with `settings.json` and `config.yaml`) and reads their state from files alone.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlem.files import read_json
from mlem.invocation import called, command, interrupted

__all__ = ["Run", "main", "read_run", "runs"]

_RUN = {"settings.json", "config.yaml"}
_OTHER = {"settings.json", "family.json", "manifest.json"}  # folders of samples, families and data sets hold no runs
_RESULTS = ("level/mlem.json", "coefficients.json")  # files of a finished run


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        path: of the folder.
        state: "training" (its lock is held), "finished" or "interrupted".
        step: the last step logged or saved.
        steps: total training steps; None if the settings do not say.
        error: the lowest held-out denoising error; None before the first validation.
        fid: the lowest FID of the last evaluation; None without one.
        fid_name: sampler, protocol and number of samples of `fid`.
        bytes: size on disk.
        changed: time of the last change, in Unix seconds.
    """

    path: str
    state: str
    step: int
    steps: int | None
    error: float | None
    fid: float | None
    fid_name: str | None
    bytes: int
    changed: float


def runs(root: Path) -> list[Run]:
    """Every run in `root` and below, sorted by path."""
    return [read_run(folder) for folder in sorted(_run_folders(root))]


def read_run(folder: Path) -> Run:
    """The state of a run, from the files in its folder."""
    size, changed = _usage(folder)
    logged, error, fid_name, fid = _logged(folder / "metrics.jsonl")
    finished = any((folder / result).exists() for result in _RESULTS)
    state = "training" if _locked(folder / ".lock") else "finished" if finished else "interrupted"
    saved = [int(path.stem.removeprefix("step-")) for path in folder.glob("checkpoints/step-*.ckpt")]
    step = max([logged, *saved])
    return Run(str(folder), state, step, _steps(folder / "settings.json"), error, fid, fid_name, size, changed)


def _run_folders(root: Path) -> Iterator[Path]:
    with os.scandir(root) as found:
        entries = list(found)
    names = {entry.name for entry in entries}
    if names >= _RUN:
        yield root
    elif not names & _OTHER:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _run_folders(Path(entry.path))


def _usage(folder: str | Path) -> tuple[int, float]:
    """Bytes on disk and time of the last change of the files in `folder` and below.

    Files that vanish meanwhile are skipped; links are not followed.
    """
    size, changed, folders = 0, 0.0, [str(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        about = entry.stat(follow_symlinks=False)
                        size += about.st_blocks * 512
                        changed = max(changed, about.st_mtime)
        except FileNotFoundError:
            continue
    return size, changed


def _logged(path: Path) -> tuple[int, float | None, str | None, float | None]:
    """Last step, lowest held-out error, and name and value of the lowest FID of the last evaluation."""
    step, errors, fids = 0, [], {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            values: Any = json.loads(line)
        except json.JSONDecodeError:  # being written, or cut short by a kill
            continue
        if not isinstance(values, dict):
            continue
        step = max(step, values.get("step") or 0)
        if values.get("val/error") is not None:
            errors.append(values["val/error"])
        fids = {
            key: value for key, value in values.items() if re.search(r"/(fid|fd)_[\w-]+@\d+$", key) and value
        } or fids
    best = min(fids, key=fids.__getitem__, default=None)
    name = None if best is None else " ".join(best.removeprefix("eval/").rsplit("/", 1))
    return step, min(errors, default=None), name, None if best is None else fids[best]


def _steps(path: Path) -> int | None:
    try:
        settings = read_json(path)
        return settings["training"]["steps"] if "training" in settings else settings["model"]["updates"]
    except (ValueError, KeyError, TypeError):  # damaged: its own command says so
        return None


def _locked(path: Path) -> bool:
    """Whether a process holds the lock."""
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "now"


def _human(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _show(found: Sequence[Run], root: Path) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    long = [Column(header, overflow="fold") for header in ("run", "FID")]
    table = Table(long[0], "state", "step", "error", long[1], "size", "changed")
    for run in found:
        steps = "" if run.steps is None else f" of {run.steps}"
        error = "" if run.error is None else f"{run.error:.4g}"
        fid = "" if run.fid is None else f"{run.fid:.4g} ({run.fid_name})"
        name = os.path.relpath(run.path, root)
        changed = _ago(time.time() - run.changed)
        table.add_row(name, run.state, f"{run.step}{steps}", error, fid, _human(run.bytes), changed)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 if the folder does not exist."""
    parser = argparse.ArgumentParser(command("runs"), description="The training runs below a folder.")
    parser.add_argument("root", type=Path, nargs="?", default=Path("runs"), help="folder to search; default: runs")
    parser.add_argument("--json", action="store_true", help="print a list of objects: sizes in bytes, times in seconds")
    options = parser.parse_args(arguments)
    try:
        found = runs(options.root)
    except OSError as error:
        print(f"{called('runs')}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return interrupted("runs", "this command writes nothing")
    if options.json:
        print(json.dumps([asdict(run) for run in found], indent=2))
    elif found:
        _show(found, options.root)
    else:
        print(f"{options.root}: no runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
