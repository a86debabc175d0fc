"""Small archives in the exact format of the official ones."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

FACE = (178, 218)


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Protocol 2 as Python 2 wrote it: every string is bytes."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def _string(self, value: Any) -> None:
        data = value.encode("ascii") if isinstance(value, str) else value
        short = len(data) < 256
        self.write(
            (pickle.SHORT_BINSTRING + bytes([len(data)]) if short else b"T" + struct.pack("<i", len(data))) + data
        )
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = _string


def python2_pickle(value: Any) -> bytes:
    file = io.BytesIO()
    _Python2Pickler(file, 2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def batch(pixels: np.ndarray, name: str = "training batch 1 of 5") -> dict[bytes, Any]:
    """A batch of CIFAR-10 as its authors hold it. pixels: (n, 32, 32, 3) uint8."""
    n = len(pixels)
    data = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(n, 3072)
    names = [b"photo_s_%06d.png" % i for i in range(n)]
    return {b"batch_label": name.encode(), b"labels": [i % 10 for i in range(n)], b"data": data, b"filenames": names}


def cifar10_archive(path: Path, batches: dict[str, bytes]) -> Path:
    """The tar.gz of these pickles, with the files that stand beside them."""
    meta = {b"num_cases_per_batch": 10, b"num_vis": 3072, b"label_names": [b"airplane", b"automobile"]}
    files = {"batches.meta": python2_pickle(meta), **batches, "readme.html": b"<meta>"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        folder = tarfile.TarInfo("cifar-10-batches-py")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def cifar10(path: Path, count: int = 10) -> np.ndarray:
    """An archive with `count` images in each batch; return all of them, (6 count, 32, 32, 3), the test batch last."""
    pixels = smooth(6 * count, (32, 32))
    parts = pixels.reshape(6, count, 32, 32, 3)
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    cifar10_archive(path, {name: python2_pickle(batch(part)) for name, part in zip(names, parts, strict=True)})
    return pixels


def smooth(count: int, size: tuple[int, int]) -> np.ndarray:
    """Images of coloured clouds, (count, height, width, 3) uint8. size: (width, height)."""
    rng = np.random.default_rng(7)
    small = rng.integers(0, 256, (count, 5, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BICUBIC)) for one in small])


def encoded(pixels: np.ndarray, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def faces(count: int) -> list[bytes]:
    """JPEGs of 178 x 218 pixels; no more than 12 different ones."""
    different = [encoded(one, quality=90) for one in smooth(min(count, 12), FACE)]
    return [different[i % len(different)] for i in range(count)]


def celeba(folder: Path, images: list[bytes], splits: list[int] | None = None) -> Path:
    """The zip of these images and the partition file beside it; return the zip."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = [0] * len(images) if splits is None else splits
    path = folder / "img_align_celeba.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("img_align_celeba/", b"")
        for number, image in enumerate(images, start=1):
            archive.writestr(f"img_align_celeba/{number:06d}.jpg", image)
    lines = (f"{number:06d}.jpg {split}\n" for number, split in enumerate(splits, start=1))
    (folder / "list_eval_partition.txt").write_text("".join(lines))
    return path
