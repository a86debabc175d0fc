"""The figures: error against time, error by noise level, scaling laws, p_k. Rows of numbers in, PNG out.

Drawn with Figure objects, never pyplot: no global state, no display. Files appear whole or not at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from mlem.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike
    from PIL.Image import Image

# Okabe and Ito (2008), distinct for all common kinds of colour blindness; yellow left out: too pale on white
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = (
    ("o", "-"),
    ("s", "--"),
    ("^", "-."),
    ("D", ":"),
    ("v", (0, (5, 1))),
    ("P", (0, (3, 1, 1, 1))),
    ("X", (0, (1, 1))),
)
MULTILEVEL = "mlem"
"""What stands in the place of a level's name where several share the work."""
_ERROR_COLUMNS = ("level", "sampler", "steps", "seconds_per_image", "mse", "mse_stderr")
_SCALING_COLUMNS = ("cost", "value", "line_cost", "line", "low", "high", "gamma", "interval")


def error_vs_time(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], caption: str) -> None:
    """Error to the reference against time per image, log-log: colours are levels, markers and lines are samplers.

    rows: mappings with level, sampler, steps, seconds_per_image, mse, mse_stderr; points of one level and sampler are
    joined in the order of steps, bars are one standard error. caption: data set, number of samples, steps of the
    reference, seeds, device. Raises ValueError for no rows, missing columns, and values that a logarithm cannot show.
    """
    _need(rows, _ERROR_COLUMNS, "error_vs_time")
    for row in rows:
        if not (_positive(row["seconds_per_image"]) and _positive(row["mse"]) and row["mse_stderr"] >= 0):
            raise ValueError(f"error_vs_time needs seconds and mse above 0 and a standard error, got {dict(row)}")
    colours = dict(zip(_distinct(rows, "level"), cycle(_COLOURS), strict=False))
    styles = dict(zip(_distinct(rows, "sampler"), cycle(_STYLES), strict=False))
    figure, axes = _figure("time per image [ms]", "mean squared error to the reference", caption)
    axes.set(xscale="log", yscale="log")
    _in_digits(axes.xaxis)
    for level, colour in colours.items():
        for sampler, (marker, line) in styles.items():
            points = [row for row in rows if (row["level"], row["sampler"]) == (level, sampler)]
            points.sort(key=lambda row: row["steps"])
            axes.errorbar(
                [1e3 * row["seconds_per_image"] for row in points],
                [row["mse"] for row in points],
                yerr=[row["mse_stderr"] for row in points],
                color=colour,
                marker=marker,
                linestyle=line,
                capsize=2,
                elinewidth=0.8,
            )
    handles = [_key(str(level), colour, "", "-") for level, colour in colours.items()]
    figure.legend(handles=handles, title="level", loc="outside right upper", frameon=False)
    handles = [_key(str(sampler), "0.3", marker, line) for sampler, (marker, line) in styles.items()]
    figure.legend(handles=handles, title="sampler", loc="outside right lower", frameon=False)
    _save(figure, path)


def coupled_errors(
    rows: Sequence[Mapping[str, Any]],
    best: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    caption: str,
    pictures: Mapping[str, tuple[Mapping[str, Any] | None, Image]],
) -> None:
    """Error against time and FLOPs, one sampler at a time alone (lines) and levels together (points, best ones large).

    rows: mappings with sampler, solver, levels, plan (empty: one level alone), delta, steps, wall_seconds, flops, mse,
    mse_stderr; those of one level and sampler are joined in the order of steps. best: which of the others are marked,
    and joined in the order of steps and delta. pictures: "A: words", or a name -> the row that it stands at (or None),
    and its samples. Raises ValueError for no rows, missing columns, and values that a logarithm cannot show.
    """
    _need(rows, (*_ERROR_COLUMNS[1:3], "solver", "levels", "plan", "delta", "wall_seconds", "flops", "mse"), "coupled")
    for row in rows:
        if not all(_positive(row[column]) for column in ("wall_seconds", "flops", "mse")):
            raise ValueError(f"coupled_errors needs seconds, flops and mse above 0, got {dict(row)}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.5), dpi=150, layout="constrained")
    grid = figure.add_gridspec(1, 3, width_ratios=(5, 5, 3.4))
    letters = {words.partition(":")[0]: row for words, (row, _) in pictures.items() if row is not None}
    for place, (column, scale, label) in enumerate((("wall_seconds", 1e3, "time [ms]"), ("flops", 1e-6, "MFLOPs"))):
        axes = figure.add_subplot(grid[place], xlabel=f"{label} per image")
        axes.set(xscale="log", yscale="log", ylabel="mean squared error to the reference")
        axes.grid(which="major", color="0.9")
        axes.set_axisbelow(True)
        _coupled_panel(axes, rows, best, column, scale)
        for letter, row in letters.items():
            at = (scale * row[column], row["mse"])
            axes.annotate(letter, at, (4, 5), textcoords="offset points", fontweight="bold")
    figure.axes[0].legend(fontsize="x-small", frameon=False)
    figure.suptitle(fill(caption, 170), fontsize="small", x=0.01, ha="left", color="0.3")
    strips = grid[2].subgridspec(max(1, len(pictures)), 1)
    for number, (words, (_, image)) in enumerate(pictures.items()):
        axes = figure.add_subplot(strips[number])
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
        axes.set_title(words, fontsize="small", loc="left", pad=2)
    _save(figure, path)


def _coupled_panel(
    axes: Axes, rows: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]], column: str, scale: float
) -> None:
    """Lines of what ran alone and points of what shared the work, against `column`."""
    solvers = _distinct(rows, "solver")

    def named(name: str, solver: str) -> str:
        return f"{name} ({solver})" if len(solvers) > 1 else name

    def against(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
        return [scale * row[column] for row in points], [row["mse"] for row in points]

    alone = [row for row in rows if not row["plan"]]
    lines = list(dict.fromkeys((row["sampler"], row["solver"], row["levels"]) for row in alone))
    greys = [f"{0.75 * (1 - number / len(lines)):.2f}" for number in range(1, len(lines) + 1)]  # from light to black
    for key, shade, (_, line) in zip(lines, greys, cycle(_STYLES), strict=False):
        points = [row for row in alone if (row["sampler"], row["solver"], row["levels"]) == key]
        points.sort(key=lambda row: row["steps"])
        bars, label = [row["mse_stderr"] for row in points], named(f"{key[0]}, level {key[2]}", key[1])
        axes.errorbar(*against(points), bars, color=shade, linestyle=line, marker=".", elinewidth=0.8, label=label)
    together = list(dict.fromkeys((row["sampler"], row["solver"]) for row in rows if row["plan"]))
    for key, colour, (marker, _) in zip(together, cycle(_COLOURS), cycle(_STYLES), strict=False):
        own, marked = (
            [row for row in some if row["plan"] and (row["sampler"], row["solver"]) == key] for some in (rows, best)
        )
        axes.plot(*against(own), marker, color=colour, markersize=3, alpha=0.35, markeredgewidth=0)
        marked.sort(key=lambda row: (row["steps"], row["delta"] or 0.0))
        style = {"color": colour, "linestyle": "-", "linewidth": 0.6, "markeredgecolor": "black"}
        axes.plot(*against(marked), marker, label=named(*key), **style)


def quality_vs_evaluations(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], caption: str) -> None:
    """Error to the reference, and beside it FID where there is one, against network calls for each image.

    rows: mappings with level, sampler, steps, evaluations, mse, mse_stderr (None where a sampler has no reference) and
    maybe fid_*; a line for each sampler, those of the last level that runs alone. caption: as for `error_vs_time`.
    Raises ValueError for no rows, none of a level that runs alone, and missing columns.
    """
    _need(rows, ("level", "sampler", "steps", "evaluations", "mse", "mse_stderr"), "quality_vs_evaluations")
    alone = [row["level"] for row in rows if row["level"] != MULTILEVEL]
    if not alone:
        raise ValueError("quality_vs_evaluations has nothing to draw: no level runs alone")
    largest = alone[-1]
    rows = [row for row in rows if row["level"] == largest]
    fid = next((name for name in rows[0] if name.startswith("fid_") and not name.endswith("_std")), None)
    measures = [("mse", "mean squared error to the reference"), *([(fid, fid)] if fid else [])]
    figure, panels = _panels("network calls per image", [label for _, label in measures], f"level {largest}; {caption}")
    # the eighth has the first colour again, with another marker and line
    pairs = [(_COLOURS[i % len(_COLOURS)], _STYLES[(i + i // len(_COLOURS)) % len(_STYLES)]) for i in range(49)]
    looks = dict(zip(_distinct(rows, "sampler"), cycle(pairs), strict=False))
    for axes, (column, _) in zip(panels, measures, strict=True):
        axes.set(xscale="log", yscale="log")
        for sampler, (colour, (marker, line)) in looks.items():
            points = [row for row in rows if row["sampler"] == sampler and row[column]]
            points.sort(key=lambda row: row["evaluations"])
            bars = [row["mse_stderr"] for row in points] if column == "mse" else None
            x, y = ([row[name] for row in points] for name in ("evaluations", column))
            axes.errorbar(x, y, yerr=bars, color=colour, marker=marker, linestyle=line, capsize=2, elinewidth=0.8)
        for axis in (axes.xaxis, *([axes.yaxis] if column == fid else [])):
            _in_digits(axis)
    handles = [_key(str(sampler), colour, marker, line) for sampler, (colour, (marker, line)) in looks.items()]
    figure.legend(handles=handles, title="sampler", loc="outside right upper", frameon=False)
    _save(figure, path)


def grid_name(row: Mapping[str, Any]) -> str:
    """Name of the file that shows the samples of a row of `evaluation.json`, without its suffix."""
    dial = f"_{row['dial']}" if row.get("dial") else ""
    return f"{row['level']}_{row['sampler']}_{row['steps']}{dial}"


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | os.PathLike[str],
    xlabel: str,
    ylabel: str,
    caption: str,
    logarithmic: bool = False,
) -> None:
    """Lines against steps or time: name -> (x, y), each (N,), in the order in which they are joined.

    logarithmic: the y axis, on which values that are not above 0 leave gaps. Labels hold units. Raises ValueError for
    no lines and lengths that differ.
    """
    if not lines:
        raise ValueError("curves has nothing to draw: no lines")
    figure, axes = _figure(xlabel, ylabel, caption)
    if logarithmic:
        axes.set_yscale("log", nonpositive="mask")
    # seven colours, then the same seven in another style
    looks = [(colour, line) for _, line in _STYLES for colour in _COLOURS]
    for (name, (x, y)), (colour, line) in zip(lines.items(), cycle(looks), strict=False):
        if len(x) != len(y):
            raise ValueError(f"line {name!r} needs as many x as y, got {len(x)} and {len(y)}")
        marker = "o" if len(x) < 30 else None
        axes.plot(x, y, color=colour, linestyle=line, marker=marker, markersize=3, label=_plain(name))
    figure.legend(loc="outside right upper", frameon=False)
    _save(figure, path)


def error_by_noise_level(
    curves: Mapping[Any, tuple[ArrayLike, ArrayLike]], path: str | os.PathLike[str], caption: str
) -> None:
    """Denoising error against the log signal-to-noise ratio, a line for each level, error axis logarithmic.

    curves: level -> (log_snr, error), each (K,): log(alpha^2/sigma^2), natural, and the mean squared error of the noise
    estimate. caption: data set, number of images, training steps. Raises ValueError for no curves, lengths that
    differ, errors not above 0.
    """
    import numpy as np

    if not curves:
        raise ValueError("error_by_noise_level has nothing to draw: no curves")
    xlabel = r"log signal-to-noise ratio, $\log(\alpha^2/\sigma^2)$"
    figure, axes = _figure(xlabel, "mean squared error of the noise estimate", caption)
    axes.set(yscale="log")
    for (level, curve), colour in zip(curves.items(), cycle(_COLOURS), strict=False):
        log_snr, error = (np.asarray(values, dtype=float) for values in curve)
        if log_snr.shape != error.shape or log_snr.ndim != 1 or not all(_positive(value) for value in error):
            shapes = f"log_snr {log_snr.shape}, error {error.shape}"
            raise ValueError(f"curve {level!r} needs two equally long lists and errors above 0, got {shapes}")
        order = log_snr.argsort()
        axes.plot(log_snr[order], error[order], color=colour, marker="o", markersize=3, label=str(level))
    figure.legend(title="level", loc="outside right upper", frameon=False)
    _save(figure, path)


def probabilities(
    log_snr: ArrayLike,
    curves: Mapping[Any, tuple[ArrayLike, ArrayLike]],
    path: str | os.PathLike[str],
    caption: str,
) -> None:
    """Probabilities p_k of running each level against the log signal-to-noise ratio, before (dashed) and after.

    log_snr: (R,), natural. curves: level -> (before, after), each (R,), in [0, 1]. caption: data set, solver, steps.
    Raises ValueError for no curves, lengths that differ, values outside [0, 1].
    """
    import numpy as np

    if not curves:
        raise ValueError("probabilities has nothing to draw: no curves")
    at = np.asarray(log_snr, dtype=float)
    order = at.argsort()
    figure, axes = _figure(r"log signal-to-noise ratio, $\log(\alpha^2/\sigma^2)$", "probability $p_k$", caption)
    axes.set(ylim=(-0.02, 1.02))
    for (level, curve), colour in zip(curves.items(), cycle(_COLOURS), strict=False):
        for p, line in zip((np.asarray(values, dtype=float) for values in curve), ("--", "-"), strict=True):
            if p.shape != at.shape or not bool(((p >= 0) & (p <= 1)).all()):
                raise ValueError(f"curve {level!r} needs values in [0, 1] of shape {at.shape}, got shape {p.shape}")
            axes.plot(at[order], p[order], color=colour, linestyle=line, label=str(level) if line == "-" else None)
    levels, names = axes.get_legend_handles_labels()
    figure.legend(levels, names, title="level", loc="outside right upper", frameon=False)
    handles = [_key("before", "0.3", "", "--"), _key("after", "0.3", "", "-")]
    figure.legend(handles=handles, loc="outside right lower", frameon=False)
    _save(figure, path)


def scaling_law(
    curves: Mapping[str, Mapping[str, Any]],
    path: str | os.PathLike[str],
    caption: str,
    unit: str = "seconds per image",
) -> None:
    """Error against cost of the levels, log-log, with fitted power laws and their bootstrap bands.

    curves: name, such as "error - floor" or "level difference" -> a mapping with cost and value (K,), the mean squared
    points; line_cost, line, low, high (M,), the fit and its band; gamma and interval (low, high), for the legend. unit:
    of cost. caption: data set, number of images, training steps. Raises ValueError for no curves, missing entries,
    lengths that differ, and values that a logarithm cannot show.
    """
    import numpy as np

    _need(list(curves.values()), _SCALING_COLUMNS, "scaling_law")
    figure, axes = _figure(f"cost [{unit}]", "mean squared error", caption)
    axes.set(xscale="log", yscale="log")
    for (name, curve), colour, (marker, line) in zip(curves.items(), cycle(_COLOURS), cycle(_STYLES), strict=False):
        arrays = {column: np.asarray(curve[column], dtype=float) for column in _SCALING_COLUMNS[:6]}
        for columns in (_SCALING_COLUMNS[:2], _SCALING_COLUMNS[2:6]):
            shapes = {arrays[column].shape for column in columns}
            if len(shapes) > 1 or not all(_positive(value) for column in columns for value in arrays[column]):
                raise ValueError(f"curve {name!r} needs {', '.join(columns)} of one length and above 0")
        low, high = curve["interval"]
        label = rf"{name}: $\gamma$ = {curve['gamma']:.2f} ({low:.2f} to {high:.2f})"
        axes.fill_between(arrays["line_cost"], arrays["low"], arrays["high"], color=colour, alpha=0.2, linewidth=0)
        axes.plot(arrays["line_cost"], arrays["line"], color=colour, linestyle=line)
        axes.plot(arrays["cost"], arrays["value"], color=colour, marker=marker, linestyle="", label=label)
    figure.legend(loc="outside lower center", frameon=False)
    _save(figure, path)


def _figure(xlabel: str, ylabel: str, caption: str) -> tuple[Figure, Axes]:
    figure, (axes,) = _panels(xlabel, [ylabel], caption)
    return figure, axes


def _panels(xlabel: str, ylabels: Sequence[str], caption: str) -> tuple[Figure, list[Axes]]:
    """A panel for each ylabel, side by side; the caption stands above the first."""
    from matplotlib.figure import Figure

    width = 3.0 + 4.5 * len(ylabels)
    figure = Figure(figsize=(width, 4.5), dpi=150, layout="constrained")
    panels = [figure.add_subplot(1, len(ylabels), i, xlabel=xlabel, ylabel=y) for i, y in enumerate(ylabels, 1)]
    # wrapped here, since matplotlib would let it run on under the legend
    panels[0].set_title(fill(caption, 72), fontsize="small", loc="left", color="0.3")
    for axes in panels:
        axes.grid(which="major", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _key(label: str, colour: str, marker: str, line: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, linestyle=line, label=label)


def _in_digits(axis: Axis) -> None:
    """Label a logarithmic axis with 10 and 100, not powers, and between them where there is room."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.4)))


def _plain(text: str) -> str:
    """Text in which matplotlib sees no mathematics and nothing to hide."""
    return " " + text.replace("$", r"\$") if text.startswith("_") else text.replace("$", r"\$")


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    if Path(path).suffix != ".png":
        raise ValueError(f"figures are PNG files, got {path}")
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = axis.get_view_interval()
        if axis.get_scale() == "log" and high < 1.1 * low:  # one value alone: no width, and a layout that divides by it
            axis.set_view_interval(low / 1.5, high * 1.5, ignore=True)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _need(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], figure: str) -> None:
    if not rows:
        raise ValueError(f"{figure} has nothing to draw: no rows")
    for row in rows:
        missing = [column for column in columns if column not in row]
        if missing:
            raise ValueError(
                f"{figure} needs {', '.join(columns)} in every row, {missing[0]} is missing in {dict(row)}"
            )


def _distinct(rows: Sequence[Mapping[str, Any]], column: str) -> list[Any]:
    """The different values of a column in the order of their first appearance."""
    return list(dict.fromkeys(row[column] for row in rows))


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
