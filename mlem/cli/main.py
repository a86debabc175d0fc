"""`train.py` and `sample.py`: compose the config, turn every mistake into one line, run the job.

Heavy imports wait until the options are known to be good.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from mlem.cli.choices import groups
from mlem.cli.compose import compose, plain, sweep, without_secrets
from mlem.cli.errors import stop
from mlem.cli.options import check, read
from mlem.cli.paths import folders, same_job
from mlem.cli.ranks import leave
from mlem.cli.schema import Sample, Train
from mlem.cli.usage import usage

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
    """Do the work of every job that the command line asks for. A mistake is one line and exit status 2."""
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        print(usage(name))
        return
    debug = "debug=true" in (argument.lower() for argument in arguments)
    try:
        points = sweep(arguments)
        # before torch is imported, and all of them before the first is run
        jobs = [job_of(name, overrides) for overrides in points]
        refuse_one_folder(points, jobs)
        for job in jobs:
            work(job)
    except (ValueError, OSError, FloatingPointError, OmegaConfBaseException) as error:
        if debug:
            raise
        stop(name, str(error).split("\n    full_key")[0])
    finally:
        leave()


def job_of(name: str, overrides: list[str]) -> Train | Sample:
    """The job that these overrides ask of a command, checked as far as it can be without torch."""
    config = compose(name, overrides)
    options = plain(config)
    check(options)
    return read(options, without_secrets(config))


def refuse_one_folder(points: list[list[str]], jobs: list[Train | Sample]) -> None:
    """Raise ValueError where two jobs of a sweep would write into one folder: what one left is lost or in the way."""
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
                f"-m: {one} and {other} both write into {folder}: give each a folder of its own, as with "
                f"'{option}=runs/${{{value}}}'"
            )
