"""Figures of plans along a trajectory: which levels are called, and with what probability."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from textwrap import fill
from typing import TYPE_CHECKING

from mlem.plots.style import COLOURS, STYLES, plain, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["level_rates", "trajectory_strips"]

_WIDTH = 7.5


def trajectory_strips(plans: Sequence[tuple[str, Mapping[str, Sequence[int]]]], path: str | os.PathLike[str]) -> None:
    """Strips of calls, one above another: one row per level, the largest on top, one column per evaluation.

    Args:
        plans: name, and level -> calls at each evaluation (R,), cheapest level first. White is no call, grey one, black
            more.
        path: of the PNG.

    Raises:
        ValueError: there are no plans.
    """
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    figure, axes_of = _stacked([0.55 + 0.2 * len(levels) for _, levels in plans], "trajectory_strips")
    for axes, (name, levels) in zip(axes_of, plans, strict=True):
        table = np.minimum(np.array(list(levels.values())), 2)
        shades, edge = np.array([1.0, 0.45, 0.0])[table], np.arange(table.shape[1] + 1) + 0.5
        axes.pcolormesh(
            edge, np.arange(len(table) + 1) - 0.5, shades, cmap="gray", vmin=0, vmax=1, edgecolors="0.8", linewidth=0.4
        )
        axes.set_yticks(range(len(table)), [plain(level) for level in levels])
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for place, runs in enumerate(levels.values()):
            count = f"{sum(runs)} call{'s' * (sum(runs) != 1)}"
            axes.text(edge[-1], place, f"  {count}", va="center", fontsize="small")
        axes.set_title(plain(fill(name, 90)), fontsize="small", loc="left")
    axes_of[-1].set_xlabel("evaluation, from noise to image; grey: one call, black: more")
    save(figure, path)


def level_rates(
    plans: Sequence[tuple[str, Sequence[float], Mapping[str, Sequence[float]]]],
    path: str | os.PathLike[str],
) -> None:
    """Probabilities p_k of levels against time, from noise to image, one panel per plan.

    Args:
        plans: name, times (R,) in [0, 1], and level -> p_k (R,), cheapest level first.
        path: of the PNG.

    Raises:
        ValueError: there are no plans.
    """
    figure, axes_of = _stacked([1.75] * len(plans), "level_rates")
    names = list(dict.fromkeys(level for _, _, levels in plans for level in levels))
    looks = dict(zip(names, zip(cycle(COLOURS), cycle(STYLES)), strict=False))
    for axes, (name, times, levels) in zip(axes_of, plans, strict=True):
        for level, p in levels.items():
            colour, (_, line) = looks[level]
            axes.plot(times, p, drawstyle="steps-post", color=colour, linestyle=line, label=plain(level))
        axes.set(xlim=(1.01, -0.01), ylim=(0, 1.05), ylabel="$p_k$")
        axes.grid(which="major", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(plain(fill(name, 90)), fontsize="small", loc="left")
        axes.legend(title="level", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    axes_of[-1].set_xlabel("time t, from noise (1) to image (0)")
    save(figure, path)


def _stacked(heights: Sequence[float], name: str) -> tuple[Figure, list[Axes]]:
    """A figure of panels one above another, of these heights in inches."""
    from matplotlib.figure import Figure

    if not heights:
        raise ValueError(f"{name} has nothing to draw: no plans")
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.8), dpi=150, layout="constrained")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=list(heights))
    return figure, [figure.add_subplot(grid[number]) for number in range(len(heights))]
