"""All samplers in one pass over the images, and the folder that shows how they did.

folder/evaluation.json          the rows
folder/grids/NAME.png           samples of each
folder/error_vs_time.png, quality_vs_evaluations.png
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from mlem.comparison.entry import Entry
from mlem.comparison.figures import error_vs_time, quality_vs_evaluations
from mlem.comparison.row import MULTILEVEL, Row
from mlem.comparison.setup import Setup
from mlem.comparison.tally import Tally
from mlem.files import atomic_write, write_record
from mlem.images import image_grid

__all__ = ["FIGURES", "Lineup", "write_evaluation"]

FIGURES = ("error_vs_time", "quality_vs_evaluations")
"""Names of the figures in the folder."""


class Lineup:
    """Runs all samplers on each batch, against references that are kept for that batch alone.

    Every level runs what has no plan; then the family runs what has one, if it has several levels. Raises ValueError
    that names the entry for what does not fit the family or the solver.

    Attributes:
        tallies: one for each run; empty for plans alone and a family of one level.
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
        self._references = {name: setup.reference(name) for name in names}

    def add(self, block: Sequence[int]) -> None:
        """Run everything on the images with these indices."""
        truths = {name: self._setup.truth(sampler.run(block).x) for name, sampler in self._references.items()}
        for tally in self.tallies:
            tally.add(block, truths[tally.run.solver.reference] if tally.coupled else None)

    def rows(self, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> list[Row]:
        """The results over all ranks; every rank must call it. total: sums a tensor over them."""
        return [tally.row(total) for tally in self.tallies]

    def pictures(self) -> dict[str, Tensor]:
        """The first samples of each, as pictures, by `Row.picture`."""
        found = {tally.run.row.picture: tally.first for tally in self.tallies}
        return {name: self._setup.pictures(samples) for name, samples in found.items() if samples is not None}


def write_evaluation(folder: Path, rows: Sequence[Row], pictures: dict[str, Tensor], caption: str) -> None:
    """Write the rows, a picture of each, and the figures that there is something to draw for."""
    for name, samples in pictures.items():
        with atomic_write(folder / "grids" / f"{name}.png") as file:
            image_grid(samples).save(file, format="PNG")
    write_record(folder / "evaluation.json", {"caption": caption, "rows": [row.to_json() for row in rows]})
    # the reference itself, of no error, has no place on a logarithmic axis
    if drawable := [row for row in rows if row.mse > 0]:
        error_vs_time(drawable, folder / "error_vs_time.png", caption)
    if any(not row.shared for row in rows):
        quality_vs_evaluations(rows, folder / "quality_vs_evaluations.png", caption)
