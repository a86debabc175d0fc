"""The sections of a run folder's page, made from the files that training and evaluation write.

A folder is one run (`runs/digits/unet_s`) or holds several (`runs/digits`); whatever is missing is left out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlem.files import read_object, write_text
from mlem.plots import curves
from mlem.report.advice import advice
from mlem.report.html import Markup, figure, join, page, section, tag
from mlem.report.logs import Line, RunLog, run_logs
from mlem.report.plans import plan_figures
from mlem.report.samples import sample_strips
from mlem.report.tables import equal_error, level_table, rivals, sampler_table

__all__ = ["write_report"]

_PICTURES = {
    "error_vs_time": "Mean squared error to the many-step reference against time per image in milliseconds",
    "quality_vs_evaluations": "Mean squared error, SSIM, and FID where measured, against network calls per image",
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
    """Write `report.html` in a run folder and return its path. Raises ValueError if there is no run."""
    folder = Path(folder)
    runs, evaluated = list(run_logs(folder)), _evaluation(folder)
    if not runs and evaluated is None:
        raise ValueError(f"{folder} holds no run: no metrics.jsonl and no evaluation.json in it or one level below")
    about, head = _about(folder), advice(folder)
    sections = [
        section("Error and time of every rival", *rivals(folder), class_="plots"),
        section("Error, time and calls", *_pictures(folder, evaluated), class_="plots"),
        section("Calls along a trajectory", *plan_figures(folder, evaluated or folder), class_="plots"),
        section("Samples, side by side", *sample_strips(evaluated)),
        section("Samplers", *sampler_table(evaluated)),
        section("Samplers at equal error", *equal_error(folder)),
        section("Levels", *level_table(folder)),
        section("Training", *_training(runs), class_="plots"),
        section("Coefficients", *_coefficients(runs), class_="plots"),
        section("System", *_system(runs), class_="plots"),
        section("Config", *_config(folder)),
    ]
    title = f"{about.get('name', folder.resolve().name)} · mlem"
    write_text(folder / "report.html", page(title, tag("h1", title), head, _facts(folder, about), *sections))
    return folder / "report.html"


def _evaluation(folder: Path) -> Path | None:
    homes = (folder, folder / "evaluation")
    return next((home for home in homes if (home / "evaluation.json").exists()), None)


def _about(folder: Path) -> dict[str, Any]:
    return read_object(folder / "run.json") if (folder / "run.json").exists() else {}


def _facts(folder: Path, about: Mapping[str, Any]) -> Markup:
    facts = {"folder": folder.resolve().name, "git commit": about.get("commit", "unknown")}
    facts |= {"version": about.get("version", "unknown"), "begun": about.get("time", "unknown")}
    return tag("dl", *(join([tag("dt", name), tag("dd", str(value))]) for name, value in facts.items()))


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


def _training(runs: Sequence[RunLog]) -> list[Markup]:
    steps, square = "optimizer step", "mean squared error"
    draw = _Drawer()
    draw("Training loss", _of(runs, "train/loss"), steps, f"{square} of the prediction", True)
    draw("Held-out denoising error", _of(runs, "val/error"), steps, f"{square} of the noise estimate", True)
    levels = {run.name: line for run in runs if (line := run.last("val/error_t"))}
    draw("Error by noise level at the last validation", levels, "time t in [0, 1]", square, True)
    return draw.figures


def _coefficients(runs: Sequence[RunLog]) -> list[Markup]:
    draw = _Drawer()
    for run in runs:
        for symbol in ("alpha", "beta"):
            title = f"Learned {symbol}_k of {run.name}"
            draw(title, _all(run, f"{symbol}/"), "update", f"{symbol}_k [dimensionless]")
        draw(f"p_k(t) of {run.name}", _all(run, "p/"), "update", "probability p_k(t)")
        if run.line("objective"):
            draw(f"Objective of {run.name}", _of([run], "objective"), "update", "mean squared error + lambda cost")
    return draw.figures


def _system(runs: Sequence[RunLog]) -> list[Markup]:
    draw = _Drawer()
    for metric, label in _SYSTEM.items():
        draw(label[0].upper() + label[1:].split(" [")[0], _of(runs, metric), "optimizer step", label)
    return draw.figures


def _of(runs: Sequence[RunLog], metric: str) -> dict[str, Line]:
    return {run.name: line for run in runs if (line := run.line(metric))}


def _all(run: RunLog, prefix: str) -> dict[str, Line]:
    return {name.removeprefix(prefix): line for name in run.names(prefix) if (line := run.line(name))}


class _Drawer:
    """Draws curves that have data and keeps them as figures of the page."""

    def __init__(self) -> None:
        self.figures: list[Markup] = []

    def __call__(self, title: str, lines: Mapping[str, Line], x: str, y: str, logarithmic: bool = False) -> None:
        if lines:
            frozen = tuple((name, tuple(line[0]), tuple(line[1])) for name, line in lines.items())
            drawn = _curves(frozen, x, y, title, logarithmic)
            self.figures.append(figure(drawn, f"Figure: {title}, {y} against {x}, for {', '.join(lines)}", f"{title}."))


@lru_cache(64)
def _curves(lines: tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...], *labels: Any) -> bytes:
    """The PNG of these lines, cached: a command writes the report after training and after evaluation."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        curves({name: (x, y) for name, x, y in lines}, path, *labels)
        return path.read_bytes()


def _config(folder: Path) -> list[Markup]:
    path = folder / "config.yaml"
    return [tag("pre", path.read_text(encoding="utf-8", errors="replace"))] if path.exists() else []
