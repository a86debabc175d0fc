"""Measuring one run: samples batch by batch, sums of error, scores and costs, and the resulting row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mlem.comparison.row import Row
from mlem.comparison.setup import Run, Setup, Truth
from mlem.ledger import Ledger, LevelLedger
from mlem.metrics import ImageMean, PathwiseError, psnr, ssim

__all__ = ["SHOWN", "Tally"]

SHOWN = 64
"""Most samples per image grid."""


class Tally:
    """The measurements of one run so far, on this rank.

    Attributes:
        run: being measured.
        coupled: whether it shares its path with a reference, and so has an error.
        first: up to SHOWN samples of the first batch, (B, *shape), on the CPU; None before it.
    """

    def __init__(self, setup: Setup, run: Run) -> None:
        self.run, self.coupled = run, run.solver.coupled
        self.first: Tensor | None = None
        self._setup, self._sampler, self._ledger = setup, setup.sampler(run), Ledger()
        similarities = {"psnr": ImageMean(psnr), "ssim": ImageMean(ssim)} if setup.comparable else {}
        self._means: dict[str, ImageMean] = {"mse": PathwiseError(), **similarities}
        for mean in self._means.values():
            mean.to(setup.device)
        self._fid = None if setup.measure is None else setup.measure.start(setup.device)

    def add(self, block: Sequence[int], truth: Truth | None) -> None:
        """Sample this batch. truth: of the same images, if the run is `coupled`."""
        result = self._sampler.run(block)
        self._ledger.add(result.ledger)
        if truth is not None:
            self._means["mse"].update(result.x.to(truth.x.device), truth.x)
        reference = None if truth is None else truth.pictures
        if reference is not None or self._fid is not None:
            pictures = self._setup.family.pictures(result.x)
            if reference is not None:
                self._means["psnr"].update(pictures, reference)
                self._means["ssim"].update(pictures, reference)
            if self._fid is not None:
                self._fid.update(pictures, block)
        if self.first is None:
            self.first = result.x[:SHOWN].cpu()

    @property
    def image_values(self) -> dict[str, Tensor]:
        """mse, psnr and ssim of each image sampled by this rank: (N,), float64, on the CPU."""
        return {name: torch.cat([values.cpu() for values in mean.values]) for name, mean in self._means.items()}

    def row(self, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> Row:
        """The result over all ranks; every rank must call it. total: sums a tensor over them."""
        names = self._sampler.levels
        costs = [self._ledger.levels.get(name, LevelLedger()) for name in names]
        mine = [self._ledger.wall_seconds, self._ledger.network_seconds, self._ledger.images]
        mine += [self._ledger.rounds * self._ledger.images]
        mine += [sum(cost.flops for cost in costs), *(cost.calls for cost in costs)]
        sums = total(torch.tensor(mine, dtype=torch.float64, device=self._setup.device)).tolist()
        wall, network, images, rounds, flops, *calls = sums
        row = replace(
            self.run.row,
            calls={name: count / images for name, count in zip(names, calls, strict=True)},
            evaluations=sum(calls) / images,
            rounds=rounds / images,
            flops=flops / images,
            seconds=wall / images,
            network_seconds=network / images,
            scores=self._scores(),
        )
        if not self.coupled:
            return row
        found: dict[str, float] = {}
        for name, mean in self._means.items():
            found[name], found[f"{name}_stderr"] = mean.compute()
        return replace(row, **found)

    def _scores(self) -> dict[str, float]:
        measure, found = self._setup.measure, {}
        if self._fid is None or measure is None:
            return found
        for score in measure.scores(self._fid, expected=self._setup.count):
            found[score.name] = score.value
            if score.spread is not None:
                found[f"{score.name}_std"] = score.spread
        return found
