"""Where metrics go: JSON lines in the run folder, and W&B through Lightning's logger."""

from __future__ import annotations

import json
import math
import os
import secrets
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from mlem.files import first_process, read_json, write_json, write_text, writing

__all__ = ["ForgivingWandbLogger", "JSONLinesLogger", "log_pictures", "validated", "wandb_logger"]


class JSONLinesLogger(Logger):
    """One JSON object per line: `{"step": ..., "time": unix seconds, metric: value, ...}`. Steps count from 0.

    Args:
        path: of the file.
        resume_step: steps done before a resume. Lines of later steps, and of an interrupted validation after it, are
            dropped: the run writes them again.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int = 0) -> None:
        super().__init__()
        self.path = Path(path)
        self._drop_from(resume_step)

    @rank_zero_only
    def _drop_from(self, step: int) -> None:
        if self.path.exists():
            lines = _lines(self.path)
            kept = [line for line in lines if _step_of(line) < step]
            if not validated(self.path, step):
                kept = [line for line in kept if _step_of(line) < step - 1 or not _of_validation(line)]
            write_text(self.path, "".join(f"{line}\n" for line in kept))

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # NaN and infinity are not JSON
        plain = {key: value if math.isfinite(value := float(number)) else None for key, number in metrics.items()}
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "time": round(time.time(), 3), **plain}) + "\n")

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the resolved config is in config.yaml."""


def validated(path: Path, step: int) -> bool:
    """Whether this metrics.jsonl has the complete validation after `step` steps, whose last entry is its error."""
    lines = _lines(path) if path.exists() else []
    return any(_step_of(line) == step - 1 and "val/error" in json.loads(line) for line in lines)


def _lines(path: Path) -> list[str]:
    """The lines of a log, some of which may be damaged."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _of_validation(line: str) -> bool:
    return any(name.startswith(("val/", "eval/")) for name in json.loads(line))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"] or 0
    except (json.JSONDecodeError, KeyError, TypeError):  # cut short by a kill
        return math.inf


class ForgivingWandbLogger(WandbLogger):
    """Lightning's W&B logger; it gives up, with one warning, when W&B stops responding.

    Args:
        run: an open run.
        known: (step, metric) pairs that the run already has, from before a kill; they are not logged again.
    """

    def __init__(self, run: Any, known: Set[tuple[int, str]] = frozenset()) -> None:
        super().__init__(experiment=run)
        self._lost, self._known = False, known

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        fresh = {name: value for name, value in metrics.items() if (step, name) not in self._known}
        if self._lost or not fresh:
            return
        self._forgiving(lambda: super(ForgivingWandbLogger, self).log_metrics(fresh, step))

    def summarise(self, values: Mapping[str, str]) -> None:
        """Add these to the summary of the run."""
        if not self._lost:
            self._forgiving(lambda: self.experiment.summary.update(dict(values)))

    def _forgiving(self, tell: Callable[[], object]) -> None:
        try:
            tell()
        except Exception as error:  # whatever W&B does, training goes on
            self._lost = True
            warnings.warn(f"W&B is off: the connection was lost ({error}); metrics.jsonl has everything", stacklevel=3)


def log_pictures(loggers: Sequence[Any], pictures: Mapping[str, Path], step: int) -> None:
    """Log the PNG files that exist, under these names, with loggers that take images."""
    for logger in loggers:
        for name, path in pictures.items():
            if isinstance(logger, WandbLogger) and path.exists():
                logger.log_image(name, [str(path)], step)


def wandb_logger(
    folder: Path, *, project: str, name: str, group: str, mode: str, resume_step: int | None = None
) -> WandbLogger | None:
    """A W&B logger whose run id is kept in `folder`, so that a resumed run continues it.

    Args:
        folder: of the run.
        project: in W&B.
        name: of the run in W&B.
        group: in W&B.
        mode: "auto" (online when a key is present), "online", "offline" or "disabled".
        resume_step: what W&B already has of the step before this (its validation) and of later ones is not logged
            again; None: everything is logged.

    Returns:
        The logger; None if disabled or, with a warning, if W&B cannot start: that never stops a run.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in ("auto", "online", "offline", "disabled"):
        raise ValueError(f"logger.mode must be auto, online, offline or disabled, got {mode!r}")
    if mode == "disabled":
        return None
    if mode == "auto":
        mode = "online" if _has_key() else "offline"
    if not first_process():
        return WandbLogger(project=project)  # does nothing on other ranks
    try:
        import wandb

        wandb.finish()  # a run left open in this process would be taken over
        folder.mkdir(parents=True, exist_ok=True)
        known = frozenset() if resume_step is None else _known(folder, resume_step - 1)
        run = wandb.init(
            project=project,
            name=name,
            group=group,
            id=_run_id(folder),
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(x_transaction_log_flush_interval=1, init_timeout=30, console="off", silent=True),
        )
    except Exception as error:  # whatever W&B does, training goes on
        warnings.warn(f"W&B is off: it could not start ({error}); metrics.jsonl has everything", stacklevel=2)
        return None
    # Lightning sets the step axis of its own runs only; W&B's counter restarts with each resume
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return ForgivingWandbLogger(run, known)


def _known(folder: Path, step: int) -> frozenset[tuple[int, str]]:
    """(step, metric) pairs from `step` on in W&B's own files of the run in `folder`."""
    found: set[tuple[int, str]] = set()
    for path in folder.glob(f"wandb/*run-*-{_run_id(folder)}"):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        # a version that cannot read them: steps after the checkpoint are logged twice, which is harmless
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        items = [json.loads(line).get("history", {}).get("item", {}) for line in lines if line.startswith("{")]
        for item in items:
            at = item.get("trainer/global_step", -1)
            # a picture is logged as eval/grids.count, eval/grids.width, ...
            found |= {(at, one) for name in item for one in (name, name.rpartition(".")[0]) if at >= step}
    return frozenset(found)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="ignore")


def _run_id(folder: Path) -> str:
    path = folder / "wandb_run.json"
    if not path.exists():
        write_json(path, {"id": secrets.token_hex(4)})
    return read_json(path)["id"]
