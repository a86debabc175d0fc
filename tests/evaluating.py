"""A sampler evaluation of a small family on any number of ranks: `python -m tests.evaluating DATA FAMILY OUT RANKS`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from mlem.comparison.entry import Entry
from mlem.data import Shards, held_out_batches
from mlem.family import Family
from mlem.metrics import FID, FewImagesWarning, Measure
from mlem.training.denoising import FamilyModule
from mlem.training.evaluation import SamplerEvaluation
from mlem.training.loggers import JSONLinesLogger, wandb_logger

REFERENCE = 4
CHOICES = (Entry("ddpm", (2, REFERENCE)), Entry("ddim", (3,)), Entry("ddim", (3,), "karras"))
COUNT = 7
"""No multiple of ranks x batch."""


def make(folder: Path, shards: Shards, **options: Any) -> SamplerEvaluation:
    """The evaluation, with 40 images as the real ones."""

    class Reals:
        def __iter__(self):
            import torch.distributed as dist

            rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
            mine = range(rank, 40, ranks)
            yield mine, shards.images(mine)

    measure = Measure(FID(), Reals(), {"count": 40}, folder / "reference")
    settings = {"batch_size": 2, "reference_steps": REFERENCE, "measure": measure}
    return SamplerEvaluation(CHOICES, range(COUNT), folder, **settings | options)


def trainer(folder: Path, callbacks: list[Any], ranks: int = 1, **options: Any) -> pl.Trainer:
    """A quiet trainer on CPUs."""
    return pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="auto" if ranks == 1 else "ddp",
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **{"logger": False, "num_sanity_val_steps": 0} | options,
    )


def evaluate(data: Path, family: Path, out: Path, ranks: int) -> SamplerEvaluation:
    """Run it, with both loggers."""
    shards = Shards.open(data)
    evaluation = make(out, shards)
    wandb = wandb_logger(out, project="mlem", name="test", group="tests", mode="offline")
    runner = trainer(out, [evaluation], ranks, logger=[JSONLinesLogger(out / "metrics.jsonl"), wandb])
    loader = held_out_batches(shards, shards.split(16)[1], 8, runner.global_rank, runner.world_size)
    runner.test(FamilyModule(Family.load(family), 0), dataloaders=loader, verbose=False)
    return evaluation


if __name__ == "__main__":
    warnings.simplefilter("ignore", FewImagesWarning)
    evaluate(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
