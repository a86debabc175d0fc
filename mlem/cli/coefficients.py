"""`model=coefficients`: learn how a trained family distributes its evaluations over levels."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf
from torch import Tensor

from mlem.cli.build import loggers
from mlem.cli.callbacks import build_callbacks
from mlem.cli.paths import family_folder
from mlem.cli.ranks import world_size_of
from mlem.cli.resume import changes, check_resume, note_settings, resume_point
from mlem.cli.schema import Learning, Train
from mlem.family import Family
from mlem.files import clear_leftovers, first_process, folder_lock, read_object, write_record
from mlem.grids import TimeGrid
from mlem.multilevel.coefficients import Coefficients
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.learning import (
    Objective,
    first_coefficients,
    first_order,
    nearest_coefficients,
    objective_for,
)
from mlem.plots import probabilities as probabilities_figure
from mlem.report import write_report
from mlem.solvers import Solver, make_solver
from mlem.training.checkpoint_files import AtomicCheckpointIO
from mlem.training.checkpoints import Checkpoints
from mlem.training.coefficients import CoefficientsModule, Fit, learning_progress, replicates
from mlem.training.loggers import log_pictures

__all__ = ["learn_coefficients"]


def learn_coefficients(job: Train, options: Learning) -> None:
    """Learn the coefficients described by the checked options, resuming an earlier run.

    options: of the job's model.
    """
    fit = _fit(job, options)
    world_size = _ranks(job, options)
    build_callbacks(job.callbacks, job.allow)
    folder = Path(job.root) / "coefficients"
    check_resume(job.resume, [folder])
    where = family_folder(job.family, job.root, job.data)
    family = Family.load(where)
    solver, grid = _solver_and_grid(options, family)
    levels, start = first_coefficients(family, solver, grid, options.budget, options.knots, coins=options.coins)
    nearest = nearest_coefficients(family, solver, grid, options.budget, options.knots, levels)
    objective = objective_for(family, solver, grid, levels, seed=job.seed, coins=options.coins, knots=options.knots)
    module = CoefficientsModule(objective, start, nearest, fit, list(levels))
    if first_process():
        print(_chosen(family, levels), flush=True)
    if job.dry_run:
        print(OmegaConf.to_yaml(OmegaConf.create(job.told)))
        _say_duration(where, module)
        return
    with folder_lock(folder) if first_process() else nullcontext():
        if first_process():
            clear_leftovers(folder)
        settings = _settings(job, family, start, world_size)
        changed, finished = changes(job.resume, folder, settings), (folder / "coefficients.json").exists()
        if finished and changed:
            raise ValueError(
                f"{folder} is finished, with other settings ({'; '.join(changed)}): resume=force has nothing to "
                "continue; choose another root=, with family=, or remove the folder to start again"
            )
        loggers_used: list[Any] = []
        if not finished:
            asked = ("model.updates", fit.updates)
            checkpoint, step = resume_point(job.resume, folder, module.state_dict(), asked, changed)
            note_settings(folder, settings)
            loggers_used = _learn(job, folder, family, module, checkpoint, step)
        elif first_process():
            print(f"coefficients: already learned, in {folder}", flush=True)
        if first_process():
            _hand_over(folder, family, where, objective, nearest)
            log_pictures(loggers_used, {"p/probabilities": folder / "probabilities.png"}, fit.updates)
            write_report(folder)
            if (folder.parent / "report.html").exists():
                write_report(folder.parent)  # it shows what was learned besides what was trained


def _fit(job: Train, options: Learning) -> Fit:
    return Fit(
        images=options.images,
        batch_size=options.batch_size,
        draws=options.draws,
        updates=options.updates,
        learning_rate=options.learning_rate,
        tangents=options.tangents,
        held_out=options.held_out,
        reference_steps=job.evaluation.reference_steps,
        weight=options.weight,
        log_every=options.checkpoint_every,
    )


def _ranks(job: Train, options: Learning) -> int:
    world_size = world_size_of(job.trainer, job.training.batch_size, job.training.accumulate)
    for name, value in (("batch_size", options.batch_size), ("held_out", options.held_out)):
        if value % world_size:
            raise ValueError(f"model.{name} must be a multiple of the ranks, {world_size}, got {value}")
    return world_size


def _solver(name: str) -> Solver:
    try:
        return make_solver(name)
    except ValueError as error:
        raise ValueError(f"model.{error}") from error


def _solver_and_grid(options: Learning, family: Family) -> tuple[Solver, TimeGrid]:
    solver = _solver(options.solver)
    try:
        return solver, solver.grid(family.schedule, options.steps, options.grid)
    except ValueError as error:
        raise ValueError(f"model.{error}") from error


def _chosen(family: Family, levels: Sequence[str]) -> str:
    """The levels for which coefficients are learned, and why these."""
    best = f", predicted the best of {', '.join(family.names)}" if family.fitted.has("calibration") else ""
    return f"coefficients: for levels {', '.join(levels)}{best}"


def _settings(job: Train, family: Family, start: Tensor, world_size: int) -> dict[str, Any]:
    """Everything that determines the coefficients: a resumed run must agree on all of it."""
    model = {key: value for key, value in job.told["model"].items() if key != "checkpoint_every"}
    return {
        "model": model,
        "reference_steps": job.evaluation.reference_steps,
        "seed": job.seed,
        "weights": family.weights_hash,
        "start": start.tolist(),
        "world_size": world_size,
    }


def _learn(
    job: Train, folder: Path, family: Family, module: CoefficientsModule, checkpoint: Path | None, step: int
) -> list[Any]:
    """Fit, evaluate, and write `coefficients.json` to the run's folder. Returns the loggers used."""
    fit = module.fit_options
    rate = f"model.learning_rate={fit.learning_rate:g}"
    checkpoints = Checkpoints(folder / "checkpoints", fit.log_every, rate)
    callbacks = [checkpoints, *build_callbacks(job.callbacks, job.allow)]
    callbacks.append(learning_progress(fit, sys.stdout.isatty()))
    trainer = pl.Trainer(
        **job.trainer.place(),
        precision="32-true",
        logger=loggers(job, folder, "coefficients", step),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        max_steps=fit.updates,
        max_epochs=-1,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    if checkpoint is not None and trainer.is_global_zero:
        print(f"coefficients: resuming from {checkpoint}", flush=True)
    trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    seconds = checkpoints.seconds
    settled = module.settle()
    judged = module.judge()
    if trainer.is_global_zero:
        _log(trainer, judged)
        learned = module.objective.coefficients(module.theta)
        about = _about(module, family) | {"validated": settled, "held_out": judged, "seconds": seconds}
        plain = Coefficients(learned.alpha, learned.beta, tuple(module.names), about).to_dict()
        write_record(folder / "coefficients.json", plain)
    trainer.strategy.barrier("coefficients written")
    return trainer.loggers


def _log(trainer: pl.Trainer, judged: dict[str, Any]) -> None:
    """Log the outcome to W&B and metrics.jsonl."""
    found = judged["systematic"]
    values = {
        f"held_out/{key}_{when}": found[when][key] for when in ("before", "start", "after") for key in found[when]
    }
    values |= {f"held_out/{what}_{key}": found[what][key] for what in ("change", "learned") for key in found[what]}
    for logger in trainer.loggers:
        logger.log_metrics(values, trainer.global_step)
        logger.save()


def _about(module: CoefficientsModule, family: Family) -> dict[str, Any]:
    objective, fit = module.objective, module.fit_options
    log_snr = objective.schedule.log_snr(torch.tensor(objective.times, dtype=torch.float64))
    return {
        "weights": family.weights_hash,
        "solver": objective.solver.name,
        "steps": objective.grid.steps,
        "grid": objective.grid.name,
        "coins": objective.coins,
        "log_snr": [log_snr.min().item(), log_snr.max().item()],
        "lambda": module.weight.item(),
        "cost_unit": "flops",
        "updates": fit.updates,
        "images": fit.images,
        "reference_steps": fit.reference_steps,
        "seed": objective.seed,
    }


def _hand_over(folder: Path, family: Family, where: Path, objective: Objective, nearest: Tensor) -> None:
    """Copy the coefficients to the family, draw them, and print the outcome."""
    learned = Coefficients.from_dict(read_object(folder / "coefficients.json"), str(folder / "coefficients.json"))
    _put_beside(where, learned, folder / "coefficients.json")
    before, after = (
        one.probabilities(family.schedule, objective.times).T.tolist()
        for one in (objective.coefficients(nearest), learned)
    )
    log_snr = family.schedule.log_snr(torch.tensor(objective.times, dtype=torch.float64)).tolist()
    curves = {name: (before[k], after[k]) for k, name in enumerate(learned.levels) if k}
    solver = f"{objective.solver.name}, {objective.grid.steps} steps, {objective.grid.name} grid"
    caption = f"{family.data}: learned for {solver}, {learned.about['updates']} updates, seed {objective.seed}"
    probabilities_figure(log_snr, curves, folder / "probabilities.png", caption)
    if "validated" in learned.about:  # older runs kept all updates
        print(_kept(learned.about), flush=True)
    print(_outcome(learned.about["held_out"]), flush=True)
    print(
        f"{'coefficients':38s}{where / 'coefficients.json'}\n{'p_k(t)':38s}{folder / 'probabilities.png'}", flush=True
    )


def _put_beside(family: Path, learned: Coefficients, kept: Path) -> None:
    """Write the coefficients to the family's folder; if that fails, say where they are."""
    try:
        # nothing else: a calibration may have been written since this family was read
        Fitted(coefficients=learned).save(family)
    except OSError as error:
        warnings.warn(f"{error}; or copy {kept} into a copy of the family, family=COPY", stacklevel=3)


def _kept(about: dict[str, Any]) -> str:
    found = about["validated"]
    return (
        f"coefficients: {about['updates']} updates {'kept' if found['kept'] else 'dropped'}: they change the objective "
        f"by {found['objective']:.2g} ± {found['half_width']:.1g} (95 percent, {about['held_out']['samples']} samples)"
    )


def _outcome(judged: dict[str, Any]) -> str:
    found = judged["systematic"]
    before, after, change = found["before"], found["after"], found["change"]
    return (
        f"coefficients: objective {before['objective']:.4g} -> {after['objective']:.4g} (change "
        f"{change['objective']:.2g} ± {change['half_width']:.1g}, 95 percent, systematic coins, {judged['samples']} "
        f"held-out samples), cost {before['cost']:.4f} -> {after['cost']:.4f}, mse {before['mse']:.4g} -> "
        f"{after['mse']:.4g}"
    )


def _say_duration(where: Path, module: CoefficientsModule) -> None:
    """Print the estimated time here, on the CPU."""
    fit, objective = module.fit_options, module.objective
    indices = torch.arange(fit.batch_size)
    begin = time.perf_counter()
    plain = objective.reference(indices)
    once = time.perf_counter() - begin
    reference = once / objective.grid.steps * fit.reference_steps
    begin = time.perf_counter()
    if fit.tangents == "reverse":
        first_order(objective, module.first, *replicates(objective, fit, module.first, 0, indices, plain), 1.0)
    else:
        directions = objective.directions(0, fit.draws) if fit.tangents == "random" else None
        objective.estimate(module.first, objective.draw(module.first, 0, fit.draws), indices, plain, 1.0, directions)
    seconds = time.perf_counter() - begin
    learned_from = once if fit.tangents == "reverse" else once + reference
    references = (fit.images * learned_from + 2 * fit.held_out * reference) / fit.batch_size
    minutes = (fit.updates * seconds + references) / 60
    print(
        f"coefficients of {where}: {module.first.numel()} numbers, {seconds:.2f} s per step, about {minutes:.1f} "
        f"minutes for {fit.updates} steps and the references on one CPU"
    )
