"""The sampler evaluation: any list of samplers, from the same noise, against the many-step reference and the data.

A callback, for training (every n epochs, averaged weights) and for `trainer.test` (all levels of a family). It
asks the LightningModule for `family()` and reads held-out images from the loader that Lightning runs anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from mlem.family import Family
from mlem.files import atomic_write, write_json
from mlem.images import image_grid
from mlem.ledger import Ledger, LevelLedger
from mlem.level import Level
from mlem.metrics import FID, Measure, PathwiseError
from mlem.metrics.scores import KINDS
from mlem.multilevel.spec import PlanSpec
from mlem.plots import MULTILEVEL, error_by_noise_level, error_vs_time, grid_name, quality_vs_evaluations
from mlem.sampling import Sampler, blocks, solver_of
from mlem.training.checkpoints import stop_if_told
from mlem.training.loggers import log_pictures
from mlem.training.progress import announced

GRID_IMAGES = 64
"""How many samples a picture shows."""
_TARGETS = ("budget", "mse", "delta")


@dataclass(frozen=True)
class SamplerChoice:
    """One sampler at several step counts: a line in the figure. grid: None for the solver's own choice.

    spec: how the levels of the family share the work; None for every level by itself. options: of the solver.
    """

    solver: str
    steps: tuple[int, ...]
    grid: str | None = None
    spec: PlanSpec | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError(f"evaluation of {self.solver} needs at least one step count")

    @property
    def label(self) -> str:
        """Name in figures and metrics: all that is not the default, but for steps and the dial."""
        name = "_".join([self.solver.replace(":", "_"), *([self.grid] if self.grid else [])])
        name += "".join(f"_{key}-{value}" for key, value in self.options.items())
        if self.spec is None:
            return name
        coins = f"_{self.spec.coins}" if self.spec.coins else ""
        name += f"_{self.spec.estimator}{coins}"
        for one in fields(self.spec):
            value = getattr(self.spec, one.name)
            if one.name not in (*_TARGETS, "cost", "estimator", "coins") and value != one.default:
                name += f"_{one.name}-{'+'.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
        return name

    @property
    def dial(self) -> str:
        """How much a plan may spend, such as budget0.25, and of what where that is not seconds; "" for no dial."""
        if self.spec is None:
            return ""
        dial = "".join(f"{name}{v:g}" for name in _TARGETS if (v := getattr(self.spec, name)) is not None)
        return f"{dial}_{self.spec.cost}" if dial and self.spec.cost != PlanSpec.cost else dial


def refuse_duplicates(choices: Sequence[SamplerChoice]) -> None:
    """Raise ValueError for a sampler that is listed twice: its pictures and metrics would have one name."""
    seen: dict[tuple[str, int, str], int] = {}
    for number, choice in enumerate(choices):
        for steps in choice.steps:
            key = (choice.label, steps, choice.dial)
            if key in seen:
                entries = " and ".join(f"evaluation.samplers[{n}]" for n in sorted({seen[key], number}))
                plan = f", {choice.dial}" if choice.dial else ""
                raise ValueError(f"{entries}: {choice.label} at {steps} steps{plan} is listed twice; list it once")
            seen[key] = number


@dataclass
class _Tally:
    """What one sampler came to so far, on this rank. name: of its level, or MULTILEVEL."""

    name: str
    label: str
    dial: str
    sampler: Sampler
    fid: FID | None
    device: torch.device
    ledger: Ledger = field(default_factory=Ledger)
    pictures: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.error = PathwiseError().to(self.device)

    @property
    def steps(self) -> int:
        return self.sampler.grid.steps


class SamplerEvaluation(pl.Callback):
    """Runs samplers on fixed indices, sharded over ranks by whole batches; logs figures to every logger.

    samplers: what to run. indices: of the samples. reference_steps: of the reference, which the largest level
    samples from the same noise by the solver's `reference`. measure: FID and its like, against which images; or
    None. every_n_epochs: in training. folder: for the pictures.

    Put it before the weight averaging in the list of callbacks: it then sees the averaged weights.
    Results of the last run stand in `rows`, and in `evaluation.json` in the folder.
    """

    def __init__(
        self,
        samplers: Sequence[SamplerChoice],
        indices: Sequence[int],
        folder: Path,
        *,
        batch_size: int = 64,
        seed: int = 0,
        reference_steps: int = 1000,
        every_n_epochs: int = 1,
        measure: Measure | None = None,
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"evaluation.every_n_epochs must be >= 1, got {every_n_epochs}")
        self.samplers, self.folder, self.every_n_epochs = tuple(samplers), folder, every_n_epochs
        self.blocks = blocks(indices, batch_size)
        self.count = len(indices)
        self.seed, self.reference_steps = seed, reference_steps
        if measure is not None:
            measure.check(self.count)
        self.measure = measure
        self.rows: list[dict[str, Any]] = []

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # not in a validation by itself, such as that of the finished network: its step has been evaluated
        if trainer.sanity_checking or trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        self.evaluate(trainer, pl_module.family(), pl_module.device)  # type: ignore[operator]

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.evaluate(trainer, pl_module.family(), pl_module.device)  # type: ignore[operator]

    def evaluate(self, trainer: pl.Trainer, family: Family, device: torch.device) -> None:
        """Run everything on `family`; every rank must call it."""
        tallies = self._tallies(family, device)
        if not tallies:  # plans alone, and one level to run them on: in the training of a family
            return
        references = self._references(family, tallies, device)
        self._warm_up(family, device)
        mine = self.blocks[trainer.global_rank :: trainer.world_size]
        rounds = range(-(-len(self.blocks) // trainer.world_size))
        for number in announced(rounds, f"evaluation, {len(tallies)} samplers", trainer.is_global_zero):
            stop_if_told(trainer)
            for block in mine[number : number + 1]:  # none in the last round of some ranks
                self._run_all(tallies, references, block)
        self.rows = [self._row(trainer, tally) for tally in tallies]
        self._publish(trainer, family, tallies)

    def _tallies(self, family: Family, device: torch.device) -> list[_Tally]:
        """Every sampler on every level, then those that share the work among levels, where there are several."""
        alone = [number for number, choice in enumerate(self.samplers) if choice.spec is None]
        shared = [number for number, choice in enumerate(self.samplers) if choice.spec is not None]
        models: list[tuple[Family | Level, int]] = [(level, number) for level in family.levels for number in alone]
        models += [(family, number) for number in shared if len(family.levels) > 1]
        return [
            self._tally(model, number, steps, device)
            for model, number in models
            for steps in self.samplers[number].steps
        ]

    def _tally(self, model: Family | Level, number: int, steps: int, device: torch.device) -> _Tally:
        choice = self.samplers[number]
        options: dict[str, Any] = {"steps": steps, "grid": choice.grid, "seed": self.seed, "device": device}
        try:
            solver = solver_of(choice.solver, **choice.options)
            sampler = Sampler(model, solver=solver, plan=choice.spec, **options)
        except ValueError as error:
            raise ValueError(f"evaluation.samplers[{number}]: {error}") from error
        name = model.name if isinstance(model, Level) else MULTILEVEL
        fid = None if self.measure is None else self.measure.start(device)
        return _Tally(name, choice.label, choice.dial, sampler, fid, device)

    def _references(self, family: Family, tallies: list[_Tally], device: torch.device) -> dict[str, Sampler]:
        names = {tally.sampler.solver.reference for tally in tallies if tally.sampler.solver.coupled}
        options: dict[str, Any] = {"steps": self.reference_steps, "seed": self.seed, "device": device}
        return {name: Sampler(family.level(), solver=name, **options) for name in names}

    def _warm_up(self, family: Family, device: torch.device) -> None:
        """The first call for a batch size sets up kernels: it must not be in anybody's time."""
        for level in family.levels:
            for size in {len(self.blocks[0]), len(self.blocks[-1])}:
                Sampler(level, solver="ddim", steps=2, seed=self.seed, device=device).run(range(size))

    def _run_all(self, tallies: list[_Tally], references: dict[str, Sampler], block: list[int]) -> None:
        truths = {name: sampler.run(block).x for name, sampler in references.items()}
        for tally in tallies:
            truth = truths[tally.sampler.solver.reference] if tally.sampler.solver.coupled else None
            self._run(tally, block, truth, first=self.blocks[0])

    def _run(self, tally: _Tally, block: list[int], truth: Tensor | None, first: list[int]) -> None:
        result = tally.sampler.run(block)
        tally.ledger.add(result.ledger)
        if truth is not None:
            tally.error.update(result.x, truth)
        if tally.fid is not None:
            tally.fid.update(result.x, block)
        if block == first:
            tally.pictures = dict(zip(block[:GRID_IMAGES], result.x.cpu(), strict=False))

    def _row(self, trainer: pl.Trainer, tally: _Tally) -> dict[str, Any]:
        # every rank asks, or none does: it gathers
        mse, stderr = tally.error.compute() if tally.sampler.solver.coupled else (None, None)
        names = list(tally.sampler.levels)
        costs = [tally.ledger.levels.get(name, LevelLedger()) for name in names]
        mine = [tally.ledger.wall_seconds, tally.ledger.network_seconds, tally.ledger.images]
        mine += [tally.ledger.rounds * tally.ledger.images]
        mine += [sum(cost.flops for cost in costs), *(cost.calls for cost in costs)]
        sums = torch.tensor(mine, dtype=torch.float64, device=tally.device)
        wall, network, images, rounds, flops, *calls = trainer.strategy.reduce(sums, reduce_op="sum").tolist()  # type: ignore[union-attr]
        row = {
            "level": tally.name,
            "sampler": tally.label,
            "steps": tally.steps,
            "dial": tally.dial,
            "calls": {name: count / images for name, count in zip(names, calls, strict=True)},
            "evaluations": sum(calls) / images,
            "rounds": rounds / images,
            "flops_per_image": flops / images,
            "seconds_per_image": wall / images,
            "network_seconds_per_image": network / images,
            "mse": mse,
            "mse_stderr": stderr,
        }
        if tally.fid is not None and self.measure is not None:
            for score in self.measure.scores(tally.fid, expected=self.count):
                row[score.name] = score.value
                row |= {} if score.spread is None else {f"{score.name}_std": score.spread}
        return row

    def _publish(self, trainer: pl.Trainer, family: Family, tallies: list[_Tally]) -> None:
        """Rank 0 (which has the first batch) writes pictures and tells the loggers."""
        if not trainer.is_global_zero:
            return
        metrics = {}
        for row, tally in zip(self.rows, tallies, strict=True):
            point = f"{row['steps']}" + (f"_{row['dial']}" if row["dial"] else "")
            prefix = f"eval/{row['level']}/{row['sampler']}@{point}"
            metrics |= {f"{prefix}/calls_{name}": calls for name, calls in row["calls"].items()}
            names = ("mse", "seconds_per_image", "evaluations", *(name for name in row if name.startswith(KINDS)))
            metrics |= {f"{prefix}/{name}": row[name] for name in names if row[name] is not None}
            picture = image_grid(torch.stack(list(tally.pictures.values())))
            with atomic_write(self.folder / "grids" / f"{grid_name(row)}.png") as file:
                picture.save(file, format="PNG")
        write_json(self.folder / "evaluation.json", {"caption": self._caption(family, trainer), "rows": self.rows})
        if drawable := _drawable(self.rows):
            error_vs_time(drawable, self.folder / "error_vs_time.png", self._caption(family, trainer))
        if any(row["level"] != MULTILEVEL for row in self.rows):
            path = self.folder / "quality_vs_evaluations.png"
            quality_vs_evaluations(self.rows, path, self._caption(family, trainer))
        step = max(0, trainer.global_step - 1)  # the last one done, counted from 0 as Lightning does
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
            if isinstance(logger, WandbLogger):
                self._log_pictures(logger, step)

    def _log_pictures(self, logger: WandbLogger, step: int) -> None:
        grids = sorted((self.folder / "grids").glob("*.png"))
        logger.log_image("eval/grids", [str(path) for path in grids], step, caption=[path.stem for path in grids])
        names = ("error_vs_time", "quality_vs_evaluations")
        log_pictures([logger], {f"eval/{name}": self.folder / f"{name}.png" for name in names}, step)
        # one table beside the many panels of single numbers
        columns = [name for name in self.rows[0] if name != "calls"]
        cells = [[*(row[name] for name in columns), _told(row["calls"])] for row in self.rows]
        logger.log_table("eval/samplers", columns=[*columns, "calls"], data=cells, step=step)

    def _caption(self, family: Family, trainer: pl.Trainer) -> str:
        top, device = family.level(), trainer.strategy.root_device.type
        return (
            f"{family.data}, {self.count} images, seed {self.seed}; reference: level {top.name}, "
            f"{self.reference_steps} steps, same noise; {device}, batch {len(self.blocks[0])}, "
            f"{trainer.world_size} rank{'s' if trainer.world_size > 1 else ''}; bars: one standard error"
        )


def _told(calls: Mapping[str, float]) -> str:
    return " + ".join(f"{count:.4g} {level}" for level, count in calls.items())


def _drawable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with an error that is not zero: the reference itself has no place on a logarithmic axis."""
    return [row for row in rows if row["mse"]]


def noise_level_figure(family: Family, metrics: dict[str, float], images: int, path: Path) -> None:
    """Draw `test/<level>/error_t...` of FamilyModule as denoising error against log-SNR; images: how many held out."""
    curves = {}
    for name in family.names:
        prefix = f"test/{name}/error_t"
        times = {float(key.removeprefix(prefix)): value for key, value in metrics.items() if key.startswith(prefix)}
        log_snr = family.schedule.log_snr(torch.tensor(sorted(times), dtype=torch.float64))
        curves[name] = (log_snr.tolist(), [float(times[time]) for time in sorted(times)])
    steps = ", ".join(f"{level.name} {level.measured.get('steps', '?')}" for level in family.levels)
    caption = f"{family.data}, {images} held-out images; averaged weights, training steps: {steps}"
    error_by_noise_level(curves, path, caption)
