"""Paths of runs: the folders a job writes, the family it reads, and the command that makes a missing one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mlem.cli.choices import usual_options
from mlem.cli.schema import Benchmark, Data, Learning, Network, Networks, Sample, Train
from mlem.cli.values import written
from mlem.files import read_object
from mlem.invocation import command
from mlem.pretrained import comes_along, folder_of

__all__ = ["family_folder", "folders", "out_folder", "run_folder", "same_job", "training_command"]

_DEFAULT = {"samples": "samples/{sampler}_{steps}", "benchmark": "error_vs_time", "scaling": "scaling_law"}
_OF_RIVALS = "fastest"
"""Where each `eval` writes below root; the others write to out=, or nowhere."""
_SHARED = ("seeds", "format", "metric", "debug")
"""Options in which jobs of `eval=samples` that write to one folder may differ."""


def run_folder(job: Train | Sample, size: str) -> Path:
    """The run folder of the level of this size."""
    assert isinstance(job.model, (Network, Networks))
    return Path(job.root) / f"{job.model.architecture}_{size}"


def out_folder(job: Sample) -> Path:
    """Where `sample.py` writes what it makes."""
    if job.out is not None:
        return Path(job.out)
    if isinstance(job.eval, Benchmark) and job.eval.targets:
        return _root(job) / _OF_RIVALS
    return _root(job) / _DEFAULT[job.eval.name].format(sampler=job.sampler.name, steps=job.steps)


def _root(job: Sample) -> Path:
    """`root`; if that is the default of the data, but the family comes with mlem, `runs/NAME` of the family."""
    folder = folder_of(job.family) if job.family is not None else None
    if folder is not None and comes_along(folder) and job.root == f"runs/{job.data.name}":
        return Path("runs") / folder.name
    return Path(job.root)


def folders(job: Train | Sample) -> list[Path]:
    """The folders that a job writes."""
    if isinstance(job, Sample):
        return [out_folder(job)] if job.out is not None or job.eval.name in _DEFAULT else []
    if job.dry_run:
        return []
    if isinstance(job.model, Learning):
        return [Path(job.root) / "coefficients"]
    runs = [run_folder(job, size) for size in job.model.sizes]
    return [Path(job.root) / "family", *runs] if job.model.several else runs


def same_job(one: Train | Sample, other: Train | Sample) -> bool:
    """Whether two jobs of `sample.py` add to the same samples."""
    if not isinstance(one, Sample) or not isinstance(other, Sample) or one.eval.name != "samples":
        return False
    return one == replace(other, **{name: getattr(one, name) for name in _SHARED})


def family_folder(family: str | None, root: str, data: Data) -> Path:
    """The folder of `family=` (or "pretrained:NAME"), or a family of this data set: root's, or the newest beside it.

    Raises: FileNotFoundError with the command that makes one.
    """
    if family is not None:
        return folder_of(family)
    beside, own = Path(root).parent, Path(root) / "family" / "family.json"
    found = [path for path in beside.glob("*/family/family.json") if read_object(path).get("data", "") == data.name]
    if own in found:
        return own.parent
    if not found:
        raise FileNotFoundError(
            f"there is no trained family of {data.name} under {beside}; make one with: "
            f"{training_command('family', root, data)}"
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent


def training_command(model: str, root: str, data: Data) -> str:
    """The command that trains `model` on this data and under this root."""
    usual = usual_options(data.source)
    given = [f"model={model}", f"data={data.source}"]
    given += [f"data.options.{key}={written(value)}" for key, value in data.options.items() if value != usual.get(key)]
    given += [f"root={root}"] if root != f"runs/{data.name}" else []
    return " ".join([command("train"), *given])
