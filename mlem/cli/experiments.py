"""`sample.py eval=benchmark` and `eval=scaling`: the figures of [J] (arXiv:2603.24594) for a family on disk."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from mlem.cli.compose import compose, plain
from mlem.cli.conditions import guided
from mlem.cli.decoders import decoder_for
from mlem.cli.metrics import measure_of, prepared
from mlem.cli.options import read, rows, value_of
from mlem.cli.paths import family_folder, out_folder
from mlem.cli.progress import WorkProgress
from mlem.cli.ranks import new_fabric
from mlem.cli.rivals import measured_rivals
from mlem.cli.schema import Benchmark, Sample, Scaling
from mlem.cli.values import parse_indices, written
from mlem.comparison.coupled import Comparison
from mlem.comparison.entry import Entry
from mlem.comparison.equal_error import Advantage, Ratio
from mlem.comparison.scaling import ERRORS, draw_scaling, held_out_errors, plain_fits, scaling_fits
from mlem.comparison.summary import draw, ratios
from mlem.family import Family
from mlem.files import folder_lock, write_json, write_record
from mlem.invocation import command
from mlem.report import write_report

__all__ = ["error_against_time", "scaling"]


def error_against_time(job: Sample) -> None:
    """`eval=benchmark` and `eval=rivals`: run what is missing, then write figures and tables."""
    options = job.eval
    assert isinstance(options, Benchmark)
    family, out = _family(job), out_folder(job)
    samplers = enumerate(options.samplers)
    entries = [Entry.from_options(entry, f"eval.samplers[{number}]", named=True) for number, entry in samplers]
    fabric = new_fabric(job.trainer)
    if fabric.world_size > 1:
        raise ValueError(f"eval=benchmark times one process, got {fabric.world_size} ranks: add trainer=cpu or gpu")
    measure = measure_of(job.metric, job.data, prepared(job.data)) if job.metric.features is not None else None
    indices = parse_indices(job.seeds, "seeds")
    if measure is not None or options.shown:
        decoder_for(job, family)  # which images need
    if measure is not None:
        measure.check(len(indices))
    entries = _possible(entries, family)
    with folder_lock(out), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # from libraries
        comparison = Comparison(
            family,
            indices,
            out,
            reference_steps=options.reference_steps,
            seed=job.seed,
            batch_size=job.batch_size,
            device=fabric.device,
            precision=job.trainer.precision,
            measure=measure,
        )
        report = measured_rivals if options.targets else _measured
        said = report(job, comparison, entries)
    if out.parent == Path(job.root) and (out.parent / "report.html").exists():
        write_report(out.parent)  # it shows the results too
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"warning: {message}")
    said()
    for what, name in (
        ("rows", "runs.csv"),
        ("seconds of all rivals", "fastest.*"),
        ("error against time", "error_vs_time*.png"),
        ("PSNR and SSIM against time", "similarity_vs_time*.png"),
        ("ratios", "summary.json"),
    ):
        for path in sorted(out.glob(name)):  # one figure per reference
            print(f"{what:38s}{path}", flush=True)


def _measured(job: Sample, comparison: Comparison, entries: list[Entry]) -> Callable[[], None]:
    """The figures of [J] and the cost ratios; returns the function that prints the ratios."""
    options, out = job.eval, comparison.folder
    assert isinstance(options, Benchmark)
    runs = [run for entry in entries for run in comparison.runs(entry)]
    if not runs:
        raise ValueError("eval.samplers: there is nothing to run; list at least one sampler")
    with WorkProgress(comparison.cost(runs)) as advance:
        comparison.measure(runs, advance)
    found = ratios(comparison, runs, options.draws)
    draw(comparison, runs, out / "error_vs_time.png", options.shown)
    plain_ratios = [advantage.to_dict() for advantage in found]
    write_record(out / "summary.json", {"caption": comparison.caption, "ratios": plain_ratios})
    return partial(_table, found, comparison)


def _possible(entries: list[Entry], family: Family) -> list[Entry]:
    """The entries that this family can run; prints which are left out, and why."""
    for entry in entries:
        if missing := entry.missing(family):
            print(f"left out: {entry.label}: this family has no {missing}; {_REMEDY[missing]}", flush=True)
    return [entry for entry in entries if not entry.missing(family)]


def scaling(job: Sample) -> None:
    """`eval=scaling`: gamma of the family from held-out denoising errors and from level differences."""
    options = job.eval
    assert isinstance(options, Scaling)
    family, out = _family(job), out_folder(job)
    shards = prepared(job.data)
    if job.data.name != family.data or tuple(shards.shape) != tuple(family.shape):
        raise ValueError(
            f"data={job.data.name} has images {tuple(shards.shape)}, but the family was trained on {family.data} "
            f"{tuple(family.shape)}: name the data set that it was trained on"
        )
    index = torch.as_tensor(list(shards.split(job.data.held_out)[1]))
    if len(index) < 2:
        raise ValueError(f"data.held_out must be >= 2 for a scaling law, got {job.data.held_out}")
    labels = shards.labels(index.tolist()) if shards.classes else None
    errors = held_out_errors(family, shards.images(index.tolist()), index, job.seed, labels=labels)
    unit = options.cost
    fits = scaling_fits(family, errors, unit, options.replicates)
    for line in draw_scaling(family, fits, len(index), out / "scaling_law.png", unit):
        print(line)
    if "level differences" not in fits:
        print(f"left out: level differences: this family has no calibration; {_REMEDY['calibration']}")
    floor = fits[ERRORS]
    low, high = floor.floor_interval
    print(f"floor {floor.floor:.4f} ({low:.4f} to {high:.4f}); read from a plot as in [J], gamma is half of ours")
    numbers = {"data": family.data, "images": len(index), "unit": unit, "fits": plain_fits(fits, family.names)}
    write_json(out / "scaling_law.json", numbers)
    for what, name in (("scaling law", "scaling_law.png"), ("numbers", "scaling_law.json")):
        print(f"{what:38s}{out / name}", flush=True)


def _refuse_unused(job: Sample) -> None:
    """Raise ValueError for a given option without effect, naming the one to use."""
    name, usual = job.eval.name, read(plain(compose("sample", [])))
    assert isinstance(usual, Sample)
    for row in rows("sample"):
        if name not in row.unused or value_of(job, row.name) == value_of(usual, row.name):
            continue
        value = written(value_of(job, row.name))
        own = {"sampler.solver": "solver", "sampler.name": "solver"}.get(row.name, row.name)
        instead = (
            f", or use eval.{own}=" if hasattr(job.eval, own) else ", or see eval.samplers" * (name == "benchmark")
        )
        typed = {"sampler.name": "sampler", "metric.features": "metric"}.get(row.name, row.name)
        raise ValueError(f"eval={name} does not use {typed}={value}: leave it out{instead}")


_REMEDY = {
    "coefficients": f"learn them with: {command('train')} model=coefficients family=FOLDER",
    "calibration": f"measure it with: {command('multilevel')} calibrate FOLDER",
}


def _family(job: Sample) -> Family:
    verb = f"eval={job.eval.name}"
    if job.model is not None:
        raise ValueError(f"{verb} needs a family, but model={job.model.name} is a single level: leave it out")
    for name, value in (("level", job.level), ("folder", job.folder), ("plan", job.plan)):
        if value is not None:
            raise ValueError(f"{verb} runs all levels of a family: leave out {name}={value}")
    _refuse_unused(job)
    family = guided(Family.load(family_folder(job.family, job.root, job.data)), job.guidance)
    assert isinstance(family, Family)
    return family


def _table(found: list[Advantage], comparison: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    top = comparison.family.level().name
    over = f"{comparison.setup.count} images and the coins"
    title = f"EM's cost over ML-EM's at equal error, 95 percent intervals over {over}"
    table = Table(title=title)
    for column in ("sampler", "coins", "MSE", f"time, level {top}", "time, any level", f"FLOPs, {top}", "FLOPs, any"):
        table.add_column(column)

    def cell(one: Ratio) -> str:
        return f"{one.ratio:.2f} [{one.low:.2f}, {one.high:.2f}]" if one.known else "not reached"

    unreached: dict[str, list[str]] = {}
    for one in found:
        error = f"{one.mse:.1e}"
        if one.known:
            table.add_row(one.sampler, one.coins, error, *(cell(ratio) for ratio in one.against.values()))
        else:
            unreached.setdefault(f"{one.sampler}, {one.coins}", []).append(error)
    if table.row_count:
        Console(width=None if os.isatty(1) else 140).print(table)
    for name, errors in unreached.items():
        print(f"no ratio, one side was not measured down to that MSE: {name}: {', '.join(errors)}")
