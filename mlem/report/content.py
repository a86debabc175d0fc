"""What a run folder holds, as the sections of its page. Reads the files that training and evaluation leave, no others.

A folder is one run (`runs/digits/unet_s`) or holds several (`runs/digits`); whatever is missing is left out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlem.comparison.equal_error import Advantage
from mlem.comparison.row import Row
from mlem.files import damaged, read_json, read_object, write_text
from mlem.plots import curves
from mlem.report.html import Cell, Markup, figure, join, page, section, table, tag

Line = tuple[list[float], list[float]]

_PICTURES = {
    "error_vs_time": "Mean squared error to the many-step reference against time per image in milliseconds",
    "quality_vs_evaluations": "Mean squared error, and FID where it was measured, against network calls per image",
    "error_by_noise_level": "Denoising error of every level against the log signal-to-noise ratio",
    "scaling_law": "Mean squared error against FLOPs per image, with fitted power laws",
    "probabilities": "Probabilities p_k of running each level against the log signal-to-noise ratio",
}
_SYSTEM = {
    "system/images_per_second": "training speed [images/s]",
    "system/memory_gib": "peak memory of the process [GiB]",
    "system/gpu_memory_gib": "peak GPU memory [GiB]",
}


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` in a run folder from the files there; its path. Raises ValueError where there is no run."""
    folder = Path(folder)
    runs, evaluated = list(_runs(folder)), _evaluation(folder)
    if not runs and evaluated is None:
        raise ValueError(f"{folder} holds no run: no metrics.jsonl and no evaluation.json in it or one floor below")
    about = _about(folder)
    sections = [
        section("Error, time and calls", *_pictures(folder, evaluated), class_="plots"),
        section("Samplers", *_samplers(evaluated)),
        section("Samplers at equal error", *_equal_error(folder)),
        section("Samples", *_grids(evaluated), class_="grids"),
        section("Levels", *_levels(folder)),
        section("Training", *_training(runs), class_="plots"),
        section("Coefficients", *_coefficients(runs), class_="plots"),
        section("System", *_system(runs), class_="plots"),
        section("Config", *_config(folder)),
    ]
    title = f"{about.get('name', folder.resolve().name)} · mlem"
    write_text(folder / "report.html", page(title, tag("h1", title), _facts(folder, about), *sections))
    return folder / "report.html"


@dataclass(frozen=True)
class _Run:
    """One metrics.jsonl."""

    name: str
    records: list[dict[str, Any]]

    def line(self, metric: str, x: str = "step") -> Line | None:
        """Its values against steps, where it has any."""
        points = [(one[x], one[metric]) for one in self.records if _is_number(one.get(metric)) and x in one]
        return ([at for at, _ in points], [value for _, value in points]) if points else None

    def last(self, prefix: str) -> Line | None:
        """The newest of the metrics `<prefix><number>` against their numbers."""
        found = {name: value for one in self.records for name, value in one.items() if name.startswith(prefix)}
        points = sorted((float(name.removeprefix(prefix)), value) for name, value in found.items() if _is_number(value))
        return ([at for at, _ in points], [value for _, value in points]) if points else None

    def names(self, prefix: str) -> list[str]:
        """Metrics that begin with `prefix`, in the order in which they appear."""
        return list(dict.fromkeys(name for one in self.records for name in one if name.startswith(prefix)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _runs(folder: Path) -> Iterator[_Run]:
    """Those of the folder and of the folders in it."""
    # the smallest level first, as in the other figures
    family = folder / "family" / "family.json"
    order = [f"unet_{level}" for level in read_json(family)["levels"]] if family.exists() else []
    inside = sorted(folder.glob("*/metrics.jsonl"))
    inside.sort(key=lambda path: order.index(path.parent.name) if path.parent.name in order else len(order))
    for path in [folder / "metrics.jsonl", *inside]:
        if path.exists():
            yield _Run(path.resolve().parent.name, list(_records(path)))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # cut short by a kill
            continue
        if isinstance(record, dict) and _is_number(record.get("step")):
            yield record


def _evaluation(folder: Path) -> Path | None:
    homes = (folder, folder / "evaluation")
    return next((home for home in homes if (home / "evaluation.json").exists()), None)


def _about(folder: Path) -> dict[str, Any]:
    return read_json(folder / "run.json") if (folder / "run.json").exists() else {}


def _facts(folder: Path, about: Mapping[str, Any]) -> Markup:
    facts = {"folder": folder.resolve().name, "git commit": about.get("commit", "unknown")}
    facts |= {"version": about.get("version", "unknown"), "begun": about.get("time", "unknown")}
    return tag("dl", *(join([tag("dt", name), tag("dd", str(value))]) for name, value in facts.items()))


def _levels(folder: Path) -> list[Markup]:
    paths = [folder / "level" / "mlem.json", *sorted(folder.glob("*/level/mlem.json"))]
    levels = sorted((read_json(path) for path in paths if path.exists()), key=lambda level: level["flops"])
    if not levels:
        return []
    columns = ["level", "parameters", "MFLOPs per call", "held-out error", "time per call [ms/image]"]
    columns += ["training steps", "training time [s]", "device"]
    rows = []
    for level in levels:
        measured = level["measured"]
        rows.append(
            [
                _text(level["name"]),
                _number(level["parameters"], ",d"),
                _number(level["flops"] / 1e6, ".1f"),
                _number(measured.get("error"), ".4f"),
                _number(_scaled(measured.get("seconds"), 1e3), ".3f"),
                _number(measured.get("steps"), ",d"),
                _number(measured.get("training_seconds"), ".1f"),
                _text(measured.get("device", "")),
            ]
        )
    return [table("Networks of the family; press a header to sort", columns, rows)]


def _rows(home: Path) -> tuple[list[Row], str]:
    """The rows of an evaluation, and their caption."""
    path = home / "evaluation.json"
    found = read_object(path)
    with damaged(path):
        return [Row.from_json(plain, str(path)) for plain in found["rows"]], found["caption"]


def _samplers(home: Path | None) -> list[Markup]:
    if home is None:
        return []
    found, caption = _rows(home)
    scores = list(dict.fromkeys(name for row in found for name in row.scores))
    columns = ["level", "sampler", "steps", "target", "calls per level", "calls per image", "rounds"]
    columns += ["MFLOPs per image", "time [ms/image]", "MSE", "standard error", *scores]
    rows = []
    for row in found:
        per_level = " + ".join(f"{count:.4g} {name}" for name, count in row.calls.items() if count)
        rows.append(
            [
                *map(_text, (row.level, row.sampler)),
                _number(row.steps, "d"),
                *map(_text, (row.target, per_level)),
                _number(row.evaluations, ".4g"),
                _number(row.rounds, ".4g"),
                _number(1e-6 * row.flops, ",.4g"),
                _number(1e3 * row.seconds, ".3g"),
                _number(row.mse, ".3g"),
                _number(row.mse_stderr, ".1g"),
                *(_number(row.scores.get(name), ".4g") for name in scores),
            ]
        )
    return [table(f"{caption}; press a header to sort", columns, rows)]


def _equal_error(folder: Path) -> list[Markup]:
    """Figures and ratios of `sample.py experiment=error_vs_time`."""
    shown = []
    for path in sorted(folder.glob("*/summary.json")):
        found = read_object(path)
        with damaged(path):
            caption, ratios = found["caption"], [Advantage.from_dict(one, str(path)) for one in found["ratios"]]
        for picture in sorted(path.parent.glob("*.png")):
            words = "Error against time and FLOPs of single levels and of levels that share the work"
            shown.append(figure(picture.read_bytes(), f"Figure: {words}", f"{words}; {caption}.", "plot wide"))
        columns = ["sampler", "solver", "coins", "MSE", "cost in", "against", "its cost over ours", "95 % interval"]
        rows = [cells for one in ratios if one.known for cells in _ratios(one)]
        if rows:
            shown.append(table(f"{caption}; press a header to sort", columns, rows))
        unreached: dict[str, list[str]] = {}
        for one in ratios:
            if not one.known:
                unreached.setdefault(f"{one.sampler} ({one.coins})", []).append(f"{one.mse:.2g}")
        if unreached:
            listed = "; ".join(f"{name} {', '.join(errors)}" for name, errors in unreached.items())
            shown.append(tag("p", f"No ratio, one side was not measured down to that MSE: {listed}."))
    return shown


def _ratios(one: Advantage) -> Iterator[list[Cell]]:
    """A row for each cost and rival."""
    names = {"largest": "the largest level alone", "any": "the best single level"}
    for what, ratio in one.against.items():
        unit, rival = what.split(", ")
        known = math.isfinite(ratio.low) and math.isfinite(ratio.high)
        interval = f"{ratio.low:.2f} to {ratio.high:.2f}" if known else "not reached"
        texts = [_text(value) for value in (one.sampler, one.solver, one.coins)]
        texts += [_number(one.mse, ".2g"), _text(unit), _text(names[rival])]
        yield [*texts, _number(ratio.ratio, ".2f"), Cell(interval, ratio.low if known else None)]


def _pictures(folder: Path, home: Path | None) -> list[Markup]:
    folders = [folder, *([home] if home not in (None, folder) else []), folder / "coefficients"]
    shown = []
    for name, alt in _PICTURES.items():
        for place in folders:
            if (path := place / f"{name}.png").exists():
                kind = "plot wide" if name == "quality_vs_evaluations" else "plot"
                shown.append(figure(path.read_bytes(), f"Figure: {alt}", f"{alt}.", kind))
                break
    return shown


def _training(runs: Sequence[_Run]) -> list[Markup]:
    steps, square = "optimizer step", "mean squared error"
    draw = _Drawer()
    draw("Training loss", _of(runs, "train/loss"), steps, f"{square} of the prediction", True)
    draw("Held-out denoising error", _of(runs, "val/error"), steps, f"{square} of the noise estimate", True)
    levels = {run.name: line for run in runs if (line := run.last("val/error_t"))}
    draw("Error by noise level at the last validation", levels, "time t in [0, 1]", square, True)
    return draw.figures


def _coefficients(runs: Sequence[_Run]) -> list[Markup]:
    draw = _Drawer()
    for run in runs:
        for symbol in ("alpha", "beta"):
            title = f"Learned {symbol}_k of {run.name}"
            draw(title, _all(run, f"{symbol}/"), "update", f"{symbol}_k [dimensionless]")
        draw(f"p_k(t) of {run.name}", _all(run, "p/"), "update", "probability p_k(t)")
        if run.line("objective"):
            draw(f"Objective of {run.name}", _of([run], "objective"), "update", "mean squared error + lambda cost")
    return draw.figures


def _system(runs: Sequence[_Run]) -> list[Markup]:
    draw = _Drawer()
    for metric, label in _SYSTEM.items():
        draw(label[0].upper() + label[1:].split(" [")[0], _of(runs, metric), "optimizer step", label)
    return draw.figures


def _of(runs: Sequence[_Run], metric: str) -> dict[str, Line]:
    return {run.name: line for run in runs if (line := run.line(metric))}


def _all(run: _Run, prefix: str) -> dict[str, Line]:
    return {name.removeprefix(prefix): line for name in run.names(prefix) if (line := run.line(name))}


class _Drawer:
    """Draws curves, those that have a line, and keeps them as figures of the page."""

    def __init__(self) -> None:
        self.figures: list[Markup] = []

    def __call__(self, title: str, lines: Mapping[str, Line], x: str, y: str, logarithmic: bool = False) -> None:
        if lines:
            drawn = _png(lambda path: curves(lines, path, x, y, title, logarithmic))
            self.figures.append(figure(drawn, f"Figure: {title}, {y} against {x}, for {', '.join(lines)}", f"{title}."))


def _png(draw: Callable[[Path], None]) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        draw(path)
        return path.read_bytes()


def _grids(home: Path | None) -> list[Markup]:
    if home is None:
        return []
    shown = []
    for row in _rows(home)[0]:
        path = home / "grids" / f"{row.picture}.png"
        if path.exists():
            target = f", {row.target}" if row.target else ""
            words = f"{row.sampler}, {row.steps} steps{target}; level {row.level}"
            shown.append(figure(path.read_bytes(), f"Samples of {words}", words, "grid"))
    return shown


def _config(folder: Path) -> list[Markup]:
    path = folder / "config.yaml"
    return [tag("pre", path.read_text(encoding="utf-8"))] if path.exists() else []


def _text(value: Any) -> Cell:
    return Cell(str(value), str(value))


def _number(value: Any, style: str) -> Cell:
    return Cell(format(value, style), value) if _is_number(value) else Cell("–", None)


def _scaled(value: Any, factor: float) -> float | None:
    return value * factor if _is_number(value) else None
