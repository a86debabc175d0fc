"""The figure of `fastest.py`: error against seconds, a line for each kind of sampler. Writes docs/fastest.png.

    python benchmarks/fastest_figure.py

It reads `fastest_ode.json` and, where it lies beside it, `fastest_sde.json`: a panel for each. A line is the lower
envelope of its kind: the settings that no other one beats in both error and seconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlem.comparison.equal_error import Setting, frontier
from mlem.plots.style import COLOURS, STYLES, in_digits, panels, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).parent
RIVALS = {
    "fewer steps": "fewer steps of the largest level",
    "fewer steps, diffusers": "fewer steps: DPM-Solver++ 3M (diffusers)",
    "T-Stitch": "T-Stitch",
    "large-small-large": "large - small - large",
    "forecast": "forecast",
    "DeepCache": "DeepCache",
}
OURS = {
    "switch": "searched sequence (switch)",
    "hindsight": "hindsight",
    "hindsight, DeepCache": "hindsight on kept features",
}
RECOMMENDED = "recommended"
KINDS = ("ode", "sde")


@dataclass(frozen=True)
class Look:
    """How a line is drawn: grey for rivals, coloured for ours, each with a marker and a style of its own."""

    label: str
    colour: str
    marker: str
    line: Any
    width: float


def looks(groups: Sequence[str]) -> dict[str, Look]:
    """Of each group: those that have no name here are rivals by their own."""
    rivals = [group for group in groups if group not in OURS]
    greys = np.linspace(0.0, 0.6, max(2, len(rivals)))
    names = [*rivals, *(group for group in OURS if group in groups)]
    found: dict[str, Look] = {}
    for name, (marker, line) in zip(names, STYLES * 2, strict=False):
        ours = name in OURS
        colour = COLOURS[list(OURS).index(name)] if ours else f"{greys[rivals.index(name)]:.2f}"
        label = OURS[name] if ours else RIVALS.get(name, name)
        found[name] = Look(label, colour, marker, "-" if ours else line, 2.0 if ours else 1.0)
    return found


def settings(rows: Sequence[dict[str, Any]], group: str) -> list[Setting]:
    """Rows of a group, in milliseconds an image."""
    chosen = [row for row in rows if row["key"][0] == group]
    return [Setting(np.array([1e3 * np.mean(row["seconds"])]), np.array([row["image_mse"]])) for row in chosen]


def draw(axes: Axes, rows: Sequence[dict[str, Any]], styles: dict[str, Look]) -> None:
    """One kind of solver: the envelopes, and what was recommended for each error that was asked for."""
    axes.set(xscale="log", yscale="log")
    in_digits(axes.xaxis)
    for group, look in styles.items():
        points = settings(rows, group)
        if points:
            costs, errors = np.exp(frontier(points))
            line: dict[str, Any] = {"color": look.colour, "linestyle": look.line, "linewidth": look.width}
            axes.plot(costs, errors, label=look.label, marker=look.marker, markersize=5, **line)
    for number, row in enumerate(row for row in rows if row["key"][0] == RECOMMENDED):
        at = 1e3 * np.mean(row["seconds"]), row["mse"]
        label = None if number else "recommended, for the error written beside it"
        axes.plot(*at, "*", color=COLOURS[2], markersize=14, markeredgecolor="black", label=label)
        axes.annotate(f"{row['key'][1]:.0e}".replace("e-0", "e-"), at, (9, -3), textcoords="offset points")


def _machine(about: str | dict[str, Any]) -> str:
    return about if isinstance(about, str) else f"{about['processor']}, {about['threads']} threads"


def caption(found: Sequence[dict[str, Any]]) -> str:
    """Data, levels, count, references, machine."""
    rows, about = [row for one in found for row in one["rows"]], found[0]["about"]
    levels = {name for row in rows for name in row["calls"]}
    rounds = max(len(row["seconds"]) for row in rows)
    references = " and ".join("{1} steps of {0}".format(*one["about"]["reference"]) for one in found)
    return (
        f"{about['family']}, {len(levels)} levels, {about['images']} images, seed 0; error to {references} with the "
        f"largest level, from the same noise; {rounds} round{'s' * (rounds > 1)}; {_machine(about['machine'])}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=HERE, help="folder of fastest_ode.json and fastest_sde.json")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "fastest.png")
    options = parser.parse_args(arguments)
    paths = {kind: options.rows / f"fastest_{kind}.json" for kind in KINDS}
    found = {kind: json.loads(path.read_text()) for kind, path in paths.items() if path.exists()}
    if not found:
        parser.error(f"{options.rows} has no {' and no '.join(path.name for path in paths.values())}: run fastest.py")
    groups = dict.fromkeys(row["key"][0] for one in found.values() for row in one["rows"])
    styles = looks([group for group in groups if group != RECOMMENDED])
    labels = [f"{kind.upper()}: mean squared error" for kind in found]
    figure, axes_of = panels("time per image [ms]", labels, caption([*found.values()]))
    figure.set_figheight(6.0)
    for axes, one in zip(axes_of, found.values(), strict=True):
        draw(axes, one["rows"], styles)
    drawn = {name: handle for axes in axes_of for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend([*drawn.values()], [*drawn], loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    save(figure, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
