"""The style of all figures: colours, panels, captions, atomic saving.

Uses Figure objects, never pyplot: no global state, no display.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from mlem.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogFormatterSciNotation

__all__ = [
    "COLOURS",
    "FILLS",
    "STYLES",
    "figure_with_axes",
    "in_digits",
    "legend_key",
    "need",
    "panels",
    "plain",
    "positive",
    "save",
]

# Okabe and Ito (2008), distinct for all common kinds of colour blindness; yellow left out: too pale on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = (
    ("o", "-"),
    ("s", "--"),
    ("^", "-."),
    ("D", ":"),
    ("v", (0, (5, 1))),
    ("P", (0, (3, 1, 1, 1))),
    ("X", (0, (1, 1))),
)
"""Marker and line style."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
FILLS = ("full", "none", "left", "right", "top", "bottom")
"""How markers are filled, where colour must also be told apart in grey."""


def figure_with_axes(xlabel: str, ylabel: str, caption: str) -> tuple[Figure, Axes]:
    """A figure with one panel and the caption above it."""
    figure, (axes,) = panels(xlabel, [ylabel], caption)
    return figure, axes


def panels(xlabel: str, ylabels: Sequence[str], caption: str) -> tuple[Figure, list[Axes]]:
    """One panel per ylabel, side by side, with the caption above the first."""
    from matplotlib.figure import Figure

    width = 3.0 + 4.5 * len(ylabels)
    figure = Figure(figsize=(width, 4.5), dpi=150, layout="constrained")
    found = [figure.add_subplot(1, len(ylabels), i, xlabel=xlabel, ylabel=y) for i, y in enumerate(ylabels, 1)]
    # wrapped here, as matplotlib would let it run under the legend; at y=1, to spare it the search
    found[0].set_title(fill(caption, 72), y=1.0, fontsize="small", loc="left", color="0.3")
    for axes in found:
        axes.grid(which="major", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def legend_key(label: str, colour: str, marker: str, line: Any, filled: Any = "full") -> Line2D:
    """A legend entry without a line in the figure. line: a matplotlib line style; filled: one of FILLS."""
    from matplotlib.lines import Line2D

    line2d = Line2D([], [], color=colour, marker=marker, linestyle=line, label=label, markerfacecoloralt="white")
    line2d.set_fillstyle(filled)
    return line2d


def in_digits(axis: Axis) -> None:
    """Label a logarithmic axis with 10 and 100, not powers, and in between if there is room."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.4)))


def plain(text: str) -> str:
    """Text escaped so that matplotlib sees no mathematics and hides no label."""
    return " " + text.replace("$", r"\$") if text.startswith("_") else text.replace("$", r"\$")


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a PNG, atomically, and freeze the layout. Raises ValueError for another suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if Path(path).suffix != ".png":
        raise ValueError(f"figures are PNG files, got {path}")
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        _without_mathematics(axis)
        low, high = axis.get_view_interval()
        if axis.get_scale() == "log" and high < 1.1 * low:  # a single value: the layout would divide by zero
            axis.set_view_interval(low / 1.5, high * 1.5, ignore=True)
    FigureCanvasAgg(figure)  # one renderer for layout and drawing, which parses each label once
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
        figure.set_layout_engine(None)  # else savefig would draw twice, once just for the layout
    with atomic_write(path) as file:
        figure.savefig(file, format="png", pil_kwargs={"compress_level": 3})  # in half the time of 6


def _without_mathematics(axis: Axis) -> None:
    """Write powers of ten as text: as mathematics, each is parsed, which takes a quarter of the time of a figure."""
    from matplotlib.ticker import LogFormatterSciNotation

    for formatter in (axis.get_major_formatter(), axis.get_minor_formatter()):
        if type(formatter) is LogFormatterSciNotation:
            formatter.__class__ = _powers()


@cache
def _powers() -> type[LogFormatterSciNotation]:
    """Matplotlib's labels of a logarithmic axis, with superscripts that are characters."""
    from matplotlib.ticker import LogFormatterSciNotation

    class Powers(LogFormatterSciNotation):
        def __call__(self, x: float, pos: int | None = None) -> str:
            text = re.sub(r"^\$\\mathdefault\{(.*)\}\$$", r"\1", super().__call__(x, pos)).replace(r"\times", "×")
            return re.sub(r"\^\{(-?\d+)\}", lambda power: power[1].translate(_SUPERSCRIPTS), text)

    return Powers


def need(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], figure: str) -> None:
    """Raise ValueError naming the figure if there are no rows, or one lacks a column."""
    if not rows:
        raise ValueError(f"{figure} has nothing to draw: no rows")
    for row in rows:
        missing = [column for column in columns if column not in row]
        if missing:
            raise ValueError(
                f"{figure} needs {', '.join(columns)} in every row, but {missing[0]} is missing in {dict(row)}"
            )


def positive(value: float) -> bool:
    """Whether a logarithmic axis can show it."""
    return math.isfinite(value) and value > 0
