"""A folder of samples: checking its settings, making missing samples, recording results and costs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlem.files import atomic_write, read_object, write_record
from mlem.images import image_grid, quantise
from mlem.ledger import Ledger
from mlem.outputs.images import read_png, sample_path, write_png
from mlem.outputs.manifest import survey, write_manifest
from mlem.sampling import NonFiniteError, Sampler, blocks

__all__ = ["GRID_IMAGES", "claim", "differences", "finish", "write_grid", "write_samples"]

GRID_IMAGES = 64


def differences(old: Mapping[str, Any], new: Mapping[str, Any], there: str = "there", now: str = "now") -> str:
    """Both sides of each setting that differs: `steps: 3 there, 2 now`; empty if they agree."""
    keys = [*old, *(key for key in new if key not in old)]
    odd = [key for key in keys if old.get(key) != new.get(key)]
    return "; ".join(f"{key}: {old.get(key)} {there}, {new.get(key)} {now}" for key in odd)


def claim(folder: Path, settings: dict[str, Any], what: str = "samples") -> None:
    """Write `settings` to the folder. Raises ValueError if it holds samples made with others."""
    path = folder / "settings.json"
    if path.exists():
        if odd := differences(read_object(path), settings):
            raise ValueError(f"{folder} holds {what} made with other settings ({odd}); choose another out=")
        return
    if any(folder.glob("*.png")):
        raise ValueError(f"{folder} holds images that may not be samples (no settings.json); choose another out=")
    write_record(path, settings)


def write_samples(
    sampler: Sampler,
    indices: Sequence[int],
    folder: Path,
    *,
    batch_size: int,
    missing: Collection[int] | None = None,
    rank: int = 0,
    world_size: int = 1,
    advance: Callable[[int], None] = lambda images: None,
    keeps: bool = True,
    pictures: Callable[[Tensor], Tensor] = lambda samples: samples,
) -> tuple[Ledger, NonFiniteError | None, dict[int, str]]:
    """Make this rank's missing samples; return their cost, the first failure, and index -> SHA-256 of the images.

    Batches are cut from `indices`, whatever is missing, so that an image is always computed in the same batch and has
    the same bytes, for any number of ranks and after any interruption. Batches with a missing image are assigned to
    the ranks in turn. A batch is written while the next is computed: memory holds two.

    Args:
        sampler: makes them.
        indices: of all samples that the folder should hold.
        folder: to write.
        batch_size: images per batch.
        missing: the indices to make, the same on every rank; None: those missing or broken in the folder.
        rank: of this process, in [0, world_size).
        world_size: number of ranks that share the work.
        advance: called with the number of images done.
        keeps: whether to write them; only one of several ranks that share every batch does.
        pictures: turns samples (B, *shape) into images in [-1, 1].
    """
    wanted = set(missing if missing is not None else set(indices) - survey(folder).sound.keys())
    ledger, failure, hashes = Ledger(), None, {}
    writing: Future[dict[int, str]] | None = None
    with ThreadPoolExecutor(1) as writer:
        for block in [block for block in blocks(indices, batch_size) if not wanted.isdisjoint(block)][rank::world_size]:
            try:
                result, good = sampler.run(block), block
            except NonFiniteError as error:
                failure = failure or error
                result, good = error.result, error.indices
            ledger.add(result.ledger)
            pixels = zip(good, quantise(pictures(result.x)).cpu(), strict=True)
            if writing is not None:
                hashes |= writing.result()
            if keeps:
                writing = writer.submit(_write, folder, {index: one for index, one in pixels if index in wanted})
            advance(len(wanted.intersection(block)))
    return ledger, failure, hashes if writing is None else hashes | writing.result()


def _write(folder: Path, images: Mapping[int, Tensor]) -> dict[int, str]:
    return {index: write_png(sample_path(folder, index), pixels) for index, pixels in images.items()}


def finish(folder: Path, indices: Sequence[int], ledger: Ledger, hashes: Mapping[int, str]) -> dict[str, Any]:
    """Write grid and manifest, and add this run to `ledger.json`; call it last, on rank 0.

    Args:
        folder: of the samples.
        indices: in the order of the grid.
        ledger: of this run.
        hashes: index -> SHA-256 of every image that the folder should hold.

    Returns: the new contents of `ledger.json`.
    """
    write_grid(folder, indices)
    write_manifest(folder, hashes)
    path, total = folder / "ledger.json", Ledger()
    total.add(ledger)
    if path.exists():
        total.add(Ledger.from_dict(read_object(path), str(path)))
    if ledger.images:
        write_record(path, total.to_dict())
    return total.to_dict()


def write_grid(folder: Path, indices: Sequence[int]) -> None:
    """Write the first samples side by side."""
    shown = [path for index in indices[:GRID_IMAGES] if (path := sample_path(folder, index)).exists()]
    if shown:
        with atomic_write(folder / "grid.png") as file:
            image_grid(torch.stack([read_png(path) for path in shown])).save(file, format="PNG")
