"""The figures of samplers: error against time, against cost, and quality against network evaluations."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from textwrap import fill
from typing import TYPE_CHECKING

from mlem.comparison.row import Row
from mlem.plots.style import COLOURS, STYLES, figure_with_axes, in_digits, legend_key, panels, positive, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

__all__ = ["coupled_errors", "error_vs_time", "quality_vs_evaluations"]


def error_vs_time(rows: Sequence[Row], path: str | os.PathLike[str], caption: str) -> None:
    """Error to the reference against time per image, log-log: colours are levels, markers and lines are samplers.

    Args:
        rows: those of one level and sampler are joined in the order of steps; bars are one standard error.
        path: of the PNG.
        caption: data set, number of samples, steps of the reference, seeds, device.

    Raises:
        ValueError: for no rows, and for values that a logarithm cannot show.
    """
    _refuse_empty(rows, "error_vs_time")
    for row in rows:
        if not (positive(row.seconds) and positive(row.mse) and row.mse_stderr >= 0):
            raise ValueError(f"error_vs_time needs seconds and mse above 0 and a standard error, got {row}")
    colours = dict(zip(dict.fromkeys(row.level for row in rows), cycle(COLOURS), strict=False))
    styles = dict(zip(dict.fromkeys(row.sampler for row in rows), cycle(STYLES), strict=False))
    figure, axes = figure_with_axes("time per image [ms]", "mean squared error to the reference", caption)
    axes.set(xscale="log", yscale="log")
    in_digits(axes.xaxis)
    for level, colour in colours.items():
        for sampler, (marker, line) in styles.items():
            points = sorted(_of(rows, level, sampler), key=lambda row: row.steps)
            axes.errorbar(
                [1e3 * row.seconds for row in points],
                [row.mse for row in points],
                yerr=[row.mse_stderr for row in points],
                color=colour,
                marker=marker,
                linestyle=line,
                capsize=2,
                elinewidth=0.8,
            )
    handles = [legend_key(level, colour, "", "-") for level, colour in colours.items()]
    figure.legend(handles=handles, title="level", loc="outside right upper", frameon=False)
    handles = [legend_key(sampler, "0.3", marker, line) for sampler, (marker, line) in styles.items()]
    figure.legend(handles=handles, title="sampler", loc="outside right lower", frameon=False)
    save(figure, path)


def _of(rows: Sequence[Row], level: str, sampler: str) -> list[Row]:
    return [row for row in rows if (row.level, row.sampler) == (level, sampler)]


def _refuse_empty(rows: Sequence[Row], figure: str) -> None:
    if not rows:
        raise ValueError(f"{figure} has nothing to draw: no rows")


_COSTS: tuple[tuple[str, Callable[[Row], float]], ...] = (
    ("time [ms] per image", lambda row: 1e3 * row.seconds),
    ("MFLOPs per image", lambda row: 1e-6 * row.flops),
)
"""The panels of `coupled_errors`: label of the x axis, and what is on it."""


def coupled_errors(
    rows: Sequence[Row],
    best: Sequence[Row],
    path: str | os.PathLike[str],
    caption: str,
    pictures: Mapping[str, tuple[Row | None, Image]],
) -> None:
    """Error against time and FLOPs: samplers of one level as lines, levels together as points, the best ones large.

    Args:
        rows: those of one level and sampler are joined in the order of steps.
        best: of the rows with a plan, those that are marked, and joined in the order of steps and delta.
        path: of the PNG.
        caption: data set, number of samples, steps of the reference, seeds, device.
        pictures: "A: words" or a name -> the row that it belongs to, or None, and its samples.

    Raises:
        ValueError: for no rows, and for values that a logarithm cannot show.
    """
    _refuse_empty(rows, "coupled_errors")
    for row in rows:
        if not all(positive(value) for value in (row.seconds, row.flops, row.mse)):
            raise ValueError(f"coupled_errors needs seconds, flops and mse above 0, got {row}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.5), dpi=150, layout="constrained")
    grid = figure.add_gridspec(1, 3, width_ratios=(5, 5, 3.4))
    letters = {words.partition(":")[0]: row for words, (row, _) in pictures.items() if row is not None}
    for place, (label, cost) in enumerate(_COSTS):
        axes = figure.add_subplot(grid[place], xlabel=label)
        axes.set(xscale="log", yscale="log", ylabel="mean squared error to the reference")
        axes.grid(which="major", color="0.9")
        axes.set_axisbelow(True)
        _coupled_panel(axes, rows, best, cost)
        for letter, row in letters.items():
            axes.annotate(letter, (cost(row), row.mse), (4, 5), textcoords="offset points", fontweight="bold")
    figure.axes[0].legend(fontsize="x-small", frameon=False)
    figure.suptitle(fill(caption, 170), fontsize="small", x=0.01, ha="left", color="0.3")
    strips = grid[2].subgridspec(max(1, len(pictures)), 1)
    for number, (words, (_, image)) in enumerate(pictures.items()):
        axes = figure.add_subplot(strips[number])
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
        axes.set_title(words, fontsize="small", loc="left", pad=2)
    save(figure, path)


def _coupled_panel(axes: Axes, rows: Sequence[Row], best: Sequence[Row], cost: Callable[[Row], float]) -> None:
    """Lines of levels alone and points of levels that share the work, against `cost`."""
    several = len({row.solver for row in rows}) > 1

    def named(name: str, solver: str) -> str:
        return f"{name} ({solver})" if several else name

    def against(points: Sequence[Row]) -> tuple[list[float], list[float]]:
        return [cost(row) for row in points], [row.mse for row in points]

    alone = [row for row in rows if not row.shared]
    lines = list(dict.fromkeys((row.sampler, row.solver, row.levels) for row in alone))
    greys = [f"{0.75 * (1 - number / len(lines)):.2f}" for number in range(1, len(lines) + 1)]  # from light to black
    for line, shade, (_, style) in zip(lines, greys, cycle(STYLES), strict=False):
        points = [row for row in alone if (row.sampler, row.solver, row.levels) == line]
        points.sort(key=lambda row: row.steps)
        bars, label = [row.mse_stderr for row in points], named(f"{line[0]}, level {line[2]}", line[1])
        axes.errorbar(*against(points), bars, color=shade, linestyle=style, marker=".", elinewidth=0.8, label=label)
    together = list(dict.fromkeys((row.sampler, row.solver) for row in rows if row.shared))
    for one, colour, (marker, _) in zip(together, cycle(COLOURS), cycle(STYLES), strict=False):
        own, marked = (
            [row for row in some if row.shared and (row.sampler, row.solver) == one] for some in (rows, best)
        )
        axes.plot(*against(own), marker, color=colour, markersize=3, alpha=0.35, markeredgewidth=0)
        marked.sort(key=lambda row: (row.steps, row.delta or 0.0))
        look = {"color": colour, "linestyle": "-", "linewidth": 0.6, "markeredgecolor": "black"}
        axes.plot(*against(marked), marker, label=named(*one), **look)


def quality_vs_evaluations(rows: Sequence[Row], path: str | os.PathLike[str], caption: str) -> None:
    """Error to the reference, and FID beside it where it was measured, against network evaluations (NFE) of an image.

    Args:
        rows: those of the last level that runs alone are drawn, a line for each sampler.
        path: of the PNG.
        caption: as for `error_vs_time`.

    Raises:
        ValueError: for no rows, and for none of a level that runs alone.
    """
    _refuse_empty(rows, "quality_vs_evaluations")
    alone = [row.level for row in rows if not row.shared]
    if not alone:
        raise ValueError("quality_vs_evaluations has nothing to draw: no level runs alone")
    largest = alone[-1]
    rows = [row for row in rows if row.level == largest]
    fid = next((name for name in rows[0].scores if name.startswith("fid_") and not name.endswith("_std")), None)
    labels = ["mean squared error to the reference", *([fid] if fid else [])]
    figure, axes_of = panels("network calls per image", labels, f"level {largest}; {caption}")
    # the eighth has the first colour again, with another marker and line
    pairs = [(COLOURS[i % len(COLOURS)], STYLES[(i + i // len(COLOURS)) % len(STYLES)]) for i in range(49)]
    looks = dict(zip(dict.fromkeys(row.sampler for row in rows), cycle(pairs), strict=False))
    for axes, score in zip(axes_of, (None, fid), strict=False):
        axes.set(xscale="log", yscale="log")
        for sampler, (colour, (marker, line)) in looks.items():
            own = sorted(_of(rows, largest, sampler), key=lambda row: row.evaluations)
            points = [(row, value) for row in own if (value := _quality(row, score)) > 0]
            x, y = [row.evaluations for row, _ in points], [value for _, value in points]
            bars = [row.mse_stderr for row, _ in points] if score is None else None
            axes.errorbar(x, y, yerr=bars, color=colour, marker=marker, linestyle=line, capsize=2, elinewidth=0.8)
        for axis in (axes.xaxis, *([axes.yaxis] if score is not None else [])):
            in_digits(axis)
    handles = [legend_key(sampler, colour, marker, line) for sampler, (colour, (marker, line)) in looks.items()]
    figure.legend(handles=handles, title="sampler", loc="outside right upper", frameon=False)
    save(figure, path)


def _quality(row: Row, score: str | None) -> float:
    """The error, or a score by name; NaN where it was not measured."""
    return row.mse if score is None else row.scores.get(score, math.nan)
