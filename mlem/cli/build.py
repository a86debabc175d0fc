"""From checked options to the parts of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf

from mlem.cli.decoders import data_decoder
from mlem.cli.metrics import measure_of
from mlem.cli.schema import Data, Network, Networks, Train, Training
from mlem.cli.values import parse_indices
from mlem.comparison.entry import Entry, refuse_duplicates
from mlem.data import DATASETS, BatchSource, Shards, classes_of, held_out_batches, size_of, train_loader
from mlem.files import first_process, read_object, write_json, write_text
from mlem.level import Level
from mlem.networks import build, told
from mlem.provenance import provenance
from mlem.schedule import NoiseSchedule
from mlem.training.evaluation import SamplerEvaluation
from mlem.training.loggers import JSONLinesLogger, wandb_logger
from mlem.trajectory import warn_of_signal

__all__ = ["LoaderFromStep", "evaluation", "image_shape", "loggers", "new_level", "sampler_entries"]


def image_shape(data: Data) -> tuple[int, int, int]:
    """(C, H, W) without preparing the data."""
    return size_of(data.source, data.folder, **data.options)


def _schedule(options: dict[str, Any]) -> NoiseSchedule:
    """The schedule described by the option `schedule`."""
    if options["kind"] == "diffusers":
        options = {"kind": "diffusers", "config": read_object(options["file"])}
    schedule = NoiseSchedule.from_config(options)
    warn_of_signal(schedule)
    return schedule


def new_level(job: Train, size: str) -> Level:
    """A level with fresh weights, drawn from the seed. Raises ValueError if data or size do not allow it."""
    model, shape = job.model, image_shape(job.data)
    assert isinstance(model, (Network, Networks))
    classes = _number_of_classes(job.data) if model.conditional else 0
    options: dict[str, Any] = {"attention": True} if model.attention else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        network = build(model.architecture, size, shape, dropout=model.dropout, classes=classes, **options)
    level = Level(
        size,
        network,
        _schedule(job.schedule),
        shape,
        prediction=model.prediction,
        data=job.data.name,
        conditions=told(model.architecture, classes),
        licence=DATASETS[job.data.source].licence,
    )
    decoder = data_decoder(job.data)
    level.latents = {} if decoder is None else decoder.latents
    return level


def _number_of_classes(data: Data) -> int:
    try:
        return len(classes_of(data.source, data.folder, **data.options))
    except ValueError as error:
        raise ValueError(f"model.conditional=true: {error}") from error


def loggers(job: Train, folder: Path, name: str, step: int | None) -> list[Any]:
    """The loggers, JSON lines and W&B. Records code version and config in the folder.

    Args:
        folder: of the run.
        name: of the run; W&B shows it after the name of the data set.
        step: the step to resume from, 0 at the start; None: all measurements are new, whatever was there.
    """
    plain, code = job.told, provenance()
    if first_process():
        write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
        now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        write_json(folder / "run.json", {"name": f"{plain['data']['name']}/{name}", **code, "time": now})
    wandb = wandb_logger(
        folder,
        project=job.logger.project,
        name=f"{job.data.name}/{name}",
        group=plain["root"],
        mode=job.logger.mode,
        resume_step=step,
    )
    if wandb is not None:
        wandb.log_hyperparams(plain | code)
    return [JSONLinesLogger(folder / "metrics.jsonl", step or 0), *([wandb] if wandb else [])]


class LoaderFromStep(pl.LightningDataModule):
    """Loads the batches after the trainer's step: the order is a function of the step, so a resume is exact."""

    def __init__(self, shards: Shards, held_out: int, training: Training, seed: int) -> None:
        super().__init__()
        self._shards, self._training, self._seed = shards, training, seed
        self._train, self._held_out = shards.split(held_out)

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


def sampler_entries(samplers: Sequence[Any]) -> list[Entry]:
    """The samplers in `evaluation.samplers`. Raises ValueError naming the entry."""
    entries = [Entry.from_options(entry, f"evaluation.samplers[{number}]") for number, entry in enumerate(samplers)]
    if not entries:
        raise ValueError("evaluation.samplers is empty: list one or more, such as [{solver: ddim, steps: [20]}]")
    refuse_duplicates(entries)
    return entries


def evaluation(job: Train, shards: Shards, folder: Path) -> SamplerEvaluation:
    """The sampler evaluation described by `evaluation` and `metric`, writing to `folder`."""
    options = job.evaluation
    return SamplerEvaluation(
        sampler_entries(options.samplers),
        parse_indices(options.indices, "evaluation.indices"),
        folder,
        batch_size=options.batch_size,
        seed=job.seed,
        reference_steps=options.reference_steps,
        every_n_epochs=max(1, options.every_n_epochs),
        measure=measure_of(job.metric, job.data, shards),
    )
