"""All scores of a set of images from one pass of one feature network: FID, KID, precision and recall."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlem.metrics.fid import FID, Score
from mlem.metrics.kernel import SUBSETS, kernel_distance
from mlem.metrics.neighbours import NEIGHBOURS, precision_recall
from mlem.metrics.reference import reference_statistics

__all__ = ["Measure"]


@dataclass
class Measure:
    """Which scores of images to compute, and against which reference.

    Attributes:
        fid: the features; it keeps them if any score besides FID is requested (`Measure.keeps`).
        reals: the reference, as for `reference_statistics`, read at the first `start`.
        key: of the reference, as for `reference_statistics`.
        cache: of the reference, as for `reference_statistics`.
        kid: also compute KID, from the same features.
        precision_recall: also compute precision and recall, from the same features.
        blocks: if above 1, also compute every score in this many disjoint blocks of count // blocks consecutive images
            in index order (dropping a remainder), as mean and standard deviation over blocks, named by the count of a
            block.
        cached: whether the reference came from the cache; None before `start`.
    """

    fid: FID
    reals: Iterable[tuple[Sequence[int], Tensor]]
    key: Mapping[str, Any]
    cache: Path | None = None
    kid: bool = False
    precision_recall: bool = False
    blocks: int = 1
    cached: bool | None = field(default=None, init=False)

    @staticmethod
    def keeps(kid: bool = False, precision_recall: bool = False, blocks: int = 1) -> bool:
        """Whether these options need the features of all images in memory."""
        return kid or precision_recall or blocks > 1

    def check(self, count: int) -> None:
        """Raise ValueError if `count` images, or the reference, are too few for the requested scores."""
        least = NEIGHBOURS + 1 if self.precision_recall else 2
        what = "metric.precision_recall=true" if self.precision_recall else self.fid.name
        if count < least:
            raise ValueError(f"{what} needs at least {least} images, got {count}")
        if count // self.blocks < least:
            raise ValueError(
                f"metric.blocks must be in [1, {count // least}] for {count} images, got {self.blocks}: {what} needs "
                f"at least {least} per block"
            )
        if self.key["count"] < least:
            raise ValueError(f"{what} needs at least {least} reference images, got {self.key['count']}")

    def start(self, device: str | torch.device) -> FID:
        """An FID with the reference and no images yet; every rank must call it. The reference is read once."""
        self.fid.to(device)
        if self.cached is None:
            self.cached = reference_statistics(self.reals, self.fid, self.cache, self.key)
        return self.fid.fresh()

    def scores(self, fid: FID, expected: int | None = None) -> list[Score]:
        """The requested scores of the images with which `fid`, from `start`, was updated on all ranks.

        expected: the required number of images. Raises ValueError for fewer.
        """
        whole = fid.compute(expected)
        self.check(whole.count)
        if not self.keeps(self.kid, self.precision_recall, self.blocks):
            return [whole]
        generated, real = fid.bank.gather(), fid.real_bank.gather()
        found = [whole, *self._from_features(fid, generated, real)]
        if self.blocks > 1:
            size = whole.count // self.blocks
            parts = [
                [fid.score(block), *self._from_features(fid, block, real)]
                for block in generated[: size * self.blocks].split(size)
            ]
            found += [_mean(scores) for scores in zip(*parts, strict=True)]
        return found

    def _from_features(self, fid: FID, generated: Tensor, real: Tensor) -> list[Score]:
        counts, found = (len(generated), len(real)), []

        def named(kind: str, value: float, *spread: Any) -> Score:
            return Score(f"{kind}_{fid.protocol}@{len(generated)}", value, *counts, *spread)

        if self.kid:
            value, spread = kernel_distance(generated, real)
            found.append(named("kid", value, spread, f"{SUBSETS} subsets"))
        if self.precision_recall:
            precision, recall = precision_recall(generated, real)
            found += [named("precision", precision), named("recall", recall)]
        return found


def _mean(scores: Sequence[Score]) -> Score:
    values = [score.value for score in scores]
    one, parts = scores[0], f"{len(scores)} blocks"
    return Score(one.name, statistics.fmean(values), one.count, one.real_count, statistics.stdev(values), parts)
