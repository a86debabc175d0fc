"""Metrics of images on disk, on any number of ranks: the options `metric=`, `eval=ref` and `eval=folder`."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mlem.cli.ranks import fail_together, new_fabric
from mlem.cli.schema import Data, Metric, Sample
from mlem.data import Shards, ensure
from mlem.files import first_process, write_json
from mlem.metrics import FID, Measure, Score, reference_path
from mlem.outputs import png_tree, read_pixels

__all__ = ["check_measure", "measure_folder", "measure_of", "measure_reference", "new_fid", "prepared", "report"]

BATCH = 256
"""Real images per batch."""


def measure_reference(job: Sample) -> None:
    """`eval=ref`: compute the reference statistics and cache them, unless they exist."""
    measure = _asked(job)
    fabric = new_fabric(job.trainer)
    fabric.launch()
    measure.start(fabric.device)
    if fabric.is_global_zero:
        assert measure.cache is not None
        if not reference_path(measure.cache, measure.fid, measure.key).is_file():
            raise ValueError(f"nothing could be written to metric.cache={measure.cache}; name another folder")
        what = f"{measure.fid.protocol}, {measure.key['count']} images of {measure.key['data']}"
        state = "already exist" if measure.cached else "computed"
        print(f"reference statistics {state} ({what}): {reference_path(measure.cache, measure.fid, measure.key)}")


def measure_folder(job: Sample) -> None:
    """`eval=folder`: score the PNGs of `folder`."""
    if job.folder is None:
        raise ValueError("eval=folder needs the images: add folder=PATH")
    paths = png_tree(Path(job.folder))
    measure = _asked(job)
    measure.check(len(paths))
    fabric = new_fabric(job.trainer)
    fabric.launch()
    report(measure, paths, fabric, job.batch_size, None if job.out is None else Path(job.out))


def _asked(job: Sample) -> Measure:
    measure = measure_of(job.metric, job.data, prepared(job.data)) if job.metric.features is not None else None
    if measure is None:
        raise ValueError(f"eval={job.eval.name} needs a metric, got metric=none: choose fid_random256")
    return measure


def prepared(data: Data) -> Shards:
    """The data set, prepared if missing."""
    return ensure(data.source, data.folder, progress=first_process(), **data.options)


def new_fid(metric: Metric, shape: tuple[int, int, int]) -> FID | None:
    """The features named by `metric`; None for none. Raises ValueError if they are not available."""
    if metric.features is None:
        return None
    keep = Measure.keeps(metric.kid, metric.precision_recall, metric.blocks)
    return FID(metric.features, shape, metric.weights, metric.sha256, keep)


def measure_of(metric: Metric, data: Data, shards: Shards) -> Measure | None:
    """The scores requested by `metric`, against the images of `data`; None for none. Raises like `new_fid`."""
    decoder = shards.decoder
    fid = new_fid(metric, shards.shape if decoder is None else decoder.picture_shape(shards.shape))
    if fid is None:
        return None
    reals = _RealImages(shards, metric.reference, fid)
    records = json.dumps([record.sha256 for record in shards.manifest.shards])
    manifest = hashlib.sha256(records.encode()).hexdigest()
    key = {"data": data.name, "manifest": manifest, "count": reals.count}
    key |= {} if decoder is None else {"decoder": decoder.fingerprint}
    return Measure(fid, reals, key, Path(metric.cache), metric.kid, metric.precision_recall, metric.blocks)


def check_measure(metric: Metric, shape: tuple[int, int, int], reals: int, count: int) -> None:
    """Raise ValueError if `count` images, or `reals` real ones, are too few for `metric`, and like `new_fid`."""
    fid = new_fid(metric, shape)
    if fid is not None:
        key = {"count": min(reals, metric.reference or reals)}
        options = {"kid": metric.kid, "precision_recall": metric.precision_recall, "blocks": metric.blocks}
        Measure(fid, (), key, **options).check(count)


class _RealImages:
    """Batches (indices, images) of the first real images, this rank's share, read afresh at every iteration.

    Latents are decoded, on the device of the features.
    """

    def __init__(self, shards: Shards, limit: int | None, fid: FID) -> None:
        self._shards, self._fid, self.count = shards, fid, min(len(shards), limit or len(shards))

    def __iter__(self) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
        rank, world_size = 0, 1
        if torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        mine = range(rank, self.count, world_size)
        for start in range(0, len(mine), BATCH):
            indices = mine[start : start + BATCH]
            images, decoder = self._shards.images(indices), self._shards.decoder
            yield indices, images if decoder is None else decoder.decode(images.to(self._fid.metric.device))


def report(measure: Measure, paths: Sequence[Path], fabric: Any, batch_size: int, out: Path | None) -> None:
    """Score the images in `paths`; rank 0 prints the scores and writes them to `metrics.json` in `out`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = _scores(measure, paths, fabric, batch_size)
    if not fabric.is_global_zero:
        return
    for warning in caught:
        print(f"warning: {warning.message}")
    for score in scores:
        spread = "" if score.spread is None else f" ± {score.spread:.3g} over {score.parts}"
        print(f"{score.name}: {score.value:.5g}{spread} (against {score.real_count} real images)")
    if out is not None:
        write_json(out / "metrics.json", {"data": measure.key["data"], "scores": [asdict(score) for score in scores]})
        print(f"metrics: {out / 'metrics.json'}")


def _scores(measure: Measure, paths: Sequence[Path], fabric: Any, batch_size: int) -> list[Score]:
    fid, failure = measure.start(fabric.device), None
    mine = range(fabric.global_rank, len(paths), fabric.world_size)
    try:
        for start in range(0, len(mine), batch_size):
            indices = mine[start : start + batch_size]
            fid.update(torch.stack([read_pixels(paths[index], fid.image_shape) for index in indices]), indices)
    except (ValueError, OSError) as error:
        failure = error
    fail_together(failure)
    return measure.scores(fid, expected=len(paths))
