"""The message of a command ended by a signal: what is kept, and how to continue."""

from __future__ import annotations

import signal
from pathlib import Path

from mlem.cli.paths import out_folder, run_folder
from mlem.cli.schema import Learning, Sample, Train
from mlem.invocation import INTERRUPTED

__all__ = ["kept", "signal_of"]


def signal_of(error: BaseException) -> str | None:
    """How a signal ended the work, in a word; None if none did.

    Lightning turns Ctrl-C into `sys.exit(1)`; a training that has saved exits with 128 and the signal's number.
    """
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return "interrupted"
    code = error.code if isinstance(error, SystemExit) else None
    return {INTERRUPTED: "interrupted", 128 + signal.SIGTERM: "terminated"}.get(code) if isinstance(code, int) else None


def kept(job: Train | Sample | None) -> str:
    """What an interrupted job leaves, from the files alone; None: no job had started."""
    if job is None:
        return "nothing was started"
    if isinstance(job, Sample):
        return _of_samples(job)
    saved = _newest_checkpoint(_runs(job))
    if saved is None:
        return "there is no checkpoint yet; prepared data are kept, the same command continues"
    return f"saved {saved}; the same command continues from there"


def _of_samples(job: Sample) -> str:
    if job.eval.name == "samples":
        return f"finished images are kept in {out_folder(job)}; the same command makes the others"
    if job.eval.name == "benchmark":
        return f"finished rows are kept in {out_folder(job)}; the same command measures the others"
    return "nothing was written; the same command starts again"


def _runs(job: Train) -> list[Path]:
    if isinstance(job.model, Learning):
        return [Path(job.root) / "coefficients"]
    return [run_folder(job, size) for size in job.model.sizes]


def _newest_checkpoint(folders: list[Path]) -> Path | None:
    """The newest complete checkpoint of the last run that has any."""
    for folder in reversed(folders):
        if sums := sorted(folder.glob("checkpoints/step-*.ckpt.sha256")):
            return sums[-1].with_suffix("")
    return None
