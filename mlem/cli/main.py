"""`train.py` and `sample.py`: compose the config, report mistakes in one line, run the job.

Heavy imports wait until the options are known to be valid.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from omegaconf.errors import OmegaConfBaseException

from mlem.cli.choices import groups
from mlem.cli.compose import compose, plain, sweep, without_secrets
from mlem.cli.errors import stop
from mlem.cli.interrupts import kept, signal_of
from mlem.cli.options import check, read
from mlem.cli.paths import folders, same_job
from mlem.cli.ranks import leave, several
from mlem.cli.schema import Sample, Train
from mlem.cli.usage import usage
from mlem.files import first_process
from mlem.invocation import INTERRUPTED, called, in_words_of_the_user

__all__ = ["job_of", "refuse_one_folder", "run", "sample", "train"]


def train() -> None:
    """`python train.py ...`"""

    def work(job: Any) -> None:
        from mlem.cli.train import train

        train(job)

    run("train", work)


def sample() -> None:
    """`python sample.py ...`"""

    def work(job: Any) -> None:
        from mlem.cli.sample import sample

        sample(job)

    run("sample", work)


def run(name: str, work: Callable[[Any], object]) -> None:
    """Run every job of the command line. A mistake gives one line and exit status 2."""
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        print(usage(name))
        return
    debug = "debug=true" in (argument.lower() for argument in arguments)
    job = None
    try:
        points = sweep(arguments)
        # before torch is imported, and all jobs before the first is run
        jobs = [job_of(name, overrides) for overrides in points]
        refuse_one_folder(points, jobs)
        for job in jobs:
            work(job)
    except (ValueError, OSError, FloatingPointError, OmegaConfBaseException) as error:
        if debug:
            raise
        stop(name, str(error).split("\n    full_key")[0])
    except (KeyboardInterrupt, SystemExit) as error:
        if (how := signal_of(error)) is None:
            raise
        _end(name, how, error, job)
    except Exception as error:
        if not several():
            raise
        # printed before this rank leaves the others: the launcher may kill it before Python prints the error
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(1) from None
    finally:
        leave()


def _end(name: str, how: str, error: BaseException, job: Train | Sample | None) -> NoReturn:
    """Exit with the status of the signal; the first rank prints what is kept."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process is ending: a second Ctrl-C would only add a traceback
    if first_process():
        print(f"{called(name)}: {how}; {in_words_of_the_user(kept(job))}", file=sys.stderr, flush=True)
    code = error.code if isinstance(error, SystemExit) else None
    raise SystemExit(code if isinstance(code, int) and code > 128 else INTERRUPTED) from None


def job_of(name: str, overrides: list[str]) -> Train | Sample:
    """The job described by these overrides, checked as far as possible without torch."""
    config = compose(name, overrides)
    options = plain(config)
    check(options)
    return read(options, without_secrets(config))


def refuse_one_folder(points: list[list[str]], jobs: list[Train | Sample]) -> None:
    """Raise ValueError if two jobs of a sweep would write to one folder."""
    owners: dict[Path, int] = {}
    for number, job in enumerate(jobs):
        for folder in folders(job):
            first = owners.setdefault(folder, number)
            changed = [pair for pair in zip(points[first], points[number], strict=True) if pair[0] != pair[1]]
            if not changed or same_job(jobs[first], job):
                continue
            one, other = (" ".join(side) for side in zip(*changed, strict=True))
            key = changed[0][0].lstrip("+").split("=")[0]
            option, value = "out" if isinstance(job, Sample) else "root", f"{key}.name" if key in groups() else key
            raise ValueError(
                f"-m: {one} and {other} both write to {folder}: give each its own folder, as with "
                f"'{option}=runs/${{{value}}}'"
            )
