"""The figures of samplers: error and similarity against time, error against cost, quality against evaluations."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from textwrap import fill
from typing import TYPE_CHECKING, Any

from mlem.comparison.fastest import Fastest, Measured
from mlem.comparison.row import Row
from mlem.plots.style import COLOURS, FILLS, STYLES, figure_with_axes, in_digits, legend_key, panels, positive, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

__all__ = ["coupled_errors", "error_vs_time", "quality_vs_evaluations", "rivals_vs_time", "similarity_vs_time"]


@dataclass(frozen=True)
class _Quality:
    """A quantity on a y axis.

    Attributes:
        label: of the axis.
        of: value of a row, with its standard error; NaN if not measured.
        scale: of the axis.
    """

    label: str
    of: Callable[[Row], tuple[float, float]]
    scale: str = "log"

    def shows(self, row: Row) -> bool:
        """Whether the axis can show this row."""
        value, _ = self.of(row)
        return positive(value) if self.scale == "log" else math.isfinite(value)


_MSE = _Quality("mean squared error to the reference", lambda row: (row.mse, row.mse_stderr))
_PSNR = _Quality("PSNR to the reference [dB]", lambda row: (row.psnr, row.psnr_stderr), "linear")
_SSIM = _Quality("1 - SSIM to the reference", lambda row: (1 - row.ssim, row.ssim_stderr))


def error_vs_time(rows: Sequence[Row], path: str | os.PathLike[str], caption: str) -> None:
    """Error to the reference against time per image, log-log.

    Colours and the fill of markers are levels, markers and lines are samplers.

    Args:
        rows: those of one level and sampler are joined in the order of steps; bars are one standard error.
        path: of the PNG.
        caption: data set, number of samples, steps of the reference, seeds, device.

    Raises:
        ValueError: no rows, or values that are not positive.
    """
    _refuse_empty(rows, "error_vs_time")
    for row in rows:
        if not (positive(row.seconds) and positive(row.mse) and row.mse_stderr >= 0):
            raise ValueError(f"error_vs_time needs seconds and mse above 0 and a standard error, got {row}")
    looks = zip(cycle(COLOURS), cycle(FILLS), strict=False)
    levels = dict(zip(dict.fromkeys(row.level for row in rows), looks, strict=False))
    styles = dict(zip(dict.fromkeys(row.sampler for row in rows), cycle(STYLES), strict=False))
    figure, axes = figure_with_axes("time per image [ms]", _MSE.label, caption)
    axes.set(xscale="log", yscale="log")
    in_digits(axes.xaxis)
    for level, (colour, filled) in levels.items():
        for sampler, (marker, line) in styles.items():
            points = sorted(_of(rows, level, sampler), key=lambda row: row.steps)
            axes.errorbar(
                [1e3 * row.seconds for row in points],
                [row.mse for row in points],
                yerr=[row.mse_stderr for row in points],
                color=colour,
                marker=marker,
                fillstyle=filled,
                markerfacecoloralt="white",
                linestyle=line,
                capsize=2,
                elinewidth=0.8,
            )
    handles = [legend_key(level, colour, "o", "-", filled) for level, (colour, filled) in levels.items()]
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
    ("time per image [ms]", lambda row: 1e3 * row.seconds),
    ("MFLOPs per image", lambda row: 1e-6 * row.flops),
)
"""The panels of `coupled_errors`: label and value of the x axis."""


def coupled_errors(
    rows: Sequence[Row],
    best: Sequence[Row],
    path: str | os.PathLike[str],
    caption: str,
    pictures: Mapping[str, tuple[Row | None, Image]],
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> None:
    """Error against time and FLOPs: single levels as lines, plans as points, the best ones large.

    Args:
        rows: those of one level and sampler are joined in the order of steps.
        best: the rows with a plan that are marked, and joined in the order of steps and delta.
        path: of the PNG.
        caption: data set, number of samples, steps of the reference, seeds, device.
        pictures: "A: words" or a name -> its row, or None, and its samples.
        curves: name -> FLOPs and predicted errors, above 0.

    Raises:
        ValueError: no rows, or values that are not positive.
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
        axes.set(xscale="log", yscale="log", ylabel=_MSE.label)
        axes.grid(which="major", color="0.9")
        axes.set_axisbelow(True)
        _coupled_panel(axes, rows, best, cost, _MSE)
        for letter, row in letters.items():
            axes.annotate(letter, (cost(row), row.mse), (4, 5), textcoords="offset points", fontweight="bold")
    for name, (flops, errors) in (curves or {}).items():
        axes = figure.axes[1]
        limits = axes.get_xlim(), axes.get_ylim()  # of what was measured
        look = {"color": "black", "linestyle": ":", "linewidth": 1}
        axes.plot([1e-6 * one for one in flops], errors, **look)
        axes.set(xlim=limits[0], ylim=limits[1])
        figure.axes[0].plot([], [], label=name, **look)
    figure.axes[0].legend(fontsize="x-small", frameon=False)
    figure.suptitle(fill(caption, 170), fontsize="small", x=0.01, ha="left", color="0.3")
    strips = grid[2].subgridspec(max(1, len(pictures)), 1)
    for number, (words, (_, image)) in enumerate(pictures.items()):
        axes = figure.add_subplot(strips[number])
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
        axes.set_title(words, fontsize="small", loc="left", pad=2)
    save(figure, path)


def similarity_vs_time(rows: Sequence[Row], best: Sequence[Row], path: str | os.PathLike[str], caption: str) -> None:
    """PSNR and 1 - SSIM to the reference against time, like the error in `coupled_errors`."""
    rows, best = ([row for row in some if _PSNR.shows(row) and _SSIM.shows(row)] for some in (rows, best))
    _refuse_empty(rows, "similarity_vs_time")
    (label, cost), *_ = _COSTS
    figure, axes_of = panels(label, [_PSNR.label, _SSIM.label], caption)
    for axes, quality in zip(axes_of, (_PSNR, _SSIM), strict=True):
        axes.set(xscale="log", yscale=quality.scale)
        _coupled_panel(axes, rows, best, cost, quality)
    handles, labels = axes_of[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="x-small", frameon=False)
    save(figure, path)


def _coupled_panel(
    axes: Axes, rows: Sequence[Row], best: Sequence[Row], cost: Callable[[Row], float], quality: _Quality
) -> None:
    """Lines of single levels and points of plans, against `cost`."""
    several = len({row.solver for row in rows}) > 1

    def named(name: str, solver: str) -> str:
        return f"{name} ({solver})" if several else name

    def against(points: Sequence[Row]) -> tuple[list[float], list[float]]:
        return [cost(row) for row in points], [quality.of(row)[0] for row in points]

    alone = [row for row in rows if not row.shared]
    lines = list(dict.fromkeys((row.sampler, row.solver, row.levels) for row in alone))
    greys = [f"{0.75 * (1 - number / len(lines)):.2f}" for number in range(1, len(lines) + 1)]  # from light to black
    for line, shade, (_, style) in zip(lines, greys, cycle(STYLES), strict=False):
        points = [row for row in alone if (row.sampler, row.solver, row.levels) == line]
        points.sort(key=lambda row: row.steps)
        bars, label = [quality.of(row)[1] for row in points], named(f"{line[0]}, level {line[2]}", line[1])
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
    """Error and SSIM to the reference, and FID if measured, against network evaluations (NFE) per image.

    Args:
        rows: those of the last level that runs alone are drawn, one line per sampler.
        path: of the PNG.
        caption: as for `error_vs_time`.

    Raises:
        ValueError: no rows, or none of a level that runs alone.
    """
    _refuse_empty(rows, "quality_vs_evaluations")
    alone = [row.level for row in rows if not row.shared]
    if not alone:
        raise ValueError("quality_vs_evaluations has nothing to draw: no level runs alone")
    largest = alone[-1]
    rows = [row for row in rows if row.level == largest]
    qualities = [_MSE, *([_SSIM] if any(map(_SSIM.shows, rows)) else [])]  # PSNR would repeat the error
    if (fid := rows[0].frechet) is not None:
        qualities.append(_Quality(fid, lambda row: (row.scores.get(fid, math.nan), math.nan)))
    labels = [quality.label for quality in qualities]
    figure, axes_of = panels("network calls per image", labels, f"level {largest}; {caption}")
    # the eighth has the first colour again, with another marker and line
    pairs = [(COLOURS[i % len(COLOURS)], STYLES[(i + i // len(COLOURS)) % len(STYLES)]) for i in range(49)]
    looks = dict(zip(dict.fromkeys(row.sampler for row in rows), cycle(pairs), strict=False))
    for axes, quality in zip(axes_of, qualities, strict=True):
        axes.set(xscale="log", yscale=quality.scale)
        for sampler, (colour, (marker, line)) in looks.items():
            own = sorted(filter(quality.shows, _of(rows, largest, sampler)), key=lambda row: row.evaluations)
            y, bars = [quality.of(row)[0] for row in own], [quality.of(row)[1] for row in own]
            look = {"color": colour, "marker": marker, "linestyle": line, "capsize": 2, "elinewidth": 0.8}
            axes.errorbar([row.evaluations for row in own], y, None if quality.label == fid else bars, **look)
        for axis in (axes.xaxis, *([axes.yaxis] if quality.label == fid else [])):
            in_digits(axis)
    handles = [legend_key(sampler, colour, marker, line) for sampler, (colour, (marker, line)) in looks.items()]
    figure.legend(handles=handles, title="sampler", loc="outside right upper", frameon=False)
    save(figure, path)


_OURS = ("hindsight", "hindsight on kept features", "recommended")
"""Rivals drawn in bold, the last one as black stars."""
_MARKERS = "osDv^Pp<>d*"


def rivals_vs_time(found: Fastest, path: str | os.PathLike[str]) -> None:
    """Error against time of every rival, log-log: its rows as points, the Pareto-optimal ones as a line.

    Rivals differ in marker and line, to be told apart in grey; mlem's are bold. Dotted: the targets; errors above ten
    times the largest target are left out.

    Raises:
        ValueError: there is no row to show.
    """
    most = 10 * max(found.targets, default=math.inf)
    rows = [row for row in found.rows if positive(row.seconds) and positive(row.mse) and row.mse <= most]
    if not rows:
        raise ValueError(f"rivals_vs_time has nothing to draw: no rows with seconds and an error in (0, {most:g}]")
    figure, axes = figure_with_axes("time per image [ms]", _MSE.label, str(found.about["caption"]))
    axes.set(xscale="log", yscale="log")
    in_digits(axes.xaxis)
    looks = zip(cycle(COLOURS), cycle(_MARKERS), cycle(STYLES), strict=False)
    for group, (colour, marker, (_, line)) in zip(found.groups, looks, strict=False):
        bold, advised = group in _OURS, group == _OURS[-1]
        look: dict[str, Any] = {"color": "black" if advised else colour, "marker": "*" if advised else marker}
        own = [row for row in rows if row.group == group]
        axes.plot(*_milliseconds(own), linestyle="", markersize=3, alpha=0.35, **look)
        look |= {"linewidth": 2.2, "markersize": 9, "zorder": 3} if bold else {"linewidth": 1, "markersize": 5}
        axes.plot(*_milliseconds(_unbeaten(own)), linestyle="-" if bold else line, label=group, **look)
    for target in found.targets:
        axes.axhline(target, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    figure.legend(loc="outside right upper", frameon=False)
    save(figure, path)


def _unbeaten(rows: Sequence[Measured]) -> list[Measured]:
    """The Pareto-optimal rows, by time."""
    kept: list[Measured] = []
    for row in sorted(rows, key=lambda one: (one.seconds, one.mse)):
        if not kept or row.mse < kept[-1].mse:
            kept.append(row)
    return kept


def _milliseconds(rows: Sequence[Measured]) -> tuple[list[float], list[float]]:
    return [1e3 * row.seconds for row in rows], [row.mse for row in rows]
