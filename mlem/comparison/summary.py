"""What came of a coupled benchmark: ratios of costs at equal error, and the figure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlem.comparison.coupled import Comparison, Run, best_trials, settings
from mlem.comparison.equal_error import cost_ratio
from mlem.images import image_grid
from mlem.plots import coupled_errors

COSTS = {"time": "wall_seconds", "FLOPs": "flops"}
"""What cost is counted in, and the column that holds it."""


def ratios(comparison: Comparison, runs: Sequence[Run], draws: int = 400) -> list[dict[str, Any]]:
    """For each sampler whose levels share the work: what single levels cost over what it costs, at equal error.

    The errors lie half-way, in the logarithm, between those of the largest level alone in its numbers of steps. Single
    levels are the largest one, and whichever is best; draws of coins count on average, and the best of each setting.
    """
    table = []
    for solver in dict.fromkeys(run.solver.reference for run in runs):
        rows = [(run, row) for run in runs if run.solver.reference == solver and (row := comparison.row(run))]
        alone = [row for run, row in rows if run.plan is None]
        top = [row for row in alone if row["levels"] == comparison.family.level().name]
        errors = sorted({row["mse"] for row in top if row["mse"] > 0}, reverse=True)
        errors = [math.sqrt(high * low) for high, low in itertools.pairwise(errors)] or errors
        shared = [row for run, row in rows if run.plan is not None]
        for name in dict.fromkeys((row["sampler"], row["solver"]) for row in shared):
            own = [row for row in shared if (row["sampler"], row["solver"]) == name]
            trials = max((row["trial"] or 0) for row in own) + 1
            for best in (False, True)[: 2 if trials > 1 else 1]:
                for error in errors:
                    against = {
                        f"{cost}, {rival}": cost_ratio(
                            settings(theirs, column),
                            settings(own, column),
                            error,
                            np.random.default_rng(0),
                            best=best,
                            draws=draws,
                        ).to_dict()
                        for cost, column in COSTS.items()
                        for rival, theirs in (("largest", top), ("any", alone))
                    }
                    coins = f"best of {trials}" if best else "mean" if trials > 1 else "one draw"
                    row = {"sampler": name[0], "solver": name[1], "coins": coins, "mse": error}
                    table.append(row | {"against": against})
    return table


def draw(comparison: Comparison, runs: Sequence[Run], path: Path, shown: int) -> None:
    """One figure for each reference: `path`, and with several `path` with their names added."""
    references = list(dict.fromkeys(run.solver.reference for run in runs))
    for name in references:
        pairs = [(run, row) for run in runs if run.solver.reference == name and (row := comparison.row(run))]
        pairs = [(run, row) for run, row in pairs if row["mse"] > 0]  # the reference itself has no place on a log axis
        if not pairs:
            continue
        rows = [row for _, row in pairs]
        shared = [row for row in rows if row["plan"]]
        best = best_trials(shared)
        pictures: dict[str, tuple[Mapping[str, Any] | None, Any]] = {}
        if shown:
            columns = min(shown, len(comparison.blocks[0]))
            pictures["reference"] = (None, image_grid(comparison.pictures(name, columns), columns))
            for letter, (run, row) in zip("ABCDEFGH", selected(comparison, pairs, best), strict=False):
                words = f"{letter}: {row['sampler']}, " + (f"level {row['levels']}, " if not row["plan"] else "")
                words += f"{row['steps']} steps" + (f", Δ = {row['delta']:g}" if row["delta"] is not None else "")
                pictures[words] = (row, image_grid(comparison.pictures(run, columns), columns))
        trials = max((row["trial"] or 0) for row in rows) + 1
        caption = f"{comparison.caption}; bars: one standard error over images"
        caption += f"; {trials} trials of the coins, the best by these images large" if trials > 1 else ""
        own = path if len(references) == 1 else path.with_name(f"{path.stem}_{name}.png")
        coupled_errors(rows, best, own, caption, pictures)


def selected(
    comparison: Comparison, pairs: Sequence[tuple[Run, dict[str, Any]]], best: Sequence[Mapping[str, Any]]
) -> Sequence[tuple[Run, Mapping[str, Any]]]:
    """Whose samples are shown: the largest level in the two smallest numbers of steps, then of every sampler with coins
    the best trial whose cost is nearest to the first of these.
    """
    top = comparison.family.level().name
    alone = sorted((row["steps"], i) for i, (_, row) in enumerate(pairs) if not row["plan"] and row["levels"] == top)
    chosen: list[tuple[Run, Mapping[str, Any]]] = [pairs[i] for _, i in alone[:2]]
    target = chosen[0][1]["flops"] if chosen else 0.0
    for name in dict.fromkeys((row["sampler"], row["solver"]) for row in best):
        own = [row for row in best if (row["sampler"], row["solver"]) == name]
        row = min(own, key=lambda one: abs(one["flops"] - target))
        chosen.append(next((run, same) for run, same in pairs if same is row))
    return chosen
