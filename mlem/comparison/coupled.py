"""Comparison of samplers from the same noise and Brownian path, against a many-step run of the largest level.

One CSV with one row per run, rewritten after every run: existing rows are not run again.

folder/settings.json           what all rows share; other settings are rejected
folder/reference_ddpm.safetensors   the many-step samples
folder/runs.csv                the rows
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlem.comparison.entry import Entry
from mlem.comparison.row import KEY, Row
from mlem.comparison.setup import Run, Setup
from mlem.comparison.tally import Tally
from mlem.family import Family
from mlem.files import write_text
from mlem.metrics import Measure, mean_error
from mlem.outputs import claim
from mlem.sampling import blocks
from mlem.weights import read_tensors, write_tensors

__all__ = ["Comparison", "read_rows"]


class Comparison:
    """Runs samplers on fixed images and keeps one row for each.

    Args:
        family: its largest level gives the reference, by each solver's `reference`.
        indices: of the images, at least two.
        folder: for the rows and references.
        reference_steps: of the references.
        seed: of the noise.
        batch_size: images per batch.
        device: where networks run.
        precision: of the networks, as in `Sampler`.
        measure: FID and similar; None for the error alone.

    Raises:
        ValueError: fewer than two images, or the folder holds rows of other settings.
    """

    def __init__(
        self,
        family: Family,
        indices: Sequence[int],
        folder: Path,
        *,
        reference_steps: int = 1000,
        seed: int = 0,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        measure: Measure | None = None,
    ) -> None:
        if len(indices) < 2:
            raise ValueError(f"a standard error needs at least 2 images, got {len(indices)}")
        batches = blocks(indices, batch_size)
        self.setup = Setup(family, batches, seed, reference_steps, torch.device(device), precision, measure)
        self.folder, self.path = folder, folder / "runs.csv"
        claim(folder, self._settings(list(indices), batch_size), "measurements")
        self.rows: list[Row] = read_rows(self.path) if self.path.exists() else []
        self._truths: dict[str, Tensor] = {}

    @property
    def family(self) -> Family:
        """The family that is measured."""
        return self.setup.family

    def _settings(self, indices: list[int], batch_size: int) -> dict[str, Any]:
        measure = self.setup.measure
        metric = None if measure is None else f"{measure.fid.protocol}, {measure.key['count']} images"
        return {
            "weights": self.family.weights_hash,
            "images": hashlib.sha256(json.dumps(indices).encode()).hexdigest()[:16],
            "reference_steps": self.setup.reference_steps,
            "seed": self.setup.seed,
            "batch_size": batch_size,
            "device": self.setup.device.type,
            "precision": self.setup.precision,
            "metric": metric,
        }

    def runs(self, entry: Entry) -> list[Run]:
        """Every run of an entry. Raises ValueError for what does not fit the family or the solver."""
        found = self.setup.runs(entry)
        for run in found:
            if not run.solver.coupled:
                raise ValueError(
                    f"solver {run.solver.name} shares only its distribution with its reference: its error means nothing"
                )
        return found

    def row(self, run: Run) -> Row | None:
        """The row of this run, or None."""
        return next((row for row in self.rows if row.key == run.row.key), None)

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """The runs without a row."""
        known = {row.key for row in self.rows}
        return [run for run in runs if run.row.key not in known]

    def cost(self, runs: Sequence[Run]) -> float:
        """The remaining work of `measure`, in evaluations of the largest level per image."""
        missing = self.missing(runs)
        references = {run.solver.reference for run in missing}
        todo = [name for name in references if name not in self._truths and not self._reference(name).exists()]
        return sum(run.cost for run in missing) + self.setup.reference_steps * len(todo)

    def measure(self, runs: Sequence[Run], progress: Callable[[float], None] = lambda cost: None) -> None:
        """Add the missing rows. progress: called with the cost of each piece of work, `cost(runs)` in total."""
        missing = self.missing(runs)
        if missing:
            self.setup.warm_up()
        for run in missing:
            self.truth(run.solver.reference, progress)
            self.rows.append(self._measured(run))
            write_text(self.path, _csv(self.rows))
            progress(run.cost)

    def pictures(self, run: Run | str, count: int) -> Tensor:
        """The first images of a run, or of the named reference: (count, C, H, W)."""
        if isinstance(run, str):
            return self.setup.pictures(self.truth(run)[:count])
        return self.setup.pictures(self.setup.sampler(run).run(self.setup.blocks[0]).x[:count])

    def _reference(self, name: str) -> Path:
        return self.folder / f"reference_{name}.safetensors"

    def truth(self, reference: str, progress: Callable[[float], None] = lambda cost: None) -> Tensor:
        """The samples of the reference solver, made once: (N, C, H, W)."""
        path = self._reference(reference)
        if reference in self._truths:
            return self._truths[reference]
        if not path.exists():
            sampler, parts = self.setup.reference(reference), []
            for block in self.setup.blocks:
                parts.append(sampler.run(block).x.cpu())
                progress(self.setup.reference_steps * len(block) / self.setup.count)
            write_tensors(path, {"x": torch.cat(parts)}, {})
        self._truths[reference] = read_tensors(path)[0]["x"]
        return self._truths[reference]

    def _measured(self, run: Run) -> Row:
        truth, tally = self.truth(run.solver.reference), Tally(self.setup, run)
        for block, expected in zip(self.setup.blocks, truth.split(len(self.setup.blocks[0])), strict=True):
            tally.add(block, self.setup.truth(expected))
        row, found = tally.row(), {}
        for name, values in tally.image_values.items():
            # from all values: more accurate than sums over batches
            found[name], found[f"{name}_stderr"] = mean_error(values)
            found[f"image_{name}"] = tuple(float(f"{value:.6g}") for value in values.tolist())
        return replace(row, calls={name: row.calls.get(name, 0.0) for name in self.family.names}, **found)

    @cached_property
    def caption(self) -> str:
        """The caption of figures of these rows."""
        device = self.setup.device.type
        threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
        return f"{self.setup.caption}; {device}{threads}, batch {len(self.setup.blocks[0])}"


def _csv(rows: Sequence[Row]) -> str:
    text, cells = io.StringIO(), [row.to_csv() for row in rows]
    columns = list(max(cells, key=len))  # some rows have a rival, others none
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return text.getvalue()


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV. Raises ValueError for any other file."""
    with open(path, encoding="utf-8", newline="") as file:
        plain = list(csv.DictReader(file))
    if not plain or not {*KEY, "mse", "image_mse"} <= plain[0].keys():
        raise ValueError(f"{path} holds no measurements by mlem; delete it, or choose another out=")
    try:
        return [Row.from_csv(cells) for cells in plain]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} was edited ({error}); restore it, or delete it to measure again") from error
