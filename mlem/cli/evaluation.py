"""After training: every sampler on every level, figures, a table, and where to find them."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from mlem.cli.build import LoaderFromStep, evaluation, loggers
from mlem.cli.paths import run_folder
from mlem.cli.schema import Train
from mlem.comparison.calls import FIGURES as CALLS_FIGURES
from mlem.comparison.recommended import renew
from mlem.comparison.row import Row
from mlem.comparison.scaling import draw_scaling, scaling_fits
from mlem.data import Shards
from mlem.family import Family
from mlem.files import atomic_write
from mlem.report import plan_pictures, told, write_report
from mlem.training.denoising import FamilyModule, noise_level_figure
from mlem.training.loggers import ForgivingWandbLogger, log_pictures
from mlem.training.stopping import Stopping

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["evaluate_family"]


def evaluate_family(job: Train, family: Family, shards: Shards) -> None:
    """Run every sampler on every level; write images and figures, print a table and where they are."""
    whole = getattr(job.model, "several", False)
    folder = Path(job.root) if whole else run_folder(job, family.names[0]) / "evaluation"
    samplers = evaluation(job, shards, folder)
    trainer = pl.Trainer(
        **job.trainer.place(),
        logger=loggers(job, folder, "evaluation", None),
        callbacks=[samplers, Stopping()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    loader = LoaderFromStep(shards, job.data.held_out, job.training, job.seed)
    module = FamilyModule(family, job.seed)
    metrics = trainer.test(module, datamodule=loader, verbose=False)[0]
    if trainer.is_global_zero:
        if len(family.levels) > 2:
            _scaling_law(family, module, folder / "scaling_law.png")
        noise_level_figure(family, dict(metrics), job.data.held_out, folder / "error_by_noise_level.png")
        pictures = {f"eval/{name}": folder / f"{name}.png" for name in ("error_by_noise_level", "scaling_law")}
        if whole:
            pictures |= _recommend(family, folder, trainer)
        log_pictures(trainer.loggers, pictures, 0)
        write_report(folder if whole else folder.parent)
        _report(samplers.rows, family, folder, Path(job.root) / "family" if whole else folder.parent / "level")


def _recommend(family: Family, folder: Path, trainer: pl.Trainer) -> dict[str, Path]:
    """Find and print the recommendation; return figures of its calls and of those in the evaluation, by name."""
    torch.nn.ModuleList(level.network for level in family.levels).to(trainer.strategy.root_device)
    renew(folder, family)
    if (words := told(folder)) is not None:
        print(words.sentence, words.why or words.command, flush=True)
        for logger in trainer.loggers:
            if isinstance(logger, ForgivingWandbLogger):
                logger.summarise(words.summary)
    pictures = {name: folder / f"{name}.png" for name in CALLS_FIGURES}
    for name, png in plan_pictures(folder, folder).items():
        with atomic_write(pictures[name]) as file:
            file.write(png)
    return {f"eval/{name}": path for name, path in pictures.items()}


def _scaling_law(family: Family, module: FamilyModule, path: Path) -> None:
    """Draw and print how error falls with cost in FLOPs: denoising error above its floor, and level differences."""
    errors = torch.stack([torch.cat(module.image_errors[name]) for name in family.names]).double().numpy()
    for line in draw_scaling(family, scaling_fits(family, errors), errors.shape[1], path):
        print(line)


def _report(rows: list[Row], family: Family, folder: Path, artefact: Path) -> None:
    from rich.console import Console

    Console(width=None if os.isatty(1) else 110).print(_levels_table(family), _samplers_table(rows))
    for what, path in (
        ("trained", artefact),
        ("sample grids", folder / "grids"),
        ("error against time", folder / "error_vs_time.png"),
        ("error, similarity, FID against calls", folder / "quality_vs_evaluations.png"),
        ("error by noise level", folder / "error_by_noise_level.png"),
        ("scaling law", folder / "scaling_law.png"),
        ("metrics", folder / "metrics.jsonl"),
        ("all of it on one page", artefact.parent / "report.html"),
        ("W&B (offline runs: wandb sync PATH)", folder / "wandb"),
    ):
        if path.exists():
            print(f"{what:38s}{path}", flush=True)


def _levels_table(family: Family) -> Table:
    from rich.table import Table

    table = Table("level", "parameters", "MFLOPs", "held-out error", "ms/image", title="levels")
    for level in family.levels:
        error, cost = level.measured["error"], 1e3 * level.measured["seconds"]
        table.add_row(level.name, f"{level.parameters:,}", f"{level.flops / 1e6:.1f}", f"{error:.4f}", f"{cost:.3f}")
    return table


def _samplers_table(rows: list[Row]) -> Table:
    from rich.table import Table

    fid = rows[0].frechet
    title = "samplers: mean squared error to the many-step reference ± standard error" + (f"; {fid}" if fid else "")
    table = Table("level", "sampler", "steps", "calls", "ms/image", "MSE", "FID" if fid else "", title=title)
    for row in rows:
        error = "not pathwise" if math.isnan(row.mse) else f"{row.mse:.2e} ± {row.mse_stderr:.1e}"
        milliseconds, score = f"{1e3 * row.seconds:.2f}", f"{row.scores[fid]:.3f}" if fid else ""
        table.add_row(row.level, row.sampler, str(row.steps), _calls(row), milliseconds, error, score)
    return table


def _calls(row: Row) -> str:
    """Calls of each level per image, and the number of rounds if calls run in parallel."""
    several = len(row.calls) > 1
    calls = " + ".join(f"{count:g} {name}" for name, count in row.calls.items() if several and count)
    rounds = f" in {row.rounds:.3g} rounds" if row.rounds < 0.99 * row.evaluations else ""
    return (calls or f"{row.evaluations:.4g}") + rounds
