"""CIFAR-10 from the official python archive: 32x32 RGB photographs in ten classes (Krizhevsky, 2009).

The archive holds pickles. They are read by an unpickler that knows bytes, numbers, lists and dicts, and replaces three
NumPy names by our own stand-ins: nothing that a pickle names is ever imported or called.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlem.data.archives import checked_md5, download, located
from mlem.data.sources import DataSet, Labels, Source, Stored

__all__ = ["ARCHIVE", "BATCHES", "CIFAR10", "CLASSES", "MD5", "SHAPE", "URL"]

ARCHIVE = "cifar-10-python.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
MD5 = "c58f30108f718f92721af3b95e74349a"
BATCHES = {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (3, 32, 32)
_FOLDER = "cifar-10-batches-py"
_MAX_BYTES = 64 * 2**20  # per batch; the official ones have 31 MB


@dataclass(frozen=True)
class CIFAR10(DataSet):
    """The 60,000 photographs of CIFAR-10, 32x32 RGB, from the official python archive.

    Images are (32, 32, 3), in the order of the archive; the ten classes are those of the archive.

    Args:
        source: cifar-10-python.tar.gz, or the folder that holds it
        split: train (50,000 images) or test (10,000)
        download: fetch the archive first if it is missing (to data/cifar-10-python.tar.gz by default)
        any_checksum: accept another archive of the same format
    """

    source: str | None = None
    split: str = "train"
    download: bool = False
    any_checksum: bool = False

    def __post_init__(self) -> None:
        if self.split not in BATCHES:
            raise ValueError(f"split must be one of {', '.join(BATCHES)}, got {self.split!r}")

    def build(self) -> Stored:
        source = f"data/{ARCHIVE}" if self.source is None and self.download else self.source
        path = None if source is None else located(source, ARCHIVE)
        read = partial(_open, split=self.split, fetch=self.download, any_checksum=self.any_checksum)
        return Stored(SHAPE, {"split": self.split}, path, ARCHIVE, read)


def _open(path: Path, *, split: str, fetch: bool, any_checksum: bool) -> Source:
    if fetch:
        download(URL, path, MD5)
    md5 = checked_md5(path, MD5, origin=URL, any_checksum=any_checksum)
    batches = [_batch(path, name, batch) for name, batch in _members(path, BATCHES[split]).items()]
    pixels, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    known = Labels(CLASSES, partial(_rows, labels))
    return Source(partial(_rows, pixels), len(pixels), {"split": split, "md5": md5}, labels=known)


def _rows(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    return rows[start:stop]


def _members(path: Path, names: list[str]) -> dict[str, bytes]:
    """The batches of the archive by name, in the order of `names`."""
    found = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                if folder == _FOLDER and name in names and member.isreg():
                    if member.size > _MAX_BYTES:
                        raise ValueError(f"{path}: {member.name} has {member.size} bytes, a batch at most {_MAX_BYTES}")
                    file = tar.extractfile(member)
                    assert file is not None
                    found[name] = file.read()
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole tar.gz file ({error}); get it again from {URL}") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{path} has no {_FOLDER}/{missing[0]}; it must be the python version of CIFAR-10: {URL}")
    return {name: found[name] for name in names}


def _batch(path: Path, name: str, batch: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The images of a batch, (n, 32, 32, 3) uint8, from rows of 1024 red, 1024 green and 1024 blue values; labels (n,).

    Raises ValueError for anything else.
    """
    try:
        held = _Unpickler(io.BytesIO(batch), encoding="bytes").load()
        values = np.frombuffer(held[b"data"].values, np.uint8).reshape(held[b"data"].shape)
        pixels = values.reshape(len(values), *SHAPE).transpose(0, 2, 3, 1)
        labels = np.array(held[b"labels"])
        Labels(CLASSES, lambda start, stop: labels).checked(0, len(values))
        return pixels, labels
    except Exception as error:  # hostile bytes can raise anything
        raise ValueError(f"{path}: {_FOLDER}/{name} is not a batch of CIFAR-10 ({error}); get it from {URL}") from error


class _Array:
    """Stands in for `numpy.ndarray`: keeps the shape and the bytes of its values."""

    shape: tuple[int, ...]
    values: bytes

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, kind, column_major, self.values = state
        if not isinstance(kind, _Kind) or column_major or not isinstance(self.values, bytes):
            raise pickle.UnpicklingError("an array that is not of uint8, row by row")


class _Kind:
    """Stands in for `numpy.dtype`; only uint8 is accepted."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of {code!r}")

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and padding, which are the same for every uint8."""


def _array(*_: Any) -> _Array:
    return _Array()


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes as Python 3 writes them in protocol 2, which the archive uses."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    _STAND_INS = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _array,
        ("numpy._core.multiarray", "_reconstruct"): _array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Kind,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return self._STAND_INS[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}: refused, not executed") from None
