"""The sampler evaluation as a Lightning callback: when it runs, on which ranks, and what it logs.

`mlem.comparison` has the measurements. The callback calls `family()` of the LightningModule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from mlem.comparison.entry import Entry
from mlem.comparison.lineup import FIGURES, Lineup, write_evaluation
from mlem.comparison.row import Row
from mlem.comparison.setup import Setup
from mlem.family import Family
from mlem.metrics import Measure
from mlem.sampling import blocks
from mlem.training.lightning_internals import in_training
from mlem.training.loggers import log_pictures
from mlem.training.progress import announced
from mlem.training.stopping import stop_if_told

__all__ = ["SamplerEvaluation"]


class SamplerEvaluation(pl.Callback):
    """Runs samplers on fixed indices, sharded over ranks by whole batches, and logs the results to every logger.

    Put it before the weight averaging in the list of callbacks: it then sees the averaged weights.

    Args:
        samplers: what to run.
        indices: of the samples.
        folder: for `evaluation.json`, images and figures.
        batch_size: samples per batch.
        seed: of the noise.
        reference_steps: of the reference, the largest level from the same noise.
        every_n_epochs: in training.
        measure: FID and similar; None for the error alone.

    Attributes:
        rows: results of the last run.

    Raises:
        ValueError: options out of range, or too few samples for `measure`.
    """

    def __init__(
        self,
        samplers: Sequence[Entry],
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
        self.blocks, self.measure = blocks(indices, batch_size), measure
        self.seed, self.reference_steps = seed, reference_steps
        if measure is not None:
            measure.check(len(indices))
        self.rows: list[Row] = []

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # not in a separate validation, such as that of the finished network: its step has been evaluated
        if in_training(trainer) and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.evaluate(trainer, pl_module.family(), pl_module.device)  # type: ignore[operator]

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.evaluate(trainer, pl_module.family(), pl_module.device)  # type: ignore[operator]

    def evaluate(self, trainer: pl.Trainer, family: Family, device: torch.device) -> None:
        """Run everything on `family`; every rank must call it."""
        setup = Setup(family, self.blocks, self.seed, self.reference_steps, device, measure=self.measure)
        lineup = Lineup(setup, self.samplers)
        if not lineup.tallies:  # only plans, and a single level to run them on: training a level of a family
            return
        setup.warm_up()
        mine = self.blocks[trainer.global_rank :: trainer.world_size]
        rounds = range(-(-len(self.blocks) // trainer.world_size))
        for number in announced(rounds, f"evaluation, {len(lineup.tallies)} samplers", trainer.is_global_zero):
            stop_if_told(trainer)
            for block in mine[number : number + 1]:  # some ranks have none in the last round
                lineup.add(block)

        def total(sums: Tensor) -> Tensor:
            return trainer.strategy.reduce(sums, reduce_op="sum")  # type: ignore[return-value]

        self.rows = lineup.rows(total)
        if trainer.is_global_zero:  # which has the first batch
            ranks = f"{trainer.world_size} rank{'s' if trainer.world_size > 1 else ''}"
            about = f"{trainer.strategy.root_device.type}, batch {len(self.blocks[0])}, {ranks}"
            caption = f"{setup.caption}; {about}; bars: one standard error"
            write_evaluation(self.folder, self.rows, lineup.pictures(), lineup.calls(), caption)
            self._log(trainer)

    def _log(self, trainer: pl.Trainer) -> None:
        metrics = {name: value for row in self.rows for name, value in row.metrics().items()}
        step = max(0, trainer.global_step - 1)  # the last one done, counted from 0 as Lightning does
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
            if isinstance(logger, WandbLogger):
                self._log_pictures(logger, step)

    def _log_pictures(self, logger: WandbLogger, step: int) -> None:
        for kind in ("grids", "strips"):
            shown = sorted((self.folder / kind).glob("*.png"))
            logger.log_image(f"eval/{kind}", list(map(str, shown)), step, caption=[path.stem for path in shown])
        log_pictures([logger], {f"eval/{name}": self.folder / f"{name}.png" for name in FIGURES}, step)
        # one table besides the many panels of single numbers
        plain = [row.to_json() for row in self.rows]
        columns = [name for name in plain[0] if name != "calls"]
        cells = [[*(one[name] for name in columns), _sum(row.calls)] for one, row in zip(plain, self.rows, strict=True)]
        logger.log_table("eval/samplers", columns=[*columns, "calls"], data=cells, step=step)


def _sum(calls: Mapping[str, float]) -> str:
    return " + ".join(f"{count:.4g} {level}" for level, count in calls.items())
