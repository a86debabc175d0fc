"""Batches for training and validation, keyed by batch number: resuming exactly needs no stored state.

Why random access into WebDataset shards instead of `ResampledShards`: that draws shards with replacement (some images
twice per epoch, some never), and its order depends on the number of workers and ranks, so a resumed run sees other
data. Here the images of batch b are a pure function of (seed, b): every key comes exactly once per pass, and resuming
at batch b costs nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from mlem.data.shards.order import pass_order
from mlem.data.shards.parallel import end_with_parent
from mlem.data.shards.reading import Shards

__all__ = ["Batch", "BatchSource", "held_out_batches", "train_loader"]

Batch = dict[str, Tensor]
"""One batch; see `BatchSource`."""


class BatchSource(IterableDataset[Batch]):
    """Whole batches number `start`, `start + 1`, ... up to `stop` (endless when None), for one rank.

    Batch b consists of the positions [b * batch_size, (b + 1) * batch_size) of an endless sequence of passes over
    `indices`, each pass in a fresh order drawn from (seed, pass). Rank r gets the r-th of `world_size` equal slices,
    so the global batch is the same for every world size. Use with `train_loader`; worker w of W yields the batches
    with (b - start) % W == w, so the order does not depend on the number of workers.

    A batch is {"image": (n, C, H, W) float32 in [-1, 1] or latents, "index": (n,) int64, the data set index,
    "position": (n,) int64, the place in the endless sequence}, n = batch_size / world_size; and "label": (n,) int64
    if images have labels. No two images of a run share a position: use it to key noise.

    Args:
        shards: the data set.
        indices: (N,), distinct images of it.
        batch_size: images per batch, over all ranks; a multiple of world_size.
        seed: of the orders.
        rank: of this process, in [0, world_size).
        world_size: number of ranks.
        start: number of the first batch.
        stop: number after the last batch; None: endless.

    Raises:
        ValueError: names an option out of range.
    """

    def __init__(
        self,
        shards: Shards,
        indices: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self.indices = _checked_indices(shards, indices)
        _check_rank(rank, world_size)
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size must be a multiple of world_size {world_size}, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        if start < 0 or (stop is not None and stop < start):
            raise ValueError(f"start must be >= 0 and stop >= start, got start {start} and stop {stop}")
        self.shards, self.batch_size, self.seed = shards, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.start, self.stop = start, stop
        self._pass: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        if self.stop is None:
            raise TypeError("an endless BatchSource has no length; pass stop=")
        return self.stop - self.start

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        number = self.start + first
        while self.stop is None or number < self.stop:
            yield self.batch(number)
            number += step

    def batch(self, number: int) -> Batch:
        """This rank's slice of batch `number`."""
        share = self.batch_size // self.world_size
        first = number * self.batch_size + self.rank * share
        positions = np.arange(first, first + share)
        passes, places = np.divmod(positions, len(self.indices))
        index = np.empty_like(positions)
        for value in np.unique(passes):
            index[passes == value] = self._order(int(value))[places[passes == value]]
        return _batch(self.shards, index, positions, self.seed)

    def _order(self, number: int) -> np.ndarray:
        """The order of pass `number`; the last one is cached, since batches use it repeatedly."""
        if self._pass is None or self._pass[0] != number:
            order = pass_order(self.indices, self.shards.shard_of, seed=self.seed, number=number)
            self._pass = (number, order)
        return self._pass[1]


def train_loader(source: BatchSource, workers: int = 0) -> DataLoader[Batch]:
    """Load the batches of `source` in order.

    Args:
        source: of the batches.
        workers: processes that read ahead; 0: read in this process.

    Raises:
        ValueError: workers is negative.
    """
    if workers < 0:
        raise ValueError(f"workers must be >= 0, got {workers}")
    return _loader(source, workers)


def held_out_batches(
    shards: Shards, indices: np.ndarray, batch_size: int, rank: int = 0, world_size: int = 1
) -> DataLoader[Batch]:
    """Load images for validation: rank r reads indices[r::world_size] in order, without padding.

    Over all ranks every index comes exactly once; the last batch may be short, and ranks may differ by one image, so
    gather at the end, not per batch. "position" is the place in `indices`. With Lightning, set
    `use_distributed_sampler=False`: the images are already split over ranks.

    Args:
        shards: the data set.
        indices: (N,), distinct images of it.
        batch_size: images per batch of this rank.
        rank: of this process, in [0, world_size).
        world_size: number of ranks.

    Returns: a loader with a length.

    Raises:
        ValueError: an option is out of range, or there are fewer indices than ranks.
    """
    indices = _checked_indices(shards, indices)
    _check_rank(rank, world_size)
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if len(indices) < world_size:
        raise ValueError(f"{len(indices)} held-out images cannot be split over {world_size} ranks; hold out more")
    return _loader(_HeldOut(shards, indices, np.arange(rank, len(indices), world_size), batch_size), workers=0)


class _HeldOut(Dataset[Batch]):
    def __init__(self, shards: Shards, indices: np.ndarray, positions: np.ndarray, batch_size: int) -> None:
        self.shards, self.indices, self.positions, self.batch_size = shards, indices, positions, batch_size

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(f"held-out batch {number} is out of range; there are {len(self)}")
        positions = self.positions[number * self.batch_size : (number + 1) * self.batch_size]
        return _batch(self.shards, self.indices[positions], positions)


def _batch(shards: Shards, index: np.ndarray, positions: np.ndarray, seed: int | None = None) -> Batch:
    """seed: of the draws of latents at these positions; None: the fixed draws."""
    images = shards.images(index) if seed is None else shards.images(index, positions, seed)
    batch = {"image": images, "index": torch.from_numpy(index), "position": torch.tensor(positions)}
    return batch | {"label": shards.labels(index)} if shards.classes else batch


def _loader(batches: Dataset[Batch], workers: int) -> DataLoader[Batch]:
    # its own generator: otherwise each pass over a loader draws from the global one
    generator = torch.Generator()
    pin_memory = torch.cuda.is_available()
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=generator,
        worker_init_fn=_begin_worker,
    )


def _begin_worker(worker: int) -> None:
    """Leave Ctrl-C to the parent, which needs its workers until it has saved; they end with it."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _checked_indices(shards: Shards, indices: np.ndarray) -> np.ndarray:
    indices = np.asarray(indices, dtype=np.int64)
    if indices.ndim != 1 or not len(indices):
        raise ValueError(f"indices must be a list of at least one image, got shape {indices.shape}")
    if indices.min() < 0 or indices.max() >= len(shards) or len(np.unique(indices)) != len(indices):
        raise ValueError(f"indices must be distinct and in [0, {len(shards) - 1}], the images of {shards.folder}")
    return indices


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size), got rank {rank} and world_size {world_size}")
