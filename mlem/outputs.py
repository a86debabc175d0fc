"""Samples on disk: one PNG for each index, written atomically, shared out over ranks, made once. Any PNG is read.

folder/settings.json     how they were made; other settings are refused
folder/00000012.png      sample 12
folder/ledger.json       what the runs so far cost
folder/grid.png          the first of them side by side
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlem.files import atomic_write, read_json, write_json
from mlem.images import quantise
from mlem.ledger import Ledger
from mlem.plots import image_grid
from mlem.sampling import NonFiniteError, Sampler, blocks

GRID_IMAGES = 64
_CHANNELS = {"L": 1, "RGB": 3}


def sample_path(folder: Path, index: int) -> Path:
    """Where sample `index` is kept."""
    return folder / f"{index:08d}.png"


def claim(folder: Path, settings: dict[str, Any], what: str = "samples") -> None:
    """Note `settings` in the folder. Raises ValueError when it holds samples (`what`) made with other ones."""
    path = folder / "settings.json"
    if path.exists():
        old = read_json(path)
        odd = [
            f"{key}: {old.get(key)} there, {settings.get(key)} now"
            for key in settings | old
            if old.get(key) != settings.get(key)
        ]
        if odd:
            raise ValueError(f"{folder} holds {what} made with other settings ({'; '.join(odd)}); choose another out=")
        return
    if any(folder.glob("*.png")):
        raise ValueError(
            f"{folder} holds images that are not known to be samples (no settings.json); choose another out="
        )
    write_json(path, settings)


def write_samples(
    sampler: Sampler,
    indices: Sequence[int],
    folder: Path,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    advance: Callable[[int], None] = lambda images: None,
    keeps: bool = True,
) -> tuple[Ledger, NonFiniteError | None]:
    """Make this rank's missing samples; return what they cost, and the first failure.

    Batches are cut from `indices` alone, never from what is missing, so that an image is computed in the same
    batch, and comes out in the same bytes, for any number of ranks and after any interruption. advance: told of
    the images done. keeps: write them; of several ranks that share every batch one does. Memory holds one batch.
    """
    ledger, failure = Ledger(), None
    for block in blocks(indices, batch_size)[rank::world_size]:
        missing = {index for index in block if not sample_path(folder, index).exists()}
        if missing:
            try:
                result, good = sampler.run(block), block
            except NonFiniteError as error:
                failure = failure or error
                result, good = error.result, error.indices
            ledger.add(result.ledger)
            for index, pixels in zip(good, quantise(result.x).cpu(), strict=True):
                if keeps and index in missing:
                    write_png(sample_path(folder, index), pixels)
        advance(len(block))
    return ledger, failure


def write_png(path: Path, pixels: Tensor) -> None:
    """pixels: (C, H, W) uint8, C 1 or 3. Atomic."""
    array = pixels[0].numpy() if len(pixels) == 1 else np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    with atomic_write(path, durable=False) as file:
        Image.fromarray(array).save(file, format="PNG")


def read_pixels(path: Path, shape: tuple[int, int, int] | None = None) -> Tensor:
    """(C, H, W) uint8 of a grey or RGB PNG, as it is. Raises ValueError naming a file of another kind or `shape`."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            found = (_CHANNELS.get(image.mode), image.height, image.width)
            if found[0] is None or found != (shape or found):
                wanted = "grey or RGB" if shape is None else _described(*shape)
                raise ValueError(f"{path} is {image.mode} {image.width}x{image.height}, not {wanted}; convert it")
            array = np.array(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a PNG ({error}); make it again, or leave it out") from error
    pixels = torch.from_numpy(array)
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def _described(channels: int, height: int, width: int) -> str:
    return f"{'L' if channels == 1 else 'RGB'} {width}x{height}"


def read_png(path: Path) -> Tensor:
    """(C, H, W) float32 in [-1, 1]."""
    return read_pixels(path).float() / 127.5 - 1


def png_tree(folder: Path) -> list[Path]:
    """Every PNG in `folder` and below, sorted by path; hidden files, and the grid among samples, are left out.

    Raises FileNotFoundError where there is none.
    """
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() == ".png" and not p.name.startswith("."))
    found = [path for path in found if path.name != "grid.png" or not (path.parent / "settings.json").exists()]
    if not found:
        raise FileNotFoundError(f"folder={folder} holds no PNG; name a folder of images")
    return found


def finish(folder: Path, indices: Sequence[int], ledger: Ledger) -> dict[str, Any]:
    """Write the grid and add this run to `ledger.json`; returns what that now holds. Rank 0, after all are done."""
    shown = [path for index in indices[:GRID_IMAGES] if (path := sample_path(folder, index)).exists()]
    if shown:
        with atomic_write(folder / "grid.png") as file:
            image_grid(torch.stack([read_png(path) for path in shown])).save(file, format="PNG")
    path, total = folder / "ledger.json", Ledger()
    total.add(ledger)
    if path.exists():
        total.add(Ledger.from_dict(read_json(path)))
    if ledger.images:
        write_json(path, total.to_dict())
    return total.to_dict()
