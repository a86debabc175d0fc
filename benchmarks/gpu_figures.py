"""Tables and figures of the rows of `gpu.py`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from gpu_modes import MODES
from gpu_rows import Rows

from mlem.comparison.equal_error import Setting, cost_ratio, frontier
from mlem.plots.style import COLOURS, STYLES, in_digits, legend_key, panels, save

__all__ = ["advantages", "draw", "measured", "report"]

Lines = Mapping[str, Sequence[tuple[float, float]]]
"""Name -> points."""
KINDS = {"ddpm": "SDE", "dpm_solver_pp": "ODE"}
"""Reference solver -> kind of equation."""


def measured(rows: Rows) -> list[dict[str, Any]]:
    """Seconds with their errors: one row per sampler, mode and batch."""
    errors = {tuple(row["key"]): row for row in rows.of("errors")}
    found: list[dict[str, Any]] = []
    for row in rows.of("seconds"):
        mode, batch, label, target, steps = row["key"]
        where = (mode, batch) if target else (MODES[mode].precision, 0)  # as in `error_key`
        error = errors.get((*where, label, target, steps))
        if error is not None and error["mse"] > 0:
            about = {"mode": mode, "batch": batch, "label": label, "target": target, "steps": steps}
            costs = {"time": row["seconds"]["median"], "outside": row["outside_percent"], "flops": row["flops"]}
            found.append(about | costs | {key: error[key] for key in ("mse", "images", "reference")})
    return found


def advantages(rows: Rows) -> list[dict[str, Any]]:
    """Cost of the best solver on one level over that of several levels, in time and FLOPs, at equal error."""
    found, table = measured(rows), []
    for mode, batch, kind in dict.fromkeys((row["mode"], row["batch"], row["reference"]) for row in found):
        here = [row for row in found if (row["mode"], row["batch"], row["reference"]) == (mode, batch, kind)]
        alone = [row for row in here if not row["target"]]
        for label in dict.fromkeys(row["label"] for row in here if row["target"]):
            ours = [row for row in here if row["label"] == label]
            about = {"mode": mode, "batch": batch, "kind": KINDS[kind], "sampler": label}
            for error in _shared_errors(alone, ours):
                ratios = {
                    cost: cost_ratio(_settings(alone, cost), _settings(ours, cost), error, np.random.default_rng(0))
                    for cost in ("time", "flops")
                }
                table.append(about | {cost: ratio.to_dict() for cost, ratio in ratios.items()})
    return table


def _settings(found: Sequence[dict[str, Any]], cost: str) -> list[Setting]:
    return [Setting(np.array([row[cost]]), np.array([row["images"]])) for row in found]


def _shared_errors(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> list[float]:
    """Three errors that both reach, even in the logarithm."""
    if not one or not other:
        return []
    spans = [frontier(_settings(some, "time"))[1] for some in (one, other)]
    low, high = max(span.min() for span in spans), min(span.max() for span in spans)
    return [math.exp(high + share * (low - high)) for share in (0.25, 0.5, 0.75)] if low < high else []


def report(rows: Rows) -> None:
    """Print the tables."""
    from rich.console import Console

    console = Console(width=120)
    levels = [
        (
            *row["key"],
            " ".join(f"{1e3 * seconds:.3g}" for seconds in row["seconds"]),
            " ".join(f"{n / seconds / 1e9:.3g}" for n, seconds in zip(row["flops"], row["seconds"], strict=True)),
            f"{row['seconds'][-1] / row['seconds'][0]:.1f}",
        )
        for row in rows.of("levels")
    ]
    columns = ("mode", "batch", "ms per image", "GFLOP/s", "largest : smallest")
    _table(console, "a call of each level", columns, levels)
    training = [
        (*row["key"], *(f"{row[name]['median']:.3g}" for name in ("images_per_second", "over_bare_loop")))
        for row in rows.of("training")
    ]
    _table(console, "training", ("mode", "level", "images/s", "over a bare loop"), training)
    outside = [
        (*row["key"], f"{1e3 * row['seconds']['median']:.3g}", f"{row['outside_percent']:.1f}")
        for row in rows.of("seconds")
    ]
    columns = ("mode", "batch", "sampler", "target", "steps", "ms per image", "% outside networks")
    _table(console, "sampling", columns, outside)
    table = [
        (*list(one.values())[:4], f"{one['time']['error']:.1e}", *(_ratio(one[cost]) for cost in ("time", "flops")))
        for one in advantages(rows)
    ]
    columns = ("mode", "batch", "", "sampler", "MSE", "time", "FLOPs")
    _table(console, "the best single level over several levels, at equal error", columns, table)


def _ratio(one: Mapping[str, Any]) -> str:
    return "" if one["ratio"] is None else f"{one['ratio']:.2f} ({one['low'] or 0:.2f} to {one['high'] or 0:.2f})"


def _table(console: Any, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.table import Table

    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*map(str, row))
    if rows:
        console.print(table)


def draw(rows: Rows, folder: Path) -> None:
    """Write the figures for which there are rows: gpu_levels.png, gpu_error_ODE_bf16.png and so on."""
    machine, settings = rows.about["machine"], rows.about["settings"]
    where = f"{machine.get('gpu', machine['processor'])}, torch {machine['torch']}"
    data = next((row["data"] for row in rows.of("family")), "")
    _draw_levels(rows, folder / "gpu_levels.png", where)
    errors = f"{data}, {settings['images']} images, reference of {settings['reference_steps']} steps; {where}"
    _draw_errors(rows, folder, errors)
    scores = [
        (_named(*row["key"][2:]), (1e3 * row["seconds"], value))
        for row in rows.of("fid")
        for name, value in row["scores"].items()
        if name.startswith("fid_")
    ]
    label = f"FID, {settings['fid_images']} images"
    _draw(folder / "gpu_fid.png", "time per image [ms]", [label], [_grouped(scores)], f"{data}; {where}")
    parallel = [
        (f"{one['solver']}, {row['key'][0]}", (row["key"][1], one["ratio"]["median"]))
        for row in rows.of("parallel")
        for one in row["solvers"]
    ]
    label = "time over that of parallel midpoints"
    _draw(folder / "gpu_parallel.png", "batch", [label], [_grouped(parallel)], f"{data}; {where}")


def _draw_levels(rows: Rows, path: Path, where: str) -> None:
    """Time per call against FLOPs: one panel per batch size, one line per mode."""
    levels = rows.of("levels")
    batches = list(dict.fromkeys(row["key"][1] for row in levels))
    lines = [
        {
            row["key"][0]: [(n / 1e6, 1e6 * one) for n, one in zip(row["flops"], row["seconds"], strict=True)]
            for row in levels
            if row["key"][1] == batch
        }
        for batch in batches
    ]
    labels = [f"batch {batch}: time of a call [µs per image]" for batch in batches]
    _draw(path, "MFLOPs per image", labels, lines, f"levels; {where}")


def _draw_errors(rows: Rows, folder: Path, caption: str) -> None:
    """Error against time, a figure for each mode and kind: a panel for each batch size, a line for each sampler."""
    found = measured(rows)
    for mode, kind in dict.fromkeys((row["mode"], row["reference"]) for row in found):
        here = [row for row in found if (row["mode"], row["reference"]) == (mode, kind)]
        batches = list(dict.fromkeys(row["batch"] for row in here))
        lines = [
            _grouped(
                (_named(row["label"], row["target"], row["steps"]), (1e3 * row["time"], row["mse"]))
                for row in here
                if row["batch"] == batch
            )
            for batch in batches
        ]
        labels = [f"batch {batch}: mean squared error to the reference" for batch in batches]
        name = f"gpu_error_{KINDS[kind]}_{mode.replace(', ', '_')}.png"
        _draw(folder / name, "time per image [ms]", labels, lines, f"{KINDS[kind]}, {mode}; {caption}")


def _named(label: str, target: str, steps: int) -> str:
    """The line of a sampler: steps vary along lines of one level, budgets along lines of several."""
    return f"{label}, {steps} steps" if target else label


def _grouped(points: Iterable[tuple[str, tuple[float, float]]]) -> Lines:
    """Points by name, each line in the order of x."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, point in points:
        lines.setdefault(name, []).append(point)
    return {name: sorted(line) for name, line in lines.items()}


def _draw(path: Path, xlabel: str, ylabels: Sequence[str], lines: Sequence[Lines], caption: str) -> None:
    """One logarithmic panel per label; nothing without points."""
    names = list(dict.fromkeys(name for some in lines for name in some))
    if not names:
        return
    figure, axes_of = panels(xlabel, ylabels, caption)
    looks = dict(zip(names, zip(cycle(COLOURS), cycle(STYLES + STYLES[:1]), strict=False), strict=False))
    for axes, some in zip(axes_of, lines, strict=True):
        axes.set(xscale="log", yscale="log")
        in_digits(axes.xaxis)
        for name, points in some.items():
            colour, (marker, line) = looks[name]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, markersize=4)
    handles = [legend_key(name, colour, marker, line) for name, (colour, (marker, line)) in looks.items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    save(figure, path)
