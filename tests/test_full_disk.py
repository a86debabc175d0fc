"""What cannot be written: path and remedy are said, nothing is left half-written, caches are done without."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from mlem import Coefficients
from mlem.cli.coefficients import _put_beside
from mlem.data import prepare
from mlem.files import atomic_write, check_writable, folder_lock, write_json
from mlem.images import quantise
from mlem.metrics import FID
from mlem.metrics.reference import reference_statistics
from mlem.outputs import pack, sample_path, write_png
from mlem.plots.style import save
from mlem.training.checkpoint_files import AtomicCheckpointIO
from mlem.training.loggers import JSONLinesLogger
from mlem.weights import write_tensors, write_weights
from tests.commands import run_here
from tests.problems import level

MODULES = ("mlem.files", "mlem.training.loggers")
"""Those that open files to write."""


def _picture() -> torch.Tensor:
    return quantise(torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)))[0]


def _pack(folder: Path, format: str) -> None:
    digest = write_png(sample_path(folder, 0), _picture())
    pack(folder, [0], {0: digest}, format)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "checkpoint": lambda folder: AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(99_999)}, folder / "a.ckpt"),
    "data set": lambda folder: prepare("dead_leaves", folder, size=8, count=3, progress=False),
    "figure": lambda folder: save(Figure(), folder / "a.png"),
    "image": lambda folder: write_png(folder / "a.png", _picture()),
    "JSON": lambda folder: write_json(folder / "a.json", {}),
    "level": lambda folder: level().save(folder),
    "log": lambda folder: JSONLinesLogger(folder / "metrics.jsonl").log_metrics({"loss": 1.0}, 0),
    "npz": lambda folder: _pack(folder, "npz"),
    "shards": lambda folder: _pack(folder, "shards"),
    "tensors": lambda folder: write_tensors(folder / "a.safetensors", {"x": torch.zeros(3)}, {}),
    "weights": lambda folder: write_weights(folder / "a.safetensors", {"x": torch.zeros(3)}),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_is_said_with_the_path_and_leaves_nothing(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file takes nothing: the device is full."""

    def full(path: Any, mode: str = "r", **options: Any) -> Any:
        if not {*mode} & {*"wa"} or Path(path).name in (".lock",) or (what in ("npz", "shards") and _earlier(path)):
            return builtins.open(path, mode, **options)
        Path(path).touch()
        return builtins.open("/dev/full", "wb" if "b" in mode else "w", **options)

    def _earlier(path: Any) -> bool:
        return Path(path).name.startswith((".00000000.png", ".manifest.unfinished.json"))

    for module in MODULES:
        monkeypatch.setattr(f"{module}.open", full, raising=False)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which the device does not know
    with pytest.raises(OSError, match=rf"\A{tmp_path}/[^\n]* cannot be written \(No space left on device\); make room"):
        WRITERS[what](tmp_path)
    assert not [*tmp_path.rglob(".*.tmp")]


IN_PLACE: dict[str, Callable[[Path], Any]] = {
    "JSON": lambda path: write_json(path, {}),
    "lock": lambda path: folder_lock(path).__enter__(),
    "question": check_writable,
}


@pytest.mark.parametrize("what", IN_PLACE)
def test_a_file_in_the_place_of_a_folder_is_named(what: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        NotADirectoryError, match=rf"cannot be written \(Not a directory: {tmp_path}/file/x(/y)?\); make"
    ):
        IN_PLACE[what](tmp_path / "file" / "x" / "y")


def test_coefficients_that_cannot_be_put_beside_their_family_are_kept(tmp_path: Path) -> None:
    (tmp_path / "family").touch()
    learned = Coefficients(torch.zeros(2), torch.zeros(2), ("xs", "s"))
    with pytest.warns(UserWarning, match=r"family/coefficients.json cannot be written .*; or copy .*/kept.json into"):
        _put_beside(tmp_path / "family", learned, tmp_path / "kept.json")


def test_an_error_of_a_file_that_is_read_stays_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/other'"), folder_lock(tmp_path):
        _copy(tmp_path / "other", tmp_path / "copy")


def _copy(source: Path, target: Path) -> None:
    with atomic_write(target) as file:
        file.write(source.read_bytes())


# --- caches --------------------------------------------------------------------------------------------------------


def test_a_reference_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()  # a file in the place of the folder: root may write into any folder
    images = (torch.arange(300 * 64).view(300, 1, 8, 8) % 251).to(torch.uint8)
    fid, key = FID(), {"data": "test", "count": 300}
    with pytest.warns(UserWarning, match=r"not cached \(.*/cache/.* cannot be written .*metric.cache=FOLDER keeps"):
        assert not reference_statistics([(range(300), images)], fid, tmp_path / "cache", key)
    assert fid.metric.real_features_num_samples == 300


def test_statistics_that_are_all_that_is_asked_must_be_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    (tmp_path / "cache").touch()
    options = ("eval=ref", "trainer=cpu", "metric=fid_random256", f"metric.cache={tmp_path}/cache")
    with (
        pytest.raises(ValueError, match=r"nothing could be written to metric.cache=.*; name another folder"),
        pytest.warns(UserWarning, match="not cached"),
    ):
        run_here("sample", *options)


def test_flipped_bits_in_cached_statistics_are_noticed(tmp_path: Path) -> None:
    """The statistics are made again: safetensors has no checksum of its own."""
    images = (torch.arange(300 * 64).view(300, 1, 8, 8) % 251).to(torch.uint8)
    key = {"data": "test", "count": 300}
    reference_statistics([(range(300), images)], FID(), tmp_path, key)
    (path,) = tmp_path.iterdir()
    whole = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).integers(len(whole), size=12).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        assert not reference_statistics([(range(300), images)], FID(), tmp_path, key)
        assert reference_statistics([], FID(), tmp_path, key)
