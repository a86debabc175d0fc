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
from mlem.comparison.coupled import Comparison, Entry
from mlem.comparison.scaling import ERRORS, draw_scaling, held_out_errors, plain_fits, scaling_fits
from mlem.comparison.summary import draw, ratios
from mlem.family import Family
from mlem.files import folder_lock, write_json
from mlem.multilevel.spec import PlanSpec
from mlem.report import write_report
from mlem.sampling import solver_of

_ENTRY = ("name", "solver", "steps", "grid", "options", "levels", "plan", "deltas", "trials")


def error_against_time(config: DictConfig) -> None:
    """`eval=benchmark`: run what is not there yet, then the figure, the ratios of costs, and where they are."""
    family, out = _family(config), out_folder(config)
    entries = [_entry(number, entry) for number, entry in enumerate(config.eval.samplers)]
    fabric = new_fabric(config)
    if fabric.world_size > 1:
        raise ValueError(f"eval=benchmark times one process, got {fabric.world_size} ranks: add trainer=cpu or gpu")
    measure = measure_of(config, prepared(config)) if config.metric.features is not None else None
    indices = parse_indices(config.seeds, "seeds")
    if measure is not None:
        measure.check(len(indices))
    for entry in entries:
        if missing := entry.missing(family):
            print(f"left out: {entry.name}: this family has no {missing}; {_REMEDY[missing]}", flush=True)
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
        write_json(out / "summary.json", {"caption": comparison.caption, "ratios": found})
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


def _entry(number: int, entry: Any) -> Entry:
    """An item of `eval.samplers`. Raises ValueError that names it."""
    name = f"eval.samplers[{number}]"
    if not OmegaConf.is_dict(entry) or not {"name", "solver", "steps"} <= set(entry) <= set(_ENTRY):
        raise ValueError(
            f"{name} must be {{name: text, solver: name, steps: [n, ..], and, where wanted, "
            f"{', '.join(_ENTRY[3:])}: ..}}, got {entry}"
        )
    plain: dict[str, Any] = OmegaConf.to_container(entry, resolve=True)  # type: ignore[assignment]
    plan, options, deltas, trials = (plain.get(key) for key in ("plan", "options", "deltas", "trials"))
    steps, levels = plain["steps"], plain.get("levels")
    if not isinstance(steps, list) or not steps or not all(type(n) is int and n >= 1 for n in steps):
        raise ValueError(f"{name}.steps must be a list of step counts >= 1, got {steps}")
    for key, value, kind in (("plan", plan, dict), ("options", options, dict), ("levels", levels, list)):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name}.{key} must be {'options' if kind is dict else 'a list'}, got {value}")
    if deltas is not None and not (isinstance(deltas, list) and all(type(d) in (int, float) for d in deltas)):
        raise ValueError(f"{name}.deltas must be a list of numbers, got {deltas}")
    if trials is not None and not (type(trials) is int and trials >= 1):
        raise ValueError(f"{name}.trials must be a whole number >= 1, got {trials}")
    if plan is None and (deltas is not None or trials is not None):
        raise ValueError(f"{name}: deltas and trials are of coins: add plan={{...}}, or leave them out")
    if plan is not None and levels is not None:
        raise ValueError(f"{name}.levels is of levels that run alone; of a plan, write plan={{levels: [..]}}")
    spec = PlanSpec.from_options(plan, f"{name}.plan: ") if plan is not None else None
    tosses = deltas is not None or trials is not None
    if tosses and spec is not None and spec.estimator != "jump":
        raise ValueError(f"{name}: deltas and trials toss coins: add estimator: jump to its plan")
    try:
        solver_of(plain["solver"], **(options or {}))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error
    return Entry(
        str(plain["name"]),
        plain["solver"],
        tuple(steps),
        plain.get("grid"),
        options or {},
        None if levels is None else tuple(levels),
        spec,
        None if deltas is None else tuple(float(delta) for delta in deltas),
        trials,
    )


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


def _table(found: list[dict[str, Any]], comparison: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    top = comparison.family.level().name
    over = f"{comparison.count} images and the mean's coins"
    title = f"EM's cost over ML-EM's at equal error, 95 percent intervals over {over}"
    table = Table(title=title)
    for column in ("sampler", "coins", "MSE", f"time, level {top}", "time, any level", f"FLOPs, {top}", "FLOPs, any"):
        table.add_column(column)

    def cell(one: dict[str, Any]) -> str:
        return "not reached" if one["ratio"] is None else f"{one['ratio']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"

    unreached: dict[str, list[str]] = {}
    for row in found:
        error, ratios_ = f"{row['mse']:.1e}", row["against"].values()
        if all(one["ratio"] is None for one in ratios_):
            unreached.setdefault(f"{row['sampler']}, {row['coins']}", []).append(error)
        else:
            table.add_row(row["sampler"], row["coins"], error, *(cell(one) for one in ratios_))
    if table.row_count:
        Console(width=None if os.isatty(1) else 140).print(table)
    for name, errors in unreached.items():
        print(f"no ratio, one side was not measured down there: {name}: MSE {', '.join(errors)}")
