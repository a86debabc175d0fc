"""`python train.py`: train a level, or every level of a family, and evaluate what came out."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from mlem.app.config import build_callbacks, parse_indices, without_secrets
from mlem.data import BatchSource, Shards, ensure, held_out_batches, make_source, train_loader
from mlem.family import Family, Level
from mlem.files import first_process, folder_lock, read_json, write_json, write_text
from mlem.metrics import FID, FewImagesWarning
from mlem.network import seconds_per_image, unet
from mlem.sampling import Sampler
from mlem.schedule import NoiseSchedule
from mlem.training.averaging import averaged_state, make_average
from mlem.training.checkpoints import AtomicCheckpointIO, Checkpoints, saved
from mlem.training.checkpoints import check as check_checkpoint
from mlem.training.denoising import DenoisingModule, FamilyModule
from mlem.training.evaluation import SamplerChoice, SamplerEvaluation, noise_level_figure
from mlem.training.loggers import JSONLinesLogger, wandb_logger
from mlem.training.progress import make_progress

LIGHTNING_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def run(config: DictConfig) -> None:
    """Train what `config`, already checked, describes."""
    _quiet()
    sizes = list(config.model.levels) if "levels" in config.model else [config.model.size]
    levels = [_new_level(config, size) for size in sizes]
    Family(levels)  # refuses an odd list before anything is trained
    _check_jobs(config, levels[0])
    if config.dry_run:
        _dry_run(config, levels)
        return
    shards = _data(config)
    for level in levels:
        train_level(config, level, shards)
    folder = Path(config.root) / ("family" if "levels" in config.model else config.model.name)
    family = Family([Level.load(_run_folder(config, level) / "level") for level in levels])
    if "levels" in config.model and first_process():
        family.save(folder)
    _evaluate_family(config, family, shards)


def _quiet() -> None:
    """Lightning's advice on what is decided here on purpose."""
    for text in (".*does not have many workers.*", ".*GPU available but not used.*", ".*isinstance.treespec.*"):
        warnings.filterwarnings("ignore", text)
    warnings.filterwarnings("ignore", ".*sync_dist.*")
    warnings.filterwarnings("ignore", category=FewImagesWarning)  # the count stands in the name of the metric
    os.environ.setdefault("WANDB_SILENT", "true")
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def _check_jobs(config: DictConfig, level: Level) -> None:
    """What can only be known with torch, said before anything is written."""
    _world_size(config)
    build_callbacks(config)
    parse_indices(config.evaluation.indices, "evaluation.indices")
    for choice in _choices(config):
        for steps in choice.steps:
            try:
                Sampler(level, solver=choice.solver, steps=steps)
            except ValueError as error:
                raise ValueError(f"evaluation.samplers.{choice.solver}: {error}") from error
    if config.metric.features:
        FID(config.metric.features, _image_shape(config), config.metric.weights)
    count = make_source(config.data.source, **config.data.options).count
    if not 2 <= config.data.held_out < count:
        raise ValueError(f"data.held_out must be in [2, {count - 1}], got {config.data.held_out}")


def _run_folder(config: DictConfig, level: Level) -> Path:
    return Path(config.root) / f"unet_{level.name}"


def _data(config: DictConfig) -> Shards:
    return ensure(config.data.source, config.data.folder, **config.data.options)


def _image_shape(config: DictConfig) -> tuple[int, int, int]:
    """(C, H, W) without preparing the data."""
    source = make_source(config.data.source, **config.data.options)
    height, width, channels = source.images(0, 1).shape[1:]
    return channels, height, width


def _schedule(config: DictConfig) -> NoiseSchedule:
    options: dict[str, Any] = OmegaConf.to_container(config.schedule, resolve=True)  # type: ignore[assignment]
    if options["kind"] == "diffusers":
        options = {"kind": "diffusers", "config": read_json(options["file"])}
    try:
        return NoiseSchedule.from_config(options)
    except TypeError as error:
        raise ValueError(f"schedule: {error}; see configs/schedule/{options['kind']}.yaml") from error


def _new_level(config: DictConfig, size: str) -> Level:
    """A level with fresh weights, drawn from (seed, size)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = unet(size, _image_shape(config), config.model.dropout)
    return Level(
        size,
        network,
        _schedule(config),
        _image_shape(config),
        prediction=config.model.prediction,
        data=config.data.name,
    )


def _settings(config: DictConfig, level: Level, world_size: int) -> dict[str, Any]:
    """What decides the weights that come out: a resumed run must agree on all of it."""
    plain = without_secrets(config)
    training = {key: value for key, value in plain["training"].items() if key not in ("workers", "checkpoint_every")}
    return {
        "model": {key: value for key, value in plain["model"].items() if key not in ("name", "levels", "size")},
        "level": level.name,
        "data": {key: plain["data"][key] for key in ("source", "held_out", "options")},
        "schedule": level.schedule.to_config(),
        "seed": config.seed,
        "training": training,
        "precision": config.trainer.precision,
        "world_size": world_size,
    }


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)]
    return [] if old == new else [f"{name}: {old} there, {new} now"]


def _agree(config: DictConfig, folder: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError when the run in `folder` was started with other settings, unless resume=force."""
    path = folder / "settings.json"
    if path.exists() and config.resume != "force":
        found = _differences(read_json(path), settings)
        if found:
            raise ValueError(
                f"{folder} holds a run with other settings ({'; '.join(found)}); change them back, choose another "
                "root=, or continue all the same with resume=force"
            )
    if first_process():
        write_json(path, settings)
        write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(without_secrets(config))))


def train_level(config: DictConfig, level: Level, shards: Shards) -> None:
    """Train one level in its run folder, resuming what is there; nothing to do when it is finished."""
    folder = _run_folder(config, level)
    # only rank 0 takes the lock: the others belong to it
    with folder_lock(folder) if first_process() else nullcontext():
        world_size = _world_size(config)
        _agree(config, folder, _settings(config, level, world_size))
        if (folder / "level" / "mlem.json").exists():
            if first_process():
                print(f"{level.name}: already trained, in {folder}", flush=True)
            return
        checkpoint = _checkpoint(config, folder)
        trainer, module, data = _prepare(config, level, shards, folder, checkpoint)
        begin = time.perf_counter()
        if checkpoint is not None and trainer.is_global_zero:
            print(f"{level.name}: resuming from {checkpoint}", flush=True)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        _export(trainer, module, folder, time.perf_counter() - begin)


def _prepare(
    config: DictConfig, level: Level, shards: Shards, folder: Path, checkpoint: Path | None
) -> tuple[pl.Trainer, DenoisingModule, pl.LightningDataModule]:
    options = config.training
    module = DenoisingModule(
        level,
        seed=config.seed,
        batch_size=options.batch_size // options.accumulate,
        steps=options.steps,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
    )
    if config.trainer.compile:
        level.network.compile()  # in place: the names of the weights stay
    callbacks: list[pl.Callback] = []
    if config.evaluation.every_n_epochs:
        callbacks.append(_evaluation(config, shards, folder / "evaluation"))
    # the evaluation stands before the average, and so sees the averaged weights
    callbacks += [make_average(options.average_decay), Checkpoints(folder / "checkpoints", options.checkpoint_every)]
    callbacks += [make_progress(options.batch_size, level.name), *build_callbacks(config)]
    step = 0 if checkpoint is None else int(checkpoint.stem.removeprefix("step-"))
    trainer = pl.Trainer(
        **_devices(config),
        precision=LIGHTNING_PRECISION[config.trainer.precision],  # type: ignore[arg-type]
        logger=_loggers(config, folder, level.name, step),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        max_steps=options.steps,
        max_epochs=-1,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.gradient_clip or None,
        limit_train_batches=options.epoch_steps * options.accumulate,
        reload_dataloaders_every_n_epochs=1,  # each epoch reads on from the trainer's step
        use_distributed_sampler=False,  # ranks share out the batches already
        log_every_n_steps=min(10, options.epoch_steps),
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    return trainer, module, _LoaderFromStep(shards, config)


def _devices(config: DictConfig) -> dict[str, Any]:
    return {name: config.trainer[name] for name in ("accelerator", "devices", "strategy")}


def _world_size(config: DictConfig) -> int:
    """How many ranks there will be. Raises ValueError when the batch cannot be shared by them."""
    try:
        world_size = pl.Trainer(**_devices(config), logger=False, enable_checkpointing=False).world_size
    except MisconfigurationException as error:
        raise ValueError(f"trainer: {error}") from error
    share = world_size * config.training.accumulate
    if config.training.batch_size % share:
        raise ValueError(
            f"training.batch_size must be a multiple of ranks x accumulate = {world_size} x "
            f"{config.training.accumulate}, got {config.training.batch_size}"
        )
    return world_size


def _loggers(config: DictConfig, folder: Path, name: str, step: int) -> list[Any]:
    wandb = wandb_logger(
        folder,
        project=config.logger.project,
        name=f"{config.data.name}/{name}",
        group=without_secrets(config)["root"],
        mode=config.logger.mode,
    )
    if wandb is not None:
        wandb.log_hyperparams(without_secrets(config))
    return [JSONLinesLogger(folder / "metrics.jsonl", step), *([wandb] if wandb else [])]


def _export(trainer: pl.Trainer, module: DenoisingModule, folder: Path, seconds: float) -> None:
    """Write the averaged network as a level, with what was measured of it."""
    average = next(callback for callback in trainer.callbacks if hasattr(callback, "_average_model"))  # type: ignore[attr-defined]
    module.load_state_dict(averaged_state(average))  # type: ignore[arg-type]
    error = trainer.validate(module, datamodule=trainer.datamodule, verbose=False)[0]["val/error"]  # type: ignore[attr-defined]
    if trainer.is_global_zero:
        cost = seconds_per_image(module.network.eval(), module.level({}).shape, 64)
        measured = {"error": error, "seconds": cost, "batch_size": 64, "device": trainer.strategy.root_device.type}
        module.level(measured | {"steps": trainer.global_step, "training_seconds": seconds}).save(folder / "level")
    trainer.strategy.barrier("level written")


def _checkpoint(config: DictConfig, folder: Path) -> Path | None:
    """The checkpoint to resume from. Raises ValueError when it is damaged, naming the one before it."""
    if config.resume not in ("auto", "force"):
        return check_checkpoint(Path(config.resume))
    complete = saved(folder / "checkpoints")
    return check_checkpoint(complete[0]) if complete else None


class _LoaderFromStep(pl.LightningDataModule):
    """Loads the batches that follow the trainer's step: order is a function of the step, so a resume is exact."""

    def __init__(self, shards: Shards, config: DictConfig) -> None:
        super().__init__()
        self._shards, self._training, self._seed = shards, config.training, config.seed
        self._train, self._held_out = shards.split(config.data.held_out)

    def train_dataloader(self) -> Any:
        trainer, options = self.trainer, self._training
        assert trainer is not None
        source = BatchSource(
            self._shards,
            self._train,
            batch_size=options.batch_size // options.accumulate,
            seed=self._seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start=trainer.global_step * options.accumulate,
        )
        return train_loader(source, options.workers)

    def val_dataloader(self) -> Any:
        trainer = self.trainer
        assert trainer is not None
        return held_out_batches(self._shards, self._held_out, 256, trainer.global_rank, trainer.world_size)

    test_dataloader = val_dataloader


class _RealImages:
    """Batches of real images for FID, this rank's share, read anew at every iteration."""

    limit = 10_000

    def __init__(self, shards: Shards) -> None:
        self._shards, self.count = shards, min(len(shards), self.limit)

    def __iter__(self) -> Iterator[torch.Tensor]:
        rank, world_size = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))), 1
        if torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        mine = range(rank if world_size > 1 else 0, self.count, world_size)
        for start in range(0, len(mine), 256):
            yield self._shards.images(mine[start : start + 256])


def _evaluation(config: DictConfig, shards: Shards, folder: Path) -> SamplerEvaluation:
    options, reals = config.evaluation, _RealImages(shards)
    return SamplerEvaluation(
        _choices(config),
        parse_indices(options.indices, "evaluation.indices"),
        folder,
        batch_size=options.batch_size,
        seed=config.seed,
        reference_steps=options.reference_steps,
        every_n_epochs=max(1, options.every_n_epochs),
        features=config.metric.features,
        weights=config.metric.weights,
        reals=reals,
        reals_key={
            "data": config.data.name,
            "count": reals.count,
            "options": without_secrets(config)["data"]["options"],
        },
        image_shape=shards.shape,
    )


def _choices(config: DictConfig) -> list[SamplerChoice]:
    choices = []
    for solver, steps in config.evaluation.samplers.items():
        if not OmegaConf.is_list(steps) or not steps or not all(isinstance(n, int) and n >= 1 for n in steps):
            raise ValueError(f"evaluation.samplers.{solver} must be a list of step counts >= 1, got {steps}")
        choices.append(SamplerChoice(str(solver), tuple(steps)))
    return choices


def _evaluate_family(config: DictConfig, family: Family, shards: Shards) -> None:
    """Every sampler on every level; pictures, figures, a table, and where to look."""
    whole = "levels" in config.model
    folder = Path(config.root) if whole else Path(config.root) / config.model.name / "evaluation"
    evaluation = _evaluation(config, shards, folder)
    trainer = pl.Trainer(
        **_devices(config),
        logger=_loggers(config, folder, "evaluation", 0),
        callbacks=[evaluation],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    metrics = trainer.test(
        FamilyModule(family, config.seed), datamodule=_LoaderFromStep(shards, config), verbose=False
    )[0]
    if trainer.is_global_zero:
        noise_level_figure(family, dict(metrics), folder / "error_by_noise_level.png")
        _report(evaluation.rows, family, folder, Path(config.root) / "family" if whole else folder.parent / "level")


def _report(rows: list[dict[str, Any]], family: Family, folder: Path, artefact: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    fid = next((name for name in rows[0] if name.startswith("fid_")), None)
    console = Console(width=None if os.isatty(1) else 110)
    levels = Table("level", "parameters", "MFLOPs", "held-out error", "ms/image", title="levels")
    for level in family.levels:
        error, cost = level.measured["error"], 1e3 * level.measured["seconds"]
        levels.add_row(level.name, f"{level.parameters:,}", f"{level.flops / 1e6:.1f}", f"{error:.4f}", f"{cost:.3f}")
    samplers = Table("level", "sampler", "steps", "calls", "ms/image", "MSE to reference", fid or "", title="samplers")
    for row in rows:
        error = f"{row['mse']:.2e} ± {row['mse_stderr']:.1e}"
        time_, calls = f"{1e3 * row['seconds_per_image']:.2f}", f"{row['evaluations']:g}"
        samplers.add_row(
            row["level"], row["sampler"], str(row["steps"]), calls, time_, error, f"{row[fid]:.3f}" if fid else ""
        )
    console.print(levels, samplers)
    for what, path in (
        ("trained", artefact),
        ("sample grids", folder / "grids"),
        ("error against time", folder / "error_vs_time.png"),
        ("error by noise level", folder / "error_by_noise_level.png"),
        ("metrics", folder / "metrics.jsonl"),
        ("W&B (offline runs: wandb sync PATH)", folder / "wandb"),
    ):
        if path.exists():
            print(f"{what:38s}{path}", flush=True)


def _dry_run(config: DictConfig, levels: list[Level]) -> None:
    """Print what would be done and how long it would take."""
    print(OmegaConf.to_yaml(OmegaConf.create(without_secrets(config))))
    options = config.training
    for level in levels:
        images = torch.zeros(options.batch_size // options.accumulate, *level.shape)
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            level.denoiser.predict(images, torch.zeros(len(images))).square().mean().backward()
            seconds.append(time.perf_counter() - begin)
        minutes = min(seconds) * options.accumulate * options.steps / 60
        print(
            f"{level.name}: {level.parameters:,} parameters, {level.flops / 1e6:.1f} MFLOPs for an image, about "
            f"{minutes:.1f} minutes for {options.steps} steps of {options.batch_size} images on this CPU in fp32"
        )
