"""CIFAR-10 and CelebA from archives in the official format: the same pixels, the same bytes, and nothing executed."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mlem.data import Shards, count_of, ensure, prepare
from mlem.data.command import main
from mlem.data.datasets import celeba, cifar10
from mlem.data.shards import parallel
from mlem.metrics import FID, FewImagesWarning
from tests import archives as make
from tests.commands import PLAIN, environment, run_here, succeed, wait_until
from tests.forkserver import children


def contents(folder: Path) -> dict[str, bytes]:
    """Every visible file of a data set."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def pixels_of(shards: Shards) -> np.ndarray:
    return torch.stack([shards.read(i) for i in range(len(shards))]).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both archives: cifar-10-python.tar.gz with 10 images a batch, and 60 faces."""
    folder = tmp_path_factory.mktemp("archives")
    make.cifar10(folder / cifar10.ARCHIVE)
    make.celeba(folder, make.faces(60), [0] * 50 + [1] * 6 + [2] * 4)
    return folder


def stored(name: str, home: Path, out: Path, **options: Any) -> Shards:
    prepare(name, out, source=str(home), any_checksum=True, progress=False, **options)
    return Shards.open(out)


# --- pixels ---


def test_cifar10_is_exact(home, tmp_path):
    expected = make.cifar10(tmp_path / "again.tar.gz")
    train, test = (stored("cifar10", home, tmp_path / split, split=split, shard_size=20) for split in ("train", "test"))
    assert train.shape == test.shape == (3, 32, 32)
    np.testing.assert_array_equal(pixels_of(train), expected[:50])
    np.testing.assert_array_equal(pixels_of(test), expected[50:])
    assert len(train.manifest.shards) == 3
    assert train.classes[3] == "cat"
    assert train.labels(range(50)).tolist() == [*range(10)] * 5


def test_cifar10_pickled_by_python_3_is_the_same(tmp_path):
    pixels = make.smooth(4, (32, 32))
    batches = {name: pickle.dumps(make.batch(pixels), protocol=2) for name in cifar10.BATCHES["train"]}
    path = make.cifar10_archive(tmp_path / cifar10.ARCHIVE, batches)
    source = cifar10.CIFAR10(source=str(path), any_checksum=True).build().open()
    np.testing.assert_array_equal(source.images(0, 20), np.concatenate([pixels] * 5))


def box(pixels: np.ndarray, size: int) -> np.ndarray:
    """Rows scaled down: the mean, rounded, of the pixels whose centre lies in the span of each new one."""
    ratio = len(pixels) / size
    centre = np.arange(len(pixels)) + 0.5
    spans = [(centre > i * ratio) & (centre <= (i + 1) * ratio) for i in range(size)]
    return np.stack([np.floor(pixels[span].mean(0) + 0.5) for span in spans])


@pytest.mark.parametrize("size", [64, 32])
def test_celeba_is_cut_and_scaled_exactly(home, tmp_path, size):
    shards = stored("celeba", home, tmp_path / "out", split="valid", size=size)
    with zipfile.ZipFile(home / celeba.ARCHIVE) as archive:
        jpegs = [archive.read(f"img_align_celeba/{number:06d}.jpg") for number in range(51, 57)]
    for jpeg, found in zip(jpegs, pixels_of(shards), strict=True):
        middle = np.asarray(Image.open(io.BytesIO(jpeg)))[39:179, 19:159].astype(float)
        across = box(middle.transpose(1, 0, 2), size).transpose(1, 0, 2)
        np.testing.assert_array_equal(found, box(across, size))


def test_celeba_splits_follow_the_partition_file(home, tmp_path):
    counts = {split: len(stored("celeba", home, tmp_path / split, split=split)) for split in celeba.SPLITS}
    assert counts == {"train": 50, "valid": 6, "test": 4}


# --- the same bytes ---


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_killed_preparation_goes_on_to_the_same_bytes(tmp_path, capsys):
    zipped = make.celeba(tmp_path, make.faces(800))
    options = ["celeba", "--source", str(zipped), "--any-checksum", "--shard-size", "20"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*options, "--out", str(whole)]) == 0
    command = [sys.executable, "-m", "mlem.data", *options, "--workers", "2", "--out", str(killed)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment()) as process:
        wait_until((killed / "shard-000001.tar").exists, process)
        workers = children(process.pid)
        capsys.readouterr()
        assert main([*options, "--out", str(killed)]) == 2
        assert f"{killed} is being prepared by another process" in capsys.readouterr().err
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(workers) >= 2
    deadline = time.monotonic() + 10
    while any(map(running, workers)):
        assert time.monotonic() < deadline, "the workers outlive the process that they work for"
        time.sleep(0.01)
    assert not (killed / "manifest.json").exists()
    assert main([*options, "--out", str(killed)]) == 0
    assert re.search(r"\(\d+0 were there\)", capsys.readouterr().out)
    assert contents(killed) == contents(whole)


def test_an_interrupt_with_two_processes_is_one_line(tmp_path):
    zipped = make.celeba(tmp_path, make.faces(1500))
    options = ["celeba", "--source", str(zipped), "--any-checksum", "--shard-size", "30", "--workers", "2"]
    command = [sys.executable, "-m", "mlem.data", *options, "--out", str(tmp_path / "out")]
    options = {"stderr": subprocess.PIPE, "text": True, "env": environment(), "start_new_session": True}
    with subprocess.Popen(command, **options) as process:
        wait_until((tmp_path / "out" / "shard-000000.tar").exists, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; finished shards are kept" in errors
    assert "Traceback" not in errors


def test_a_worker_that_dies_is_an_error_and_no_hang():
    with pytest.raises(ValueError, match=r"was killed \(out of memory\?\); run the same command with fewer workers"):
        list(parallel.in_order(os._exit, [(1,), (2,)], 2))


def test_workers_do_not_wait_for_torch():
    code = "import sys, mlem.data.shards.writing, mlem.data.datasets.celeba; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


# --- the right files ---


@pytest.mark.parametrize(
    ("name", "file", "md5"),
    [
        ("cifar10", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
        ("celeba", "img_align_celeba.zip", "00d2c5bc6d35e252742224ab0c1e8fcb"),
        ("celeba", "list_eval_partition.txt", "d32c9cbf5e040fd4025c592c306e6668"),
    ],
)
def test_a_wrong_checksum_is_one_line(name, file, md5, home, tmp_path, capsys, monkeypatch):
    found = hashlib.md5((home / file).read_bytes()).hexdigest()
    if file == celeba.ARCHIVE:  # the partition file is looked at first
        listed = hashlib.md5((home / celeba.PARTITION).read_bytes()).hexdigest()
        monkeypatch.setitem(celeba.MD5, celeba.PARTITION, listed)
    assert main([name, "--source", str(home), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{home / file} has MD5 {found}, the official file has {md5}; get it again from https://" in error
    assert error.endswith("with --any-checksum\n")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_right_checksum_needs_no_option(home, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5((home / cifar10.ARCHIVE).read_bytes()).hexdigest())
    assert main(["cifar10", "--source", str(home / cifar10.ARCHIVE), "--out", str(tmp_path)]) == 0


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def python3(value: Any) -> bytes:
    return pickle.dumps(value, protocol=2)


def labelled(labels: list[Any]) -> bytes:
    """A batch of two images with these labels."""
    return python3({b"data": np.zeros((2, 3072), np.uint8), b"labels": labels})


HOSTILE = {
    "os.system": (lambda path: python3({b"data": Touch(path)}), "names posix.system: refused, not executed"),
    "eval": (lambda path: b"cbuiltins\neval\n(S'1'\ntR.", r"names builtins\.eval: refused"),
    "python 2": (lambda path: b"c__builtin__\neval\n(S'1'\ntR.", r"names __builtin__\.eval: refused"),
    "instance": (lambda path: b"(ios\nsystem\n.", r"names os\.system: refused"),
    "new object": (lambda path: b"csubprocess\nPopen\n(tR.", r"names subprocess\.Popen: refused"),
    "dotted": (lambda path: python3(np.load), r"names numpy\.load: refused"),
    "objects": (lambda path: python3({b"data": np.array([Touch(path)], object)}), "an array of 'O8'"),
    "other numbers": (lambda path: python3({b"data": np.zeros((2, 3072))}), "an array of 'f8'"),
    "by column": (lambda path: python3({b"data": np.zeros((2, 3072), np.uint8, order="F")}), "row by row"),
    "other size": (lambda path: python3({b"data": np.zeros((2, 3071), np.uint8)}), "cannot reshape"),
    "no labels": (lambda path: python3({b"data": np.zeros((2, 3072), np.uint8)}), "labels"),
    "too few labels": (lambda path: labelled([1]), "must be 2 whole numbers"),
    "labels that are none": (lambda path: labelled([b"a", b"b"]), "must be 2 whole numbers"),
    "label of no class": (lambda path: labelled([0, 10]), r"labels must be in \[0, 9\], got 0 to 10"),
    "too few values": (lambda path: make.python2_pickle(make.batch(np.zeros((2, 32, 32, 3), np.uint8)))[:300], "."),
    "codec": (lambda path: b"c_codecs\nencode\n(X\1\0\0\0aX\3\0\0\0zipt(R.", "."),
    "persistent": (lambda path: b"Pabc\n.", "persistent"),
    "no dictionary": (lambda path: python3([1]), "."),
    "empty": (lambda path: b"", "Ran out of input"),
    "text": (lambda path: b"<html>", "."),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_pickle_is_refused_and_never_executed(fault, tmp_path):
    made, message = HOSTILE[fault]
    target = tmp_path / "executed"
    good = make.python2_pickle(make.batch(make.smooth(2, (32, 32))))
    batches = dict.fromkeys(cifar10.BATCHES["train"], good) | {"data_batch_3": made(target)}
    path = make.cifar10_archive(tmp_path / cifar10.ARCHIVE, batches)
    wrong = r"cifar-10-batches-py/data_batch_3 is not a batch of CIFAR-10 \("
    with pytest.raises(ValueError, match=wrong + f".*{message}"):
        prepare("cifar10", tmp_path / "out", source=str(path), any_checksum=True, progress=False)
    assert not target.exists()
    assert not (tmp_path / "out").exists()


def test_the_hostile_pickle_does_work_where_it_is_run(tmp_path):
    pickle.loads(HOSTILE["os.system"][0](tmp_path / "executed"))
    assert (tmp_path / "executed").exists()


def test_damaged_cifar10_archives_are_named(home, tmp_path):
    def refused(path: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            prepare("cifar10", tmp_path / "out", source=str(path), any_checksum=True, progress=False)

    sound = (home / cifar10.ARCHIVE).read_bytes()
    for cut in (0, 10, 1000, len(sound) // 2, len(sound) * 3 // 4):
        (tmp_path / "cut.tar.gz").write_bytes(sound[:cut])
        refused(tmp_path / "cut.tar.gz", r"cut\.tar\.gz is not a whole tar\.gz file")
    (tmp_path / "page.tar.gz").write_bytes(b"<html>not found</html>")
    refused(tmp_path / "page.tar.gz", r"page\.tar\.gz is not a whole tar\.gz file")
    other = make.cifar10_archive(tmp_path / "other.tar.gz", {"data_batch_1": b""})
    refused(other, r"other\.tar\.gz has no cifar-10-batches-py/data_batch_2; it must be the python version")
    refused(tmp_path / "none.tar.gz", r"none\.tar\.gz does not exist; get it from https://www\.cs\.toronto\.edu")


def test_damaged_celeba_files_are_named(tmp_path):
    def refused(images: list[bytes], message: str, splits: list[int] | None = None, damage: str = "") -> None:
        path = make.celeba(tmp_path / "in", images, splits)
        if damage:
            path.with_name(celeba.PARTITION).write_text(damage)
        with pytest.raises(ValueError, match=message):
            stored("celeba", path.parent, tmp_path / f"out{len(list(tmp_path.iterdir()))}")

    good = make.faces(3)
    small = make.encoded(make.smooth(1, (64, 64))[0])
    refused([*good, good[0][:900]], r"000004\.jpg cannot be decoded .*; get the archive again")
    refused([*good, small], r"img_align_celeba/000004\.jpg is 64 x 64, aligned images are 178 x 218")
    refused([*good, b"x" * 2_000_000], r"000004\.jpg has 2000000 bytes, an image at most 1048576")
    refused(good, r"has no img_align_celeba/000004\.jpg \(1 of the list missing\)", [0, 0, 0, 0])
    refused(good, r"list_eval_partition\.txt lists no image of split 'train'", [1, 1, 2])
    refused(good, r"line 2 is not like '000001\.jpg 0': '\.\./x\.jpg 0'", damage="000001.jpg 0\n../x.jpg 0\n")
    path = make.celeba(tmp_path / "in", good)
    os.truncate(path, path.stat().st_size - 30)
    with pytest.raises(ValueError, match="is not a whole zip file"):
        stored("celeba", path, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar10", "--split", "all"], "split must be one of train, test, got 'all'"),
        (["celeba", "--split", "all"], "split must be one of train, valid, test, got 'all'"),
        (["celeba", "--size", "141"], "size must be in [1, 140], got 141"),
        (["celeba", "--download"], "no stable direct address"),
        (["celeba"], "prepare it: python -m mlem.data celeba --source img_align_celeba.zip --out out\n"),
        (["cifar10", "--source", "."], "cifar-10-python.tar.gz does not exist; get it from https://"),
        (["digits", "--workers", "0"], "workers must be >= 1, got 0"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- training ---


@pytest.mark.parametrize(
    ("options", "command"),
    [
        (["data=cifar10"], "cifar10 --source cifar-10-python.tar.gz --out data/cifar10"),
        (["data=celeba"], "celeba --source img_align_celeba.zip --out data/celeba64"),
        (
            ["data=celeba", "data.options.size=32", "data.options.split=test"],
            "celeba --source img_align_celeba.zip --out data/celeba32 --split test --size 32",
        ),
        (["data=folder", "data.options.crop=false"], "folder --source FOLDER --out data/folder --no-crop"),
    ],
)
def test_training_without_data_says_how_to_prepare_them(options, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="holds no data") as error:
        run_here("train", *PLAIN, *options)
    assert str(error.value).endswith(f"prepare it: python -m mlem.data {command}")
    assert not list(tmp_path.iterdir())


def test_prepared_data_need_no_archive_and_other_options_are_refused(home, tmp_path):
    out = tmp_path / "out"
    stored("celeba", home, out, split="valid")
    assert count_of("celeba", out, split="valid") == 6
    for source in (None, str(tmp_path / "gone.zip")):
        assert len(ensure("celeba", out, split="valid", source=source)) == 6
        with pytest.raises(ValueError, match="split is 'valid', requested 'train'"):
            ensure("celeba", out, source=source)
    with pytest.raises(ValueError, match=r"size is 64, requested 32.*; choose another folder"):
        ensure("celeba", out, split="valid", size=32)
    other = make.celeba(tmp_path / "other", make.faces(6), [1] * 6)
    with pytest.raises(ValueError, match="holds other data: md5 is"):
        ensure("celeba", out, split="valid", source=str(other), any_checksum=True)


@pytest.mark.parametrize("name", ["cifar10", "celeba"])
def test_from_the_archive_to_fid(name, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = {"cifar10": "data/cifar10", "celeba": "data/celeba64"}[name]
    assert main([name, "--source", str(home), "--any-checksum", "--out", folder]) == 0
    options = [*PLAIN, f"data={name}", "root=runs/x", "data.held_out=4", "training.steps=20", "training.batch_size=4"]
    options += ["evaluation.samplers=[{solver:ddim,steps:[2]}]", "training.warmup_steps=2"]
    sampling = ["root=runs/x", "model=unet_xs", "trainer=cpu", "steps=3", "seeds=0-7", "out=pngs"]
    if name == "cifar10":
        succeed("train", *options, cwd=tmp_path)
        succeed("sample", *sampling, cwd=tmp_path)
    else:  # the same jobs, in this process
        run_here("train", *options)
        run_here("sample", *sampling)
    shards = Shards.open(folder)
    pngs = [np.asarray(Image.open(path)) for path in sorted(Path("pngs").glob("0*.png"))]
    assert np.stack(pngs).shape == (8, *shards.shape[1:], 3)
    fid = FID("random256", shards.shape)
    fid.update_real(shards.images(range(len(shards))))
    fid.update(torch.from_numpy(np.stack(pngs)).permute(0, 3, 1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewImagesWarning)
        result = fid.compute()
    assert (result.name, result.real_count) == ("fid_random256@8", 50)
    assert 0 < result.value < float("inf")
