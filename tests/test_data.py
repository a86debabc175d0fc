"""Data: exact round trips, resumable preparation, the command line."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from mlem.data import (
    DATASETS,
    Shards,
    ensure,
    make_source,
    prepare,
    write_shards,
)
from mlem.data.command import main


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mlem.data", *map(str, arguments)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every visible file of a data set; hidden ones are locks and caches."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return ensure("digits", tmp_path_factory.mktemp("data") / "digits", progress=False)


# --- preparation ---


def test_digits_round_trip_is_exact(digits):
    expected = np.rint(load_digits().images * 255 / 16)
    assert len(digits) == 1797
    assert digits.shape == (1, 8, 8)
    pixels = torch.stack([digits.read(i) for i in range(len(digits))])
    assert pixels.dtype == torch.uint8
    np.testing.assert_array_equal(pixels[:, 0].numpy(), expected)
    assert set(np.unique(expected)) == set(np.rint(np.arange(17) * 255 / 16))
    images = digits.images(range(len(digits)))
    assert images.dtype == torch.float32
    assert torch.equal(images, pixels.to(torch.float32) / 127.5 - 1)
    assert (images.min(), images.max()) == (-1, 1)
    assert [digits.key(i) for i in (0, 1000, 1796)] == ["00000000", "00001000", "00001796"]


def test_small_data_sets_are_decoded_once_and_stay_as_they_are(digits: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards.open(digits.folder)
    first = shards.read(3)
    whole = first.clone()
    first.fill_(7)
    monkeypatch.setattr("mlem.data.shards.reading.decode", None)  # neither is decoded again
    assert torch.equal(shards.read(3), whole)
    assert torch.equal(shards.images([3])[0], whole.float() / 127.5 - 1)
    assert not pickle.loads(pickle.dumps(shards))._kept  # workers of a loader begin with none


def test_large_data_sets_are_not_kept_in_memory(digits: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlem.data.shards.reading._KEPT_BYTES", 1000)
    shards = Shards.open(digits.folder)
    shards.images(range(20))
    assert not shards._kept


def test_colour_round_trip_is_exact(tmp_path):
    expected = make_source("dead_leaves", size=24, count=25).images(0, 25)
    shards = ensure("dead_leaves", tmp_path, progress=False, size=24, count=25)
    np.testing.assert_array_equal(torch.stack([shards.read(i) for i in range(25)]).permute(0, 2, 3, 1), expected)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves that to the collector
def test_webdataset_reads_our_shards(digits):
    import webdataset as wds

    assert wds.utils.enforce_security
    urls = [str(digits.folder / record.file) for record in digits.manifest.shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [digits.key(i) for i in range(len(digits))]
    for i in range(0, len(digits), 97):
        assert torch.equal(digits.read(i)[0], torch.tensor(np.array(Image.open(io.BytesIO(samples[i]["png"])))))
    del samples
    gc.collect()


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "the preparation ended early"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.002)


def test_killed_preparation_goes_on_to_the_same_bytes(tmp_path, capsys):
    options = ["--size", "32", "--count", "2000", "--shard-size", "100"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert main(["dead_leaves", "--out", str(whole), *options]) == 0
    with subprocess.Popen(command("dead_leaves", "--out", folder, *options), stderr=subprocess.DEVNULL) as process:
        wait_for(folder / "shard-000002.tar", process)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match="killed is unfinished"):
        Shards.open(folder)
    with pytest.raises(ValueError, match="seed is 0, requested 7"):
        prepare("dead_leaves", folder, size=32, count=2000, shard_size=100, seed=7)
    done = {record["file"] for record in json.loads((folder / "manifest.unfinished.json").read_text())["shards"]}
    assert {"shard-000000.tar", "shard-000001.tar"} <= done
    (folder / ".shard-000009.tar.1-2.tmp").write_bytes(b"half a shard")  # as a kill in mid-write leaves it
    times = {name: (folder / name).stat().st_mtime_ns for name in done}
    capsys.readouterr()
    assert main(["dead_leaves", "--out", str(folder), *options]) == 0
    assert f"({100 * len(done)} were there)" in capsys.readouterr().out
    assert times == {name: (folder / name).stat().st_mtime_ns for name in done}
    assert contents(folder) == contents(whole)
    assert not list(folder.glob(".*.tmp"))


def test_second_preparation_is_refused_and_interrupt_is_clean(tmp_path):
    arguments = command("dead_leaves", "--out", tmp_path, "--count", 100_000, "--shard-size", 50)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path / "shard-000000.tar", process)
        with pytest.raises(ValueError, match=f"{tmp_path} is being prepared by another process"):
            prepare("dead_leaves", tmp_path, count=100_000, shard_size=50)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    (line,) = [line for line in errors.splitlines() if not line.startswith("dead_leaves")]  # but the bar
    assert line == "mlem.data: interrupted; finished shards are kept, the same command continues from there"
    assert not list(tmp_path.glob(".*.tmp"))


def test_processes_may_ensure_together(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        sets = list(pool.map(lambda _: ensure("digits", tmp_path, progress=False), range(4)))
    assert [len(shards) for shards in sets] == [1797] * 4


def test_damaged_shard_alone_is_remade(tmp_path):
    prepare("digits", tmp_path, shard_size=200, progress=False)
    before = contents(tmp_path)
    os.truncate(tmp_path / "shard-000003.tar", 1000)
    assert prepare("digits", tmp_path, shard_size=200, progress=False) == 200
    assert contents(tmp_path) == before


@pytest.mark.parametrize("count", [0, 9, 11, -1])
def test_a_damaged_count_is_mended(tmp_path, count):
    folder = tmp_path / "d"
    prepare("dead_leaves", folder, size=8, count=25, shard_size=10, progress=False)
    path, before = folder / "manifest.json", (folder / "manifest.json").read_bytes()
    value = json.loads(before)
    value["shards"][1]["count"] = count
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match="prepare the data set again"):
        Shards.open(folder)
    assert prepare("dead_leaves", folder, size=8, count=25, shard_size=10, progress=False) == 10
    assert path.read_bytes() == before
    assert len(Shards.open(folder)) == 25


def test_other_data_in_the_folder_are_refused(tmp_path):
    ensure("dead_leaves", tmp_path, progress=False, size=8, count=20)
    assert len(ensure("dead_leaves", tmp_path, size=8, count=20)) == 20
    with pytest.raises(ValueError, match="seed is 0, requested 1; choose another folder"):
        ensure("dead_leaves", tmp_path, size=8, count=20, seed=1)
    with pytest.raises(ValueError, match="name is 'dead_leaves', requested 'digits'"):
        ensure("digits", tmp_path)
    with pytest.raises(ValueError, match="shard_size is 1000, requested 5"):
        prepare("dead_leaves", tmp_path, size=8, count=20, shard_size=5)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"shard-000000\.tar but no manifest\.json"):
        prepare("dead_leaves", tmp_path, size=8, count=20)


def test_full_disk_keeps_no_half_shard(tmp_path):
    limited = f"ulimit -f 300 && exec {' '.join(command('digits', '--out', tmp_path))}"  # 1 KiB blocks; shards are 1 MB
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert f"error: {tmp_path}/shard-000000.tar cannot be written (File too large); make room there" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("*.tar")) + list(tmp_path.glob(".*.tmp"))
    assert len(ensure("digits", tmp_path, progress=False)) == 1797


def test_memory_does_not_grow_with_the_data_set(tmp_path):
    asked = []

    def images(start: int, stop: int) -> np.ndarray:
        asked.append((stop - start) * 64 * 64 * 3)
        return np.zeros((stop - start, 64, 64, 3), np.uint8)

    def peak(total: int) -> int:
        tracemalloc.start()
        try:
            write_shards(tmp_path / str(total), images, name="x", info={}, total=total, shard_size=500, progress=False)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # imports and first-use caches
    assert peak(4000) < peak(500) + 1e6  # the images of the difference are 43 MB
    assert max(asked) <= 4 * 2**20


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (lambda start, stop: np.zeros((stop - start, 8, 8, 1)), "must return uint8"),
        (lambda start, stop: np.zeros((stop - start, 8, 8), np.uint8), "must return uint8"),
        (lambda start, stop: np.zeros((1, 8, 8, 1), np.uint8), r"images\(0, 3\) must return"),
        (lambda start, stop: np.zeros((stop - start, 8, 6 + stop, 1), np.uint8), "the first image was"),
    ],
)
def test_wrong_source_is_refused(tmp_path, images, message):
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, images, name="x", info={}, total=3, shard_size=3, progress=False)
    assert not list(tmp_path.glob("*.tar"))


# --- command line ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digitz", "--out", "x"], "unknown data set 'digitz'; did you mean 'digits'?"),
        (["zzz"], f"unknown data set 'zzz'; choose from: {', '.join(DATASETS)}\n"),
        ([], "required: dataset"),
        (["digits"], "required: --out"),
        (["digits", "--out", "pipe:touch x"], "folder 'pipe:touch x' is a URL"),
        (["dead_leaves", "--out", "x", "--size", "big"], "argument --size: invalid int value: 'big'"),
        (["dead_leaves", "--out", "x", "--size", "0"], "size must be >= 1, got 0"),
        (["dead_leaves", "--out", "x", "--count", "0"], "count and shard_size must be >= 1, got 0 and 1000"),
        (["dead_leaves", "--out", "x", "--seed", "-1"], "seed must be in [0, 2**64), got -1"),
        (["dead_leaves", "--out", "x", "--r-min", "5", "--r-max", "4"], "got r_min 5.0 and r_max 4.0"),
        (["dead_leaves", "--out", "x", "--r-min", "1e-5"], "raise r_min or lower r_max"),
        (["digits", "--out", "/dev/null/x"], "error: /dev/null/x/.lock cannot be written (Not a directory"),
    ],
)
def test_wrong_command_gets_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, errors = capsys.readouterr()
    assert message in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_command_prints_a_summary(tmp_path, capsys):
    assert main(["digits", "--out", str(tmp_path), "--shard-size", "900"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}: 1797 images in 10 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), 3.7 MB, ")
    assert out.endswith(" images/s\n")
    assert len(Shards.open(tmp_path).manifest.shards) == 2


def test_unknown_option_names_the_nearest():
    with pytest.raises(ValueError, match="unknown option of dead_leaves 'sead'; did you mean 'seed'"):
        prepare("dead_leaves", "x", sead=1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dead_leaves", {"size": "big"}, "size must be of type int, got 'big'"),
        ("dead_leaves", {"size": True}, "size must be of type int, got True"),
        ("dead_leaves", {"r_max": "1"}, "r_max must be of type float or null, got '1'"),
        ("folder", {"crop": "no"}, "crop must be of type bool, got 'no'"),
        ("celeba", {"source": 3}, "source must be of type str or null, got 3"),
    ],
)
def test_an_option_of_another_type_is_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_source(name, **options)
