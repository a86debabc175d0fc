"""All samplers in one pass over the images, and the folder of their results.

folder/evaluation.json          the rows
folder/calls.json               which levels run along a trajectory, for samplers with a plan
folder/grids/NAME.png           samples of each
folder/strips/NAME.png          the first of them in a strip, and of the references: reference_SOLVER.png
folder/error_vs_time.png, quality_vs_evaluations.png
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mlem.comparison.calls import CALLS, Calls, write_calls
from mlem.comparison.entry import Entry
from mlem.comparison.figures import error_vs_time, quality_vs_evaluations
from mlem.comparison.row import MULTILEVEL, Row
from mlem.comparison.setup import Run, Setup
from mlem.comparison.tally import Tally
from mlem.files import atomic_write, write_record
from mlem.images import image_grid
from mlem.solvers import GridPoint

__all__ = ["FIGURES", "STRIP", "Lineup", "write_evaluation"]

FIGURES = ("error_vs_time", "quality_vs_evaluations")
"""Names of the figures in the folder."""
STRIP = 8
"""Most samples per strip; every strip shows the same indices, and so the same noise."""


class Lineup:
    """Runs all samplers on each batch, against references that are kept only for that batch.

    Every level runs the entries without a plan; then the family runs those with one, if it has several levels. Raises
    ValueError naming an entry that does not fit the family or the solver.

    Attributes:
        tallies: one per run; empty if there are only plans and a family of one level.
    """

    def __init__(self, setup: Setup, entries: Sequence[Entry]) -> None:
        self._setup, runs = setup, []
        for number, entry in enumerate(entries):
            if entry.planned and len(setup.family.levels) == 1:
                continue
            try:
                runs += setup.runs(entry)
            except ValueError as error:
                raise ValueError(f"evaluation.samplers[{number}]: {error}") from error
        order = [*setup.family.names, MULTILEVEL]
        runs.sort(key=lambda run: order.index(run.row.level))
        self.tallies = [Tally(setup, run) for run in runs]
        names = {tally.run.solver.reference for tally in self.tallies if tally.coupled}
        self._references = {name: setup.reference(name) for name in sorted(names)}
        self._first: dict[str, Tensor] = {}

    def add(self, block: Sequence[int]) -> None:
        """Run everything on the images with these indices."""
        truths = {name: self._setup.truth(sampler.run(block).x) for name, sampler in self._references.items()}
        for name, truth in truths.items():
            self._first.setdefault(f"reference_{name}", truth.x[:STRIP].cpu())
        for tally in self.tallies:
            tally.add(block, truths[tally.run.solver.reference] if tally.coupled else None)

    def rows(self, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> list[Row]:
        """The results over all ranks; every rank must call it. total: sums a tensor over them."""
        return [tally.row(total) for tally in self.tallies]

    def pictures(self) -> dict[str, Tensor]:
        """The first samples of each, as images, by `Row.picture`."""
        found = self._first | {tally.run.row.picture: tally.first for tally in self.tallies}
        return {name: self._setup.pictures(samples) for name, samples in found.items() if samples is not None}

    def calls(self) -> list[Calls]:
        """Which levels run along a trajectory, for runs with a plan."""
        runs = [tally.run for tally in self.tallies if tally.run.plan is not None]
        found = [self._calls(run) for run in runs]
        return [one for one in found if one is not None]

    def _calls(self, run: Run) -> Calls | None:
        assert run.plan is not None
        schedule, row = self._setup.family.schedule, run.row
        points = GridPoint.of(schedule, run.solver.grid(schedule, row.steps, run.grid))
        name = f"{row.sampler}, {row.steps} steps" + (f", {row.target}" if row.target else "")
        return Calls.of(name, run.plan, self._setup.family.names, run.solver, points)


def write_evaluation(
    folder: Path, rows: Sequence[Row], pictures: Mapping[str, Tensor], calls: Sequence[Calls], caption: str
) -> None:
    """Write the rows, images of each, and the figures that have data.

    Args:
        folder: for all of it.
        rows: the results.
        pictures: by `Row.picture`; and those of the references, which get only strips.
        calls: of the rows with a plan.
        caption: of rows and figures.
    """
    for name, samples in pictures.items():
        _save(samples[:STRIP], folder / "strips" / f"{name}.png", STRIP)
        if not name.startswith("reference_"):
            _save(samples, folder / "grids" / f"{name}.png")
    if calls or (folder / CALLS).exists():
        write_calls(folder / CALLS, calls)
    write_record(folder / "evaluation.json", {"caption": caption, "rows": [row.to_json() for row in rows]})
    # the reference itself, without error, cannot be on a logarithmic axis
    if drawable := [row for row in rows if row.mse > 0]:
        error_vs_time(drawable, folder / "error_vs_time.png", caption)
    if any(not row.shared for row in rows):
        quality_vs_evaluations(rows, folder / "quality_vs_evaluations.png", caption)


def _save(samples: Tensor, path: Path, columns: int | None = None) -> None:
    with atomic_write(path) as file:
        image_grid(samples, columns).save(file, format="PNG")
