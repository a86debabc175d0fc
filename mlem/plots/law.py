"""The scaling law: error against cost, with fitted power laws."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import cycle
from typing import Any

from mlem.plots.style import COLOURS, STYLES, figure_with_axes, need, positive, save

__all__ = ["scaling_law"]

_SCALING_COLUMNS = ("cost", "value", "line_cost", "line", "low", "high", "gamma", "interval")


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
    different lengths, and values that are not positive.
    """
    import numpy as np

    need(list(curves.values()), _SCALING_COLUMNS, "scaling_law")
    figure, axes = figure_with_axes(f"cost [{unit}]", "mean squared error", caption)
    axes.set(xscale="log", yscale="log")
    for (name, curve), colour, (marker, line) in zip(curves.items(), cycle(COLOURS), cycle(STYLES), strict=False):
        arrays = {column: np.asarray(curve[column], dtype=float) for column in _SCALING_COLUMNS[:6]}
        for columns in (_SCALING_COLUMNS[:2], _SCALING_COLUMNS[2:6]):
            shapes = {arrays[column].shape for column in columns}
            if len(shapes) > 1 or not all(positive(value) for column in columns for value in arrays[column]):
                raise ValueError(f"curve {name!r} needs {', '.join(columns)} of equal length and above 0")
        low, high = curve["interval"]
        label = rf"{name}: $\gamma$ = {curve['gamma']:.2f} ({low:.2f} to {high:.2f})"
        axes.fill_between(arrays["line_cost"], arrays["low"], arrays["high"], color=colour, alpha=0.2, linewidth=0)
        axes.plot(arrays["line_cost"], arrays["line"], color=colour, linestyle=line)
        axes.plot(arrays["cost"], arrays["value"], color=colour, marker=marker, linestyle="", label=label)
    figure.legend(loc="outside lower center", frameon=False)
    save(figure, path)
