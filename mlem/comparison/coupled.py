"""Samplers side by side: from the same noise and Brownian path, against a many-step run of the largest level.

One CSV with a row for each run, rewritten whole after every run: what is in it is not run again.

folder/settings.json           what all rows share; others are refused
folder/reference_ddpm.safetensors   the many-step samples
folder/runs.csv                the rows
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlem.comparison.equal_error import Setting
from mlem.family import Family
from mlem.files import atomic_write, write_text
from mlem.ledger import Ledger
from mlem.metrics import Measure
from mlem.multilevel.plan import Plan
from mlem.multilevel.planner import make_plan
from mlem.multilevel.spec import PlanSpec
from mlem.outputs import claim
from mlem.sampling import Sampler, blocks, solver_of
from mlem.solvers import Solver

KEY = ("sampler", "solver", "levels", "steps", "grid", "coins", "plan", "delta", "trial")
"""The columns that say which run it was. plan: a hash of its table before delta, empty for one level."""
_TEXT = ("sampler", "solver", "levels", "grid", "coins", "plan")
_NEEDS = {"learned": "coefficients", "calibrated": "calibration"}


@dataclass(frozen=True)
class Entry:
    """A sampler of the list. Without a spec: `levels` (all by default), each by itself, in each number of steps.

    With one: levels together, once for each number of steps, delta (added to the logits of p_k) and trial (a seed of
    the coins). deltas and trials need coins, so estimator "jump"; None for the spec's own coins, once.
    """

    name: str
    solver: str
    steps: tuple[int, ...]
    grid: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    levels: tuple[str, ...] | None = None
    spec: PlanSpec | None = None
    deltas: tuple[float, ...] | None = None
    trials: int | None = None

    def missing(self, family: Family) -> str | None:
        """What has to be fitted to the family first, or None."""
        law = self.spec.probabilities if self.spec is not None else None
        needed = _NEEDS.get(law) if isinstance(law, str) else None
        return needed if needed is not None and not family.fitted.has(needed) else None


@dataclass(frozen=True)
class Run:
    """A row to be measured. key: the columns of KEY. cost: of an image, in evaluations of the largest level."""

    key: dict[str, Any]
    level: str | None
    plan: Plan | None
    solver: Solver
    grid: str | None
    cost: float


class Comparison:
    """Runs samplers on fixed images and keeps a row for each.

    family: whose largest level gives the reference, by each solver's `reference`, in `reference_steps`. indices: of
    the images. measure: FID and its like, or None. Raises ValueError where the folder holds rows of other settings.
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
        self.family, self.folder, self.reference_steps = family, folder, reference_steps
        self.blocks, self.count = blocks(indices, batch_size), len(indices)
        self._common = {"seed": seed, "device": torch.device(device), "precision": precision}
        self._measure = measure
        claim(folder, self._settings(list(indices), batch_size), "measurements")
        self.path = folder / "runs.csv"
        self.rows: list[dict[str, Any]] = read_rows(self.path) if self.path.exists() else []
        self._truths: dict[str, Tensor] = {}

    def _settings(self, indices: list[int], batch_size: int) -> dict[str, Any]:
        measure = (
            None if self._measure is None else f"{self._measure.fid.protocol}, {self._measure.key['count']} images"
        )
        return {
            "weights": self.family.weights_hash,
            "images": hashlib.sha256(json.dumps(indices).encode()).hexdigest()[:16],
            "reference_steps": self.reference_steps,
            "seed": self._common["seed"],
            "batch_size": batch_size,
            "device": self._common["device"].type,
            "precision": self._common["precision"],
            "metric": measure,
        }

    def runs(self, entry: Entry) -> list[Run]:
        """Every run of an entry. Raises ValueError for what does not fit the family or the solver."""
        solver = solver_of(entry.solver, **entry.options)
        options = ", ".join(f"{key}={value}" for key, value in entry.options.items())
        label = f"{entry.solver}({options})" if options else entry.solver
        found = []
        for steps in entry.steps:
            grid = solver.grid(self.family.schedule, steps, entry.grid)
            if not solver.coupled:
                raise ValueError(
                    f"solver {solver.name} shares a law with its reference, not a path: its error means nothing"
                )
            key = {"sampler": entry.name, "solver": label, "steps": steps, "grid": grid.name}
            if entry.spec is None:
                for level in entry.levels or self.family.names:
                    cost = solver.evaluations(grid) * self.family.level(level).flops / self.family.level().flops
                    own = {"levels": level, "coins": "", "plan": "", "delta": None, "trial": None}
                    found.append(Run(key | own, level, None, solver, entry.grid, cost))
                continue
            plan = make_plan(entry.spec, self.family, solver, grid)
            table = json.dumps(plan.to_dict() | {"about": {}, "seed": entry.spec.seed}, sort_keys=True)
            names = plan.levels or tuple(self.family.names)
            key |= {"levels": "+".join(names), "coins": plan.coins}
            key["plan"] = hashlib.sha256(table.encode()).hexdigest()[:12]
            flops = torch.tensor([self.family.level(name).flops for name in names], dtype=torch.float64)
            for delta in entry.deltas or (None,):
                for trial in range(entry.trials) if entry.trials is not None else (None,):
                    tossed = delta is not None or trial is not None
                    drawn = plan.redrawn(delta or 0.0, entry.spec.seed + (trial or 0)) if tossed else plan
                    cost = drawn.cost(flops / self.family.level().flops)
                    found.append(Run(key | {"delta": delta, "trial": trial}, None, drawn, solver, entry.grid, cost))
        return found

    def row(self, run: Run) -> dict[str, Any] | None:
        """What was measured of this run, or None."""
        return next((row for row in self.rows if _identity(row) == _identity(run.key)), None)

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Those that have no row."""
        known = {_identity(row) for row in self.rows}
        return [run for run in runs if _identity(run.key) not in known]

    def cost(self, runs: Sequence[Run]) -> float:
        """What `measure` has to do, in evaluations of the largest level for an image."""
        missing = self.missing(runs)
        references = {run.solver.reference for run in missing}
        todo = [name for name in references if name not in self._truths and not self._reference(name).exists()]
        return sum(run.cost for run in missing) + self.reference_steps * len(todo)

    def measure(self, runs: Sequence[Run], progress: Callable[[float], None] = lambda cost: None) -> None:
        """Add the rows that are not there. progress: told of what is behind us, in all `cost(runs)`."""
        missing = self.missing(runs)
        if missing:
            self._warm_up()
        for run in missing:
            self.truth(run.solver.reference, progress)
            self.rows.append(self._measured(run))
            write_text(self.path, _csv(self.rows))
            progress(run.cost)

    def sampler(self, run: Run) -> Sampler:
        """The sampler of this run."""
        model = self.family if run.plan is not None else self.family.level(run.level)
        options = {"steps": run.key["steps"], "grid": run.grid, **self._common}
        return Sampler(model, solver=run.solver, plan=run.plan, **options)

    def pictures(self, run: Run | str, count: int) -> Tensor:
        """The first images of a run, or of the reference that is named: (count, C, H, W)."""
        if isinstance(run, str):
            return self.truth(run)[:count]
        return self.sampler(run).run(self.blocks[0]).x[:count].cpu()

    def _reference(self, name: str) -> Path:
        return self.folder / f"reference_{name}.safetensors"

    def truth(self, reference: str, progress: Callable[[float], None] = lambda cost: None) -> Tensor:
        """The samples of the reference solver, made once: (N, C, H, W)."""
        from safetensors.torch import load_file, save

        path = self._reference(reference)
        if reference in self._truths:
            return self._truths[reference]
        if not path.exists():
            sampler = Sampler(self.family.level(), solver=reference, steps=self.reference_steps, **self._common)
            parts = []
            for block in self.blocks:
                parts.append(sampler.run(block).x.cpu())
                progress(self.reference_steps * len(block) / self.count)
            with atomic_write(path) as file:
                file.write(save({"x": torch.cat(parts).contiguous()}))
        self._truths[reference] = load_file(path)["x"]
        return self._truths[reference]

    def _warm_up(self) -> None:
        """The first call for a batch size sets up kernels: it must not be in anybody's time."""
        for level in self.family.levels:
            for size in {len(self.blocks[0]), len(self.blocks[-1])}:
                Sampler(level, solver="ddim", steps=2, **self._common).run(range(size))

    def _measured(self, run: Run) -> dict[str, Any]:
        truth, sampler, ledger, errors = self.truth(run.solver.reference), self.sampler(run), Ledger(), []
        fid = None if self._measure is None else self._measure.start(self._common["device"])
        for block, expected in zip(self.blocks, truth.split(len(self.blocks[0])), strict=True):
            result = sampler.run(block)
            ledger.add(result.ledger)
            errors.append((result.x.cpu().double() - expected.double()).square().flatten(1).mean(1))
            if fid is not None:
                fid.update(result.x, block)
        image_mse = torch.cat(errors)
        row = {name: run.key[name] for name in KEY}
        calls = {name: ledger.levels[name].calls / ledger.images for name in ledger.levels}
        row |= {f"calls_{name}": calls.get(name, 0.0) for name in self.family.names}
        row |= {
            "flops": sum(level.flops for level in ledger.levels.values()) / ledger.images,
            "network_seconds": ledger.network_seconds / ledger.images,
            "wall_seconds": ledger.wall_seconds / ledger.images,
            "mse": image_mse.mean().item(),
            "mse_stderr": (image_mse.std() / math.sqrt(len(image_mse))).item(),
        }
        if fid is not None and self._measure is not None:
            row |= {score.name: score.value for score in self._measure.scores(fid, expected=self.count)}
        return row | {"image_mse": [float(f"{error:.6g}") for error in image_mse.tolist()]}

    @cached_property
    def caption(self) -> str:
        """What a figure of these rows must say."""
        top, device = self.family.level(), self._common["device"].type
        threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
        return (
            f"{self.family.data}, {self.count} images, seed {self._common['seed']}; reference: level {top.name}, "
            f"{self.reference_steps} steps, same noise; {device}{threads}, batch {len(self.blocks[0])}"
        )


def settings(rows: Sequence[Mapping[str, Any]], cost: str) -> list[Setting]:
    """Rows that differ in nothing but the trial are draws of one setting. cost: a column."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_identity({**row, "trial": None}), []).append(row)
    return [
        Setting(np.array([row[cost] for row in group]), np.array([row["image_mse"] for row in group]))
        for group in groups.values()
    ]


def best_trials(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of rows that differ in nothing but the trial, the one of the smallest error on all images."""
    groups: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for row in rows:
        key = _identity({**row, "trial": None})
        if key not in groups or row["mse"] < groups[key]["mse"]:
            groups[key] = row
    return list(groups.values())


def _identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_written(row[name]) for name in KEY)


def _written(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([_written(value) for value in row.values()] for row in rows)
    return text.getvalue()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV, with numbers as numbers. Raises ValueError for a file that is none of ours."""

    def value(name: str, text: str) -> Any:
        if name in _TEXT:
            return text
        if name == "image_mse":
            return [float(part) for part in text.split()]
        number = float(text) if text else None
        return int(number) if name in ("steps", "trial") and number is not None else number

    with open(path, encoding="utf-8", newline="") as file:
        plain = list(csv.DictReader(file))
    if not plain or not {*KEY, "mse", "image_mse"} <= plain[0].keys():
        raise ValueError(f"{path} holds no measurements of ours; delete it, or choose another out=")
    try:
        return [{name: value(name, text) for name, text in row.items()} for row in plain]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} was edited ({error}); restore it, or delete it to measure again") from error
