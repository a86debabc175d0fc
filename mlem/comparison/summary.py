"""The summary of a comparison: cost ratios at equal error, and the figure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image

from mlem.comparison.coupled import Comparison
from mlem.comparison.equal_error import Advantage, Setting, cost_ratio
from mlem.comparison.figures import coupled_errors, similarity_vs_time
from mlem.comparison.row import Row
from mlem.comparison.setup import Run
from mlem.images import image_grid
from mlem.multilevel.learning import law_path
from mlem.multilevel.predict import Predictor

__all__ = ["best_trials", "draw", "predicted_curve", "ratios", "settings"]

COSTS: dict[str, Callable[[Row], float]] = {"time": lambda row: row.seconds, "FLOPs": lambda row: row.flops}
"""The units of cost."""
KNOTS = 8
"""Of the laws with predicted errors in the figure, as in `configs/model/coefficients.yaml`."""


def settings(rows: Sequence[Row], cost: Callable[[Row], float]) -> list[Setting]:
    """Rows that differ only in the trial are replicates of one setting. cost: of a row."""
    return [
        Setting(np.array([cost(row) for row in group]), np.array([row.image_mse for row in group]))
        for group in _replicates(rows)
    ]


def best_trials(rows: Sequence[Row]) -> list[Row]:
    """The best replicate of each setting: among rows that differ only in the trial, the smallest error over images."""
    return [min(group, key=lambda row: row.mse) for group in _replicates(rows)]


def _replicates(rows: Sequence[Row]) -> Iterable[list[Row]]:
    groups: dict[tuple[str | int | float | None, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.setting, []).append(row)
    return groups.values()


def _trials(rows: Sequence[Row]) -> int:
    return max((row.trial or 0) for row in rows) + 1


def ratios(comparison: Comparison, runs: Sequence[Run], draws: int = 400) -> list[Advantage]:
    """For each sampler with a plan or reuse: cost of single levels over its cost, at equal error.

    The errors are half-way, in the logarithm, between those of the largest level alone in its numbers of steps. Single
    levels are the largest one, and whichever is best; replicates of coins count by their mean, and by the best of each
    setting.

    Args:
        runs: to compare; runs without a row are left out.
        draws: of the bootstrap.
    """
    table = []
    for solver in dict.fromkeys(run.solver.reference for run in runs):
        pairs = [(run, row) for run in runs if run.solver.reference == solver and (row := comparison.row(run))]
        alone = [row for run, row in pairs if run.alone]
        top = [row for row in alone if row.levels == comparison.family.level().name]
        errors = sorted({row.mse for row in top if row.mse > 0}, reverse=True)
        errors = [math.sqrt(high * low) for high, low in itertools.pairwise(errors)] or errors
        others = [row for run, row in pairs if not run.alone]
        for name in dict.fromkeys((row.sampler, row.solver) for row in others):
            own = [row for row in others if (row.sampler, row.solver) == name]
            for best in (False, True)[: 2 if _trials(own) > 1 else 1]:
                table += [_advantage(own, top, alone, error, best, draws) for error in errors]
    return table


def _advantage(
    own: Sequence[Row], top: Sequence[Row], alone: Sequence[Row], error: float, best: bool, draws: int
) -> Advantage:
    """Ratios of one sampler against the largest level (`top`) and against any level that runs alone."""
    against = {}
    for name, cost in COSTS.items():
        ours = settings(own, cost)
        for rival, theirs in (("largest", top), ("any", alone)):
            random = np.random.default_rng(0)
            ratio = cost_ratio(settings(theirs, cost), ours, error, random, best=best, draws=draws)
            against[f"{name}, {rival}"] = ratio
    trials = _trials(own)
    coins = f"best of {trials}" if best else "mean" if trials > 1 else "one draw"
    return Advantage(own[0].sampler, own[0].solver, coins, error, against)


def draw(comparison: Comparison, runs: Sequence[Run], path: Path, shown: int) -> None:
    """Two figures per reference: errors in `path`, `similarity_vs_time.png` beside it; several have names added."""
    references = list(dict.fromkeys(run.solver.reference for run in runs))
    for name in references:
        pairs = [(run, row) for run in runs if run.solver.reference == name and (row := comparison.row(run))]
        pairs = [(run, row) for run, row in pairs if row.mse > 0]  # the reference itself cannot be on a log axis
        if not pairs:
            continue
        rows = [row for _, row in pairs]
        best = best_trials([row for row in rows if row.shared])
        pictures = _pictures(comparison, name, pairs, best, shown) if shown else {}
        trials = _trials(rows)
        caption = f"{comparison.caption}; bars: one standard error over images"
        caption += f"; {trials} trials of the coins, the best by these images large" if trials > 1 else ""
        suffix = "" if len(references) == 1 else f"_{name}"
        place = path.with_name(f"{path.stem}{suffix}.png")
        coupled_errors(rows, best, place, caption, pictures, predicted_curve(comparison, [run for run, _ in pairs]))
        if any(math.isfinite(row.psnr) for row in rows):
            similarity_vs_time(rows, best, path.with_name(f"similarity_vs_time{suffix}.png"), caption)


def predicted_curve(comparison: Comparison, runs: Sequence[Run]) -> dict[str, tuple[list[float], list[float]]]:
    """FLOPs and predicted errors of the best laws for Bernoulli coins, where the first such run has its steps."""
    family = comparison.family
    drawn = [run for run in runs if run.plan is not None and run.row.delta is not None]
    if not drawn or not family.fitted.calibrated(family):
        return {}
    run = drawn[0]
    grid = run.solver.grid(family.schedule, run.row.steps, run.grid)
    predictor = Predictor(family.fitted.calibration_for(family), family.schedule, run.solver, grid)
    if (rest := predictor.discretisation) is None:
        return {}
    whole = predictor.rows * family.level().flops
    points = law_path(family, run.solver, grid, KNOTS)
    name = f"best laws, predicted, {run.row.steps} steps"
    return {name: ([point.cost * whole for point in points], [point.error + rest for point in points])}


def _pictures(
    comparison: Comparison, reference: str, pairs: Sequence[tuple[Run, Row]], best: Sequence[Row], shown: int
) -> dict[str, tuple[Row | None, Image]]:
    """Samples of the reference and of the `selected` rows, by their titles."""
    columns = min(shown, len(comparison.setup.blocks[0]))
    pictures: dict[str, tuple[Row | None, Image]] = {
        "reference": (None, image_grid(comparison.pictures(reference, columns), columns))
    }
    for letter, (run, row) in zip("ABCDEFGH", selected(comparison, pairs, best), strict=False):
        words = f"{letter}: {row.sampler}, " + (f"level {row.levels}, " if not row.shared else "")
        words += f"{row.steps} steps" + (f", Δ = {row.delta:g}" if row.delta is not None else "")
        pictures[words] = (row, image_grid(comparison.pictures(run, columns), columns))
    return pictures


def selected(
    comparison: Comparison, pairs: Sequence[tuple[Run, Row]], best: Sequence[Row]
) -> Sequence[tuple[Run, Row]]:
    """The rows whose samples are shown.

    The largest level in its two smallest numbers of steps, then, for every sampler with coins, the best trial with the
    cost closest to the first of these.
    """
    top = comparison.family.level().name
    alone = sorted((row.steps, i) for i, (run, row) in enumerate(pairs) if run.alone and row.levels == top)
    chosen = [pairs[i] for _, i in alone[:2]]
    target = chosen[0][1].flops if chosen else 0.0
    for name in dict.fromkeys((row.sampler, row.solver) for row in best):
        own = [row for row in best if (row.sampler, row.solver) == name]
        row = min(own, key=lambda one: abs(one.flops - target))
        chosen.append(next((run, same) for run, same in pairs if same is row))
    return chosen
