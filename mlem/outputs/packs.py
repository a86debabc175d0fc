"""Finished samples as one file or as shards, for programs that do not read folders. The PNGs remain the originals.

folder/samples.npz       the layout of ADM's evaluator: `arr_0`, (N, H, W, 3) uint8, grey repeated three times
folder/shards/           WebDataset tar shards of PNGs and their manifest: a data set that `mlem.data` reads
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from zipfile import BadZipFile, ZipFile, ZipInfo

import numpy as np

from mlem.data import SHARD_SIZE
from mlem.data.shards.manifest import MANIFEST, UNFINISHED, Manifest
from mlem.data.shards.writing import write_shards
from mlem.files import atomic_write
from mlem.outputs.images import read_pixels, sample_path
from mlem.outputs.manifest import spans

__all__ = ["FORMATS", "pack"]

FORMATS = ("png", "shards", "npz")
"""Values of `format=`; PNGs are always written."""


def pack(folder: Path, indices: Sequence[int], hashes: Mapping[int, str], format: str) -> Path:
    """Pack samples, unless that is already done.

    Args:
        folder: of the samples.
        indices: to pack, in this order.
        hashes: index -> SHA-256 of the images; a pack of other images is replaced.
        format: one of FORMATS.

    Returns: the path of the pack.
    """
    digest = hashlib.sha256("".join(hashes[index] for index in indices).encode()).hexdigest()
    if format == "npz":
        return _npz(folder / "samples.npz", folder, indices, digest)
    return _shards(folder / "shards", folder, indices, digest) if format == "shards" else folder


def _npz(path: Path, folder: Path, indices: Sequence[int], digest: str) -> Path:
    if _comment(path) == digest:
        return path
    shape = tuple(read_pixels(sample_path(folder, indices[0])).shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(indices), *shape[1:], 3)}
    # image by image, as np.savez would hold all in memory; without a timestamp, so that equal packs have equal bytes
    with atomic_write(path) as file, ZipFile(file, "w") as archive:
        archive.comment = digest.encode()
        with archive.open(ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)  # type: ignore[arg-type]
            for index in indices:
                pixels = read_pixels(sample_path(folder, index), shape)  # type: ignore[arg-type]
                member.write(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy().tobytes())
    return path


def _comment(path: Path) -> str | None:
    try:
        with ZipFile(path) as archive:
            return archive.comment.decode()
    except (FileNotFoundError, BadZipFile):
        return None


def _shards(path: Path, folder: Path, indices: Sequence[int], digest: str) -> Path:
    info = {"indices": spans(indices), "sha256": digest}
    started = [path / file for file in (UNFINISHED, MANIFEST) if (path / file).exists()]
    if any(Manifest.read(file).info != info for file in started):  # of other images
        for stale in [*path.glob("shard-*.tar"), *started]:
            stale.unlink()
    images = partial(_pixels, folder, indices)
    write_shards(path, images, name="samples", info=info, total=len(indices), shard_size=SHARD_SIZE)
    return path


def _pixels(folder: Path, indices: Sequence[int], start: int, stop: int) -> np.ndarray:
    """(stop - start, H, W, C) uint8"""
    return np.stack([read_pixels(sample_path(folder, i)).permute(1, 2, 0).numpy() for i in indices[start:stop]])
