"""`sample.py eval=benchmark` and `eval=scaling`: the figures of [J] (arXiv:2603.24594) for a family on disk."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mlem.cli.config import parse_indices, written
from mlem.cli.find import family_folder, out_folder
from mlem.cli.main import compose
from mlem.cli.measure import measure_of, new_fabric, prepared
from mlem.comparison.coupled import Comparison
from mlem.comparison.entry import Entry
from mlem.comparison.equal_error import Advantage, Ratio
from mlem.comparison.scaling import ERRORS, draw_scaling, held_out_errors, plain_fits, scaling_fits
from mlem.comparison.summary import draw, ratios
from mlem.family import Family
from mlem.files import folder_lock, write_json
from mlem.report import write_report


def error_against_time(config: DictConfig) -> None:
    """`eval=benchmark`: run what is not there yet, then the figure, the ratios of costs, and where they are."""
    family, out = _family(config), out_folder(config)
    plain: list[Any] = OmegaConf.to_container(config.eval.samplers, resolve=True)  # type: ignore[assignment]
    entries = [Entry.from_options(one, f"eval.samplers[{n}]", named=True) for n, one in enumerate(plain)]
    fabric = new_fabric(config)
    if fabric.world_size > 1:
        raise ValueError(f"eval=benchmark times one process, got {fabric.world_size} ranks: add trainer=cpu or gpu")
    measure = measure_of(config, prepared(config)) if config.metric.features is not None else None
    indices = parse_indices(config.seeds, "seeds")
    if measure is not None:
        measure.check(len(indices))
    for entry in entries:
        if missing := entry.missing(family):
            print(f"left out: {entry.label}: this family has no {missing}; {_REMEDY[missing]}", flush=True)
    entries = [entry for entry in entries if not entry.missing(family)]
    with folder_lock(out), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        comparison = Comparison(
            family,
            indices,
            out,
            reference_steps=config.eval.reference_steps,
            seed=config.seed,
            batch_size=config.batch_size,
            device=fabric.device,
            precision=config.trainer.precision,
            measure=measure,
        )
        runs = [run for entry in entries for run in comparison.runs(entry)]
        if not runs:
            raise ValueError("eval.samplers: nothing is left to run; list at least one sampler")
        with _progress(comparison.cost(runs)) as advance:
            comparison.measure(runs, advance)
        found = ratios(comparison, runs, config.eval.draws)
        draw(comparison, runs, out / "error_vs_time.png", config.eval.shown)
        plain_ratios = [advantage.to_dict() for advantage in found]
        write_json(out / "summary.json", {"caption": comparison.caption, "ratios": plain_ratios})
    if out.parent == Path(config.root) and (out.parent / "report.html").exists():
        write_report(out.parent)  # which shows it too
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"warning: {message}")
    _table(found, comparison)
    for what, name in (("rows", "runs.csv"), ("error against time", "error_vs_time.png"), ("ratios", "summary.json")):
        print(f"{what:38s}{out / name}", flush=True)


def scaling(config: DictConfig) -> None:
    """`eval=scaling`: gamma of the family from held-out denoising errors and from the differences of its levels."""
    family, out = _family(config), out_folder(config)
    shards = prepared(config)
    if config.data.name != family.data or tuple(shards.shape) != tuple(family.shape):
        raise ValueError(
            f"data={config.data.name} has images {tuple(shards.shape)}, the family is of {family.data} "
            f"{tuple(family.shape)}: name the data set that it was trained on"
        )
    index = torch.as_tensor(list(shards.split(config.data.held_out)[1]))
    if len(index) < 2:
        raise ValueError(f"data.held_out must be >= 2 for a scaling law, got {config.data.held_out}")
    errors = held_out_errors(family, shards.images(index.tolist()), index, config.seed)
    unit = config.eval.cost
    fits = scaling_fits(family, errors, unit, config.eval.replicates)
    for line in draw_scaling(family, fits, len(index), out / "scaling_law.png", unit):
        print(line)
    if "level differences" not in fits:
        print(f"left out: level differences: this family has no calibration; {_REMEDY['calibration']}")
    floor = fits[ERRORS]
    low, high = floor.floor_interval
    print(f"floor {floor.floor:.4f} ({low:.4f} to {high:.4f}); read from a plot as [J] does, gamma is half of ours")
    plain = {"data": family.data, "images": len(index), "unit": unit, "fits": plain_fits(fits, family.names)}
    write_json(out / "scaling_law.json", plain)
    for what, name in (("scaling law", "scaling_law.png"), ("numbers", "scaling_law.json")):
        print(f"{what:38s}{out / name}", flush=True)


_SAMPLES = ("sampler.name", "sampler.solver", "sampler.options", "steps", "grid", "format", "budget", "mse", "delta")
_SAMPLES += ("estimator", "order", "probabilities", "coins", "levels", "cost", "per_sample")
_UNUSED = {
    "benchmark": _SAMPLES,
    "scaling": (*_SAMPLES, "seeds", "batch_size", "metric.features"),
}
"""What is of samples, and does nothing in the experiments."""


def _refuse_unused(config: DictConfig) -> None:
    """Raise ValueError for an option that was given and would do nothing, with the one that does."""
    name, usual = config.eval.name, compose("sample", [])
    for option in _UNUSED[name]:
        value = OmegaConf.select(config, option)
        if value == OmegaConf.select(usual, option):
            continue
        own = {"sampler.solver": "solver", "sampler.name": "solver"}.get(option, option)
        instead = f", or say eval.{own}=" if own in config.eval else ", or see eval.samplers" * (name == "benchmark")
        said = {"sampler.name": "sampler", "metric.features": "metric"}.get(option, option)
        raise ValueError(f"eval={name} does not use {said}={written(value)}: leave it out{instead}")


_REMEDY = {
    "coefficients": "learn them with: python train.py model=coefficients family=FOLDER",
    "calibration": "measure it with: python -m mlem.multilevel calibrate FOLDER",
}


def _family(config: DictConfig) -> Family:
    verb = f"eval={config.eval.name}"
    if OmegaConf.select(config, "model.name") is not None:
        raise ValueError(f"{verb} is about a family, and model={config.model.name} is one level: leave it out")
    for name in ("level", "folder", "plan"):
        if config[name] is not None:
            raise ValueError(f"{verb} runs all levels of a family: leave out {name}={config[name]}")
    _refuse_unused(config)
    return Family.load(family_folder(config))


class _progress:
    """A bar of the work done, in evaluations of the largest level."""

    def __init__(self, total: float) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("samplers"), BarColumn(), TaskProgressColumn())
        self._bar = Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), disable=not total)
        self._task = self._bar.add_task("samplers", total=total)

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda cost: self._bar.advance(self._task, cost)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def _table(found: list[Advantage], comparison: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    top = comparison.family.level().name
    over = f"{comparison.setup.count} images and the mean's coins"
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
        print(f"no ratio, one side was not measured down there: {name}: MSE {', '.join(errors)}")
