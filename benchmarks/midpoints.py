"""Randomized midpoints on mixtures with exact scores: accuracy in distribution at equal evaluations, parallel rounds.

    python benchmarks/midpoints.py [--quick] [--out benchmarks] [--only corrector|parallel]

**corrector.** Mixtures of three well-separated Gaussians in d = 2, 16 and 64 (weights 0.2, 0.3, 0.5, standard
deviations 0.2, means in random directions at distance 3 from 0 and at least 3 from each other), sampled at 50, 100 and
200 evaluations per sample. Two distances, both sliced Wasserstein-2 (root mean square over random directions):

- to the law: against the exact quantiles of the projected mixture. Its floor is the distance of as many exact samples,
  which has its own row: the weights of distant modes fluctuate, which alone makes a distance;
- to the ODE: against an accurate solution of the ODE from the same starting noise, so that those fluctuations cancel.
  Only for ODE solvers, and free of the floor.

Every solver runs on its default grid, on the common grid even in t, and on the best of four grids, chosen for each
solver, d and number of evaluations by a pilot run with another seed, by the distance to the ODE's solution; for
predictor_corrector the pilot also chooses the corrector's time and step. The tables have the best; all rows are in the
JSON. A solver that cannot use the evaluations exactly uses fewer. predictor_corrector also reports its modes' weights.

**parallel.** Rounds (sequential network calls) in which parallel midpoints come within a fixed Euclidean distance of an
accurate solution of the ODE, root mean square over samples, against the dimension: the distance is the same in every
dimension, so more coordinates must each be more accurate. The best of a small search over blocks, midpoints, window,
tolerance and grid. Also the evaluations that sequential solvers need for the same, each on its best of three grids.
Data: three modes with means at distance 1 and standard deviations 0.5: they overlap, since between distant modes a
sample that changes sides makes an error of the size of the data, in any solver.

Writes `midpoints.json` to --out and, unless --quick, `docs/midpoints.png`.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from midpoints_law import METHODS, measure_corrector, report_corrector, row_of
from midpoints_rounds import ERROR, SEQUENTIAL, measure_parallel, report_parallel

from mlem.files import atomic_write, read_json, write_json

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX"
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer of everything, a few seconds, no figure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of midpoints.json")
    parser.add_argument("--only", choices=["corrector", "parallel"], help="one half; the other is kept as it was")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    path, found = options.out / "midpoints.json", {}
    if options.only and path.exists():
        found = read_json(path)
    if options.only != "parallel":
        found["corrector"] = measure_corrector(
            dimensions=(2, 16) if options.quick else (2, 16, 64),
            evaluations=(50,) if options.quick else (50, 100, 200),
            samples=500 if options.quick else 4000,
            seeds=2 if options.quick else 5,
        )
        report_corrector(found["corrector"])
    if options.only != "corrector":
        found["parallel"] = (
            measure_parallel((4, 16, 64), batches=2, blocks=(4, 6), midpoints=(16,), tolerances=(2.0,))
            if options.quick
            else measure_parallel((4, 16, 64, 256, 1024, 4096), 8, (6, 4, 8), (32, 16, 64), (2.0, 0.5))
        )
        report_parallel(found["parallel"])
    write_json(path, found)
    if not options.quick and len(found) == 2:
        draw(found, Path(__file__).parents[1] / "docs" / "midpoints.png")


def draw(found: dict[str, Any], path: Path) -> None:
    """Distances against evaluations in the largest dimension, for both distances; rounds against dimension."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, 3)
    _distances(panels[:2], found["corrector"])
    _rounds(panels[2], found["parallel"])
    for axes in panels:
        axes.grid(which="major", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="x-small", frameon=False)
    title = "Mixtures of Gaussians with exact scores, cosine schedule; every solver on its best grid"
    figure.suptitle(title, fontsize="small", x=0.01, ha="left")
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _distances(panels: Any, corrector: dict[str, Any]) -> None:
    """One panel each for the distance to the distribution and to the ODE's solution."""
    d = max(row["d"] for row in corrector["rows"])
    asked = sorted({row["asked"] for row in corrector["rows"]})
    for axes, against in zip(panels, ("to the law", "to the ODE"), strict=True):
        for number, method in enumerate(METHODS):
            rows = [row_of(corrector["rows"], method, d, count, "best") for count in asked]
            if against not in rows[0]:
                continue
            means, spreads = ([f(row[against]) for row in rows] for f in (np.mean, lambda x: np.std(x, ddof=1)))
            style = {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 4, "capsize": 2}
            style["linestyle"] = LINES[number]
            calls = [row["evaluations"] for row in rows]
            axes.errorbar(calls, means, yerr=spreads, elinewidth=0.8, label=method, **style)
        axes.set(xscale="log", yscale="log", xlabel="evaluations per sample")
        axes.set_xticks(asked, [str(count) for count in asked])
        axes.set_xticks([], minor=True)
    floor = next(floor["to the law"] for floor in corrector["floors"] if floor["d"] == d)
    panels[0].axhspan(min(floor), max(floor), color="0.85", label="exact samples, lowest to highest")
    panels[0].set_ylabel("sliced W2 to the distribution [units of the data]")
    panels[1].set_ylabel("sliced W2 to the ODE's solution [units of the data]")
    settings = corrector["settings"]
    panels[0].set_title(
        f"three modes far apart, d = {d}, {settings['samples']} samples,\n{settings['seeds']} seeds (mean, deviation)",
        fontsize="small",
        loc="left",
    )
    panels[1].set_title("the same, on the same starting noise", fontsize="small", loc="left")


def _rounds(axes: Any, parallel: dict[str, Any]) -> None:
    """Sequential calls against the dimension."""
    rows = parallel["rows"]
    dimensions = [row["d"] for row in rows]
    for solver in SEQUENTIAL:
        place = list(METHODS).index(solver)
        counts = [row[solver]["evaluations"] for row in rows]
        look = {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": LINES[place], "markersize": 4}
        axes.loglog(dimensions, counts, label=solver, **look)
    rounds = [row["parallel_midpoint"]["rounds"] for row in rows]
    axes.loglog(dimensions, rounds, color="#000000", marker="X", label="parallel_midpoint")
    fit = parallel["fits"]["log^2 d"]
    line = [fit["a"] + fit["b"] * math.log(d) ** 2 for d in dimensions]
    axes.loglog(dimensions, line, color="0.5", linestyle=":", label=f"{fit['a']:.1f} + {fit['b']:.3f} ln² d")
    axes.set(xlabel="dimension d", ylabel="sequential calls")
    axes.set_xticks(dimensions, [str(d) for d in dimensions])
    axes.set_xticks([], minor=True)
    axes.set_title(
        f"three modes that overlap, calls for an error of {ERROR},\n"
        f"{rows[-1]['samples']} to {rows[0]['samples']} samples, seed 0",
        fontsize="small",
        loc="left",
    )


if __name__ == "__main__":
    main()
