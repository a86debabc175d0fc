"""`sampler=auto`: the recommendation for a target error or time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mlem.cli.options import plan_defaults
from mlem.cli.ranks import launch
from mlem.cli.schema import Sample
from mlem.cli.values import CHECKED, written
from mlem.family import Family
from mlem.level import Level
from mlem.multilevel.candidate import Candidate, Recommendation

__all__ = ["chosen", "is_auto", "print_choice"]


def is_auto(job: Sample) -> bool:
    """Whether the job leaves the choice to the recommendation."""
    return job.sampler.solver == "auto"


def chosen(job: Sample, model: Family | Level, fabric: Any) -> tuple[Sample, Recommendation | None]:
    """The job with the recommended settings in place of `sampler=auto`, and the recommendation; others unchanged.

    The networks are first moved to the device on which they will run, since their time matters. The first rank chooses
    for all: where levels are timed, each would measure other times.

    Raises: ValueError for conflicting options, and if nothing can be recommended.
    """
    if not is_auto(job):
        if job.seconds is not None:
            raise ValueError(f"seconds={job.seconds:g} is a target of sampler=auto: add it, or use budget=")
        return job, None
    kind, check = _checked(job, model)
    assert isinstance(model, Family)
    torch.nn.ModuleList(level.network for level in model.levels).to(fabric.device)
    launch(fabric)
    target = {"mse": job.shared["mse"], "seconds": job.seconds}
    choice = None
    if fabric.is_global_zero:
        choice = model.recommend(**target, kind=kind, batch_size=job.batch_size, check=check)
        print_choice(choice)
    choice = fabric.broadcast(choice)
    sampler = replace(job.sampler, solver=choice.solver, options={})
    return replace(job, sampler=sampler, steps=choice.steps, grid=choice.grid, level=choice.level), choice


def _checked(job: Sample, model: Family | Level) -> tuple[str, int]:
    """The kind of solver, "ode" or "sde", and the number of images on which choices are measured."""
    if not isinstance(model, Family):
        raise ValueError("sampler=auto chooses among the levels of a family, but model= is one level; leave it out")
    if (job.shared["mse"] is None) == (job.seconds is None):
        raise ValueError("sampler=auto needs one target: mse=, such as mse=1e-3, or seconds=, per image")
    usual = plan_defaults()
    given: dict[str, Any] = {"steps": (job.steps, job.sampler.steps), "grid": (job.grid, None)}
    given |= {"level": (job.level, None), "plan": (job.plan, None)}
    given |= {key: (value, usual[key]) for key, value in job.shared.items() if key != "mse"}
    for name, (value, unset) in given.items():
        if value != unset:
            raise ValueError(f"sampler=auto chooses {name} itself; leave out {name}={written(value)}")
    options = dict(job.sampler.options)
    kind, check = options.pop("kind", "ode"), options.pop("check", 0)
    if options:
        raise ValueError(f"sampler=auto has only the options kind and check; leave out {next(iter(options))}")
    CHECKED.check("sampler.options.check", check)
    return str(kind), check


def print_choice(choice: Recommendation) -> None:
    """Print the recommendation, the reason and the alternatives."""
    print(f"recommended: {choice}\n  {choice.why}\n  {_expected(choice)}")
    if (check := choice.check) is not None:
        low, high = check.interval
        print(f"  mean squared error {check.mse:.2g} ({low:.2g} to {high:.2g}) measured on {check.images} images")
    if choice.extrapolated:
        print("  its number of steps is outside the measured range, so its error may be off")
    for other in choice.alternatives:
        print(f"  instead: {other}: {_expected(other)}")


def _expected(one: Candidate) -> str:
    low, high = one.interval
    seconds = f"{1e3 * one.predicted_seconds:.3g} ms/image"
    return f"mean squared error {one.predicted_mse:.2g} ({low:.2g} to {high:.2g}), {seconds} expected"
