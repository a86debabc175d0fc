"""The work of `train.py`: train a level, or every level of a family, and evaluate the result."""

from __future__ import annotations

import logging
import os
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf

from mlem.cli.build import LoaderFromStep, evaluation, image_shape, loggers, new_level, sampler_entries
from mlem.cli.callbacks import build_callbacks
from mlem.cli.coefficients import learn_coefficients
from mlem.cli.decoders import data_decoder
from mlem.cli.evaluation import evaluate_family
from mlem.cli.metrics import check_measure, new_fid
from mlem.cli.paths import run_folder
from mlem.cli.ranks import fail_together, new_fabric, world_size_of
from mlem.cli.resume import changes, check_resume, level_settings, note_settings, resume_point
from mlem.cli.schema import Calibration, Learning, Network, Networks, Train
from mlem.cli.values import parse_indices
from mlem.comparison.setup import Setup
from mlem.data import Shards, count_of, ensure
from mlem.family import Family
from mlem.files import clear_leftovers, damaged, first_process, folder_lock, read_object
from mlem.invocation import command
from mlem.level import Level
from mlem.metrics import FewImagesWarning
from mlem.multilevel.calibration import Calibration as FamilyCalibration
from mlem.multilevel.command import calibrate_folder
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.planner import check_estimator, check_spec
from mlem.networks import seconds_per_image
from mlem.report import write_report
from mlem.sampling import Sampler, solver_of
from mlem.training.averaging import averaged_state, make_average
from mlem.training.checkpoint_files import AtomicCheckpointIO
from mlem.training.checkpoints import Checkpoints
from mlem.training.denoising import DenoisingModule
from mlem.training.lightning_internals import average_of, log_at_last_step
from mlem.training.loggers import validated
from mlem.training.progress import make_progress
from mlem.training.system import SystemFigures

__all__ = ["train", "train_level"]

LIGHTNING_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def train(job: Train) -> None:
    """Train what the checked options describe."""
    _quiet()
    if isinstance(job.model, Learning):
        learn_coefficients(job, job.model)
        return
    levels = [new_level(job, size) for size in job.model.sizes]
    # a bad list of levels is rejected before anything is trained
    family = Family(levels, decoder=data_decoder(job.data))
    check_resume(job.resume, [run_folder(job, level.name) for level in levels])
    _check_job(job, family)
    if job.dry_run:
        _dry_run(job, levels)
        return
    shards = ensure(job.data.source, job.data.folder, **job.data.options)
    for level in _in_turn(job.model, levels):
        train_level(job, level, shards)
    trained = [Level.load(run_folder(job, level.name) / "level") for level in levels]
    family = Family(trained, decoder=shards.decoder)
    if job.model.several:
        _save_together(job, family)
        family = Family.load(Path(job.root) / "family")  # every rank gets what the first one fitted
    evaluate_family(job, family, shards)


def _save_together(job: Train, family: Family) -> None:
    """The first rank writes the family; the others wait for it, and exit if it fails."""
    if _world_size(job) > 1 and not torch.distributed.is_initialized():
        new_fabric(job.trainer).launch()  # all levels were already trained: ranks are not connected yet
    failure = None
    try:
        if first_process():
            _save_family(job, family)
    except (ValueError, OSError, FloatingPointError) as error:
        failure = error
    fail_together(failure)


def _save_family(job: Train, family: Family) -> None:
    """Write the family; the first process calibrates it unless that was done for these weights."""
    folder = Path(job.root) / "family"
    known = folder / "calibration.json"
    if known.exists():
        found = read_object(known)
        with damaged(known):
            fits = found["about"]["weights"] == family.weights_hash
        if fits:
            family.fitted = Fitted(FamilyCalibration.from_dict(found, str(known)))
            _say_other_options(job.calibration, found, folder)
    family.save(folder)
    if len(family.levels) > 1 and job.calibration.images and not family.fitted.has("calibration"):
        print("calibrating the family", flush=True)
        calibrate_folder(family, folder, device=_device(job).type, **asdict(job.calibration))


def _device(job: Train) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and job.trainer.accelerator != "cpu" else "cpu")


def _world_size(job: Train) -> int:
    return world_size_of(job.trainer, job.training.batch_size, job.training.accumulate)


def _say_other_options(options: Calibration, found: dict[str, Any], folder: Path) -> None:
    """If `calibration` differs from the options of the stored one: print which, and how to recalibrate."""
    now: dict[str, Any] = {"images": options.images, "times": options.times, "reference_steps": options.reference_steps}
    now["batch_sizes"] = sorted(set(options.batch_sizes))
    there = {name: found["about"].get(name) for name in ("images", "reference_steps")}
    there |= {"times": len(found["log_snr"]), "batch_sizes": sorted(map(int, found["seconds"]))}
    changed = [f"calibration.{name} {there[name]} there, {now[name]} now" for name in now if now[name] != there[name]]
    if options.images and changed:
        flags = " ".join(
            f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in now.items()
        )
        print(
            f"{folder / 'calibration.json'} is kept ({'; '.join(changed)}); to renew it: {command('multilevel')} "
            f"calibrate {folder} {flags}, then this again",
            flush=True,
        )


def _quiet() -> None:
    """Silence Lightning's advice on deliberate choices."""
    for text in (".*does not have many workers.*", ".*GPU available but not used.*", ".*isinstance.treespec.*"):
        warnings.filterwarnings("ignore", text)
    warnings.filterwarnings("ignore", ".*sync_dist.*")
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")  # it starts at the trainer's step
    warnings.filterwarnings("ignore", category=FewImagesWarning)  # the metric's name has the count
    os.environ.setdefault("WANDB_SILENT", "true")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def _check_job(job: Train, family: Family) -> None:
    """Checks that need torch, before anything is written. family: not yet trained."""
    _world_size(job)
    build_callbacks(job.callbacks, job.allow)
    indices = parse_indices(job.evaluation.indices, "evaluation.indices")
    if len(indices) < 2:
        raise ValueError(
            f"evaluation.indices must be at least 2 samples, such as 0-63, for a standard error, got "
            f"{job.evaluation.indices}"
        )
    _check_samplers(job, family)
    data, shape = job.data, image_shape(job.data)
    if family.decoder is not None:
        shape = family.decoder.picture_shape(shape)
        if job.training.flip:
            raise ValueError("training.flip=true: latents of mirrored pictures are not mirrored latents; leave it out")
    new_fid(job.metric, shape)  # before the data: a missing file is the more likely fault
    count = count_of(data.source, data.folder, **data.options)
    check_measure(job.metric, shape, count, len(indices))
    if count < 3:
        raise ValueError(
            f"data={data.name} has {count} image{'s' * (count != 1)}: training needs at least 3, 2 of them held out"
        )
    if not 2 <= data.held_out < count:
        raise ValueError(f"data.held_out must be in [2, {count - 1}], got {data.held_out}")


def _check_samplers(job: Train, family: Family) -> None:
    choices, several = sampler_entries(job.evaluation.samplers), len(family.levels) > 1
    if not several and all(choice.planned for choice in choices):
        raise ValueError(
            f"evaluation.samplers lists only plans, which need several levels, but {family.names[0]} is alone: add "
            "an entry without plan, or train model=family"
        )
    for number, choice in enumerate(choices):
        if choice.spec is not None and several and not job.calibration.images:
            raise ValueError(f"evaluation.samplers[{number}] has a plan, which needs calibration.images >= 2, got 0")
        try:
            for steps in choice.steps:
                solver = solver_of(choice.solver, **choice.options)
                sampler = Sampler(family.levels[0], solver=solver, steps=steps, grid=choice.grid)
                if choice.spec is not None:
                    check_estimator(solver, sampler.points, choice.spec.estimator)
                if choice.spec is not None and several:
                    check_spec(choice.spec, family, solver, sampler.grid)
            if choice.made is not None and several:
                Setup(family, []).runs(choice)
            if choice.spec is not None and several and choice.spec.probabilities == "learned":
                _check_learned(Path(job.root) / "family", family.names)
        except ValueError as error:
            raise ValueError(f"evaluation.samplers[{number}]: {error}") from error


def _check_learned(folder: Path, names: list[str]) -> None:
    """Raise ValueError unless coefficients exist for this trained family."""
    if (folder / "family.json").is_file() and (known := Family.load(folder)).names == names:
        known.fitted.coefficients_for(known)
        return
    raise ValueError(
        f"learned probabilities need a trained family of {', '.join(names)}, but {folder} is none: leave out the "
        f"entry, then run {command('train')} model=coefficients family={folder}, then this again"
    )


def _in_turn(model: Network | Networks, levels: list[Level]) -> list[Level]:
    """The levels in the order of training: smallest first, but the largest before those that learn from it."""
    if isinstance(model, Networks) and model.distillation_steps:
        return [levels[-1], *levels[:-1]]
    return levels


def train_level(job: Train, level: Level, shards: Shards) -> None:
    """Train one level in its run folder, resuming an earlier run; does nothing if finished."""
    job = _alone(job, level)
    folder = run_folder(job, level.name)
    # only rank 0 takes the lock, for all
    with folder_lock(folder) if first_process() else nullcontext():
        if first_process():
            clear_leftovers(folder)
        settings = level_settings(job, level, _world_size(job))
        changed = changes(job.resume, folder, settings)
        if not changed and _trained(folder, job.training.steps):
            if first_process():
                print(f"{level.name}: already trained, in {folder}", flush=True)
            return
        module = _module(job, level, shards)
        asked = (
            "training.steps (or model.level_steps)" if isinstance(job.model, Networks) else "training.steps",
            job.training.steps,
        )
        checkpoint, step = resume_point(job.resume, folder, module.state_dict(), asked, changed)
        note_settings(folder, settings)
        trainer, data = _prepare(job, level, shards, folder, step)
        if checkpoint is not None and trainer.is_global_zero:
            print(f"{level.name}: resuming from {checkpoint}", flush=True)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        _export(trainer, module, folder)


def _alone(job: Train, level: Level) -> Train:
    """The job with the level's own numbers of optimizer steps."""
    model, steps = job.model, job.training.steps
    if not isinstance(model, Networks):
        return job
    if model.level_steps is not None:
        steps = model.level_steps[model.levels.index(level.name)]
    taught = 0 if level.name == model.levels[-1] else model.distillation_steps
    told = {
        "training": job.told["training"] | {"steps": steps},
        "model": job.told["model"] | {"distillation_steps": taught},
    }
    return replace(
        job,
        training=replace(job.training, steps=steps),
        model=replace(model, distillation_steps=taught),
        told=job.told | told,
    )


def _trained(folder: Path, steps: int) -> bool:
    """Whether the level exists with all its steps: resume=force may have asked for more."""
    path = folder / "level" / "mlem.json"
    if not path.exists():
        return False
    with damaged(path):
        return read_object(path)["measured"].get("steps", steps) == steps


def _module(job: Train, level: Level, shards: Shards) -> DenoisingModule:
    options = job.training
    module = DenoisingModule(
        level,
        seed=job.seed,
        batch_size=options.batch_size // options.accumulate,
        steps=options.steps,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        beta2=options.beta2,
        final_rate=options.final_rate,
        label_dropout=options.label_dropout,
        flip=options.flip,
        decoder=shards.decoder,
        teacher=_teacher(job),
        distillation_steps=job.model.distillation_steps if isinstance(job.model, Networks) else 0,
    )
    if job.trainer.compile:
        level.network.compile()  # in place: weights keep their names
    return module


def _teacher(job: Train) -> Level | None:
    """The largest level, already trained, for a smaller one that learns from it."""
    if not isinstance(job.model, Networks) or not job.model.distillation_steps:
        return None
    return Level.load(run_folder(job, job.model.levels[-1]) / "level")


def _prepare(
    job: Train, level: Level, shards: Shards, folder: Path, step: int
) -> tuple[pl.Trainer, pl.LightningDataModule]:
    """The trainer that continues from `step`, and its data."""
    options = job.training
    trainer = pl.Trainer(
        **job.trainer.place(),
        precision=LIGHTNING_PRECISION[job.trainer.precision],  # type: ignore[arg-type]
        logger=loggers(job, folder, level.name, step),
        callbacks=_callbacks(job, level, shards, folder, step),
        plugins=[AtomicCheckpointIO()],
        max_steps=options.steps,
        max_epochs=-1,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.gradient_clip or None,
        limit_train_batches=options.epoch_steps * options.accumulate,
        reload_dataloaders_every_n_epochs=1,  # each epoch continues at the trainer's step
        use_distributed_sampler=False,  # batches are already split over ranks
        log_every_n_steps=min(10, options.epoch_steps),
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    return trainer, LoaderFromStep(shards, job.data.held_out, options, job.seed)


def _callbacks(job: Train, level: Level, shards: Shards, folder: Path, step: int) -> list[pl.Callback]:
    options = job.training
    callbacks: list[pl.Callback] = []
    if job.evaluation.every_n_epochs:
        # placed before the average, so it sees the averaged weights
        callbacks.append(evaluation(job, shards, folder / "evaluation"))
    pending = step > 0 and step % options.epoch_steps == 0 and not validated(folder / "metrics.jsonl", step)
    rate = f"training.learning_rate={options.learning_rate:g}"
    checkpoints = Checkpoints(folder / "checkpoints", options.checkpoint_every, rate, pending)
    callbacks += [make_average(options.average_decay), checkpoints]
    callbacks += [SystemFigures(options.batch_size), make_progress(options.batch_size, level.name)]
    return callbacks + build_callbacks(job.callbacks, job.allow)


def _export(trainer: pl.Trainer, module: DenoisingModule, folder: Path) -> None:
    """Write the averaged network as a level, with its measurements."""
    seconds = next(callback.seconds for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints))
    module.load_state_dict(averaged_state(average_of(trainer)))
    log_at_last_step(trainer)
    error = trainer.validate(module, datamodule=trainer.datamodule, verbose=False)[0]["val/error"]  # type: ignore[attr-defined]
    if trainer.is_global_zero:
        level = module.level({})
        cost = seconds_per_image(module.network.eval(), level.shape, 64, conditions=level.conditions)
        measured = {"error": error, "seconds": cost, "batch_size": 64, "device": trainer.strategy.root_device.type}
        module.level(measured | {"steps": trainer.global_step, "training_seconds": seconds}).save(folder / "level")
        write_report(folder)
    trainer.strategy.barrier("level written")


def _dry_run(job: Train, levels: list[Level]) -> None:
    """Print what would be done and its estimated time."""
    print(OmegaConf.to_yaml(OmegaConf.create(job.told)))
    ranks, device = _world_size(job), _device(job)
    levels[-1].network.to(device)
    for level in levels:
        own = _alone(job, level)
        options = own.training
        level.network.to(device)
        images = torch.zeros(options.batch_size // options.accumulate // ranks, *level.shape, device=device)
        seconds = options.steps * _seconds(level, images)
        if taught := own.model.distillation_steps if isinstance(own.model, Networks) else 0:
            seconds += min(taught, options.steps) * _seconds(levels[-1], images, backward=False)
        minutes = seconds * options.accumulate / 60
        print(
            f"{level.name}: {level.parameters:,} parameters, {level.flops / 1e6:.1f} MFLOPs per image, about "
            f"{minutes:.1f} minutes for {options.steps} steps of {options.batch_size} images on {ranks} x {device.type}"
        )


def _seconds(level: Level, images: torch.Tensor, backward: bool = True) -> float:
    """The least time of three steps on these images, or of the forward pass alone."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        with torch.set_grad_enabled(backward):
            denoiser = level.denoiser_for(torch.arange(len(images), device=images.device))
            loss = denoiser.predict(images, torch.zeros(len(images), device=images.device)).square().mean()
            if backward:
                loss.backward()
        if images.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
