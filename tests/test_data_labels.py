"""Labels beside the pixels: where they come from, how they are verified, and folders that were prepared without."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from mlem.data import Shards, classes_of, ensure, prepare, write_shards
from mlem.data.command import main
from mlem.data.shards.manifest import Manifest, ShardRecord
from mlem.data.sources import Labels
from mlem.files import sha256
from tests.archives import encoded, smooth
from tests.test_data_faults import crafted, plain


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return ensure("digits", tmp_path_factory.mktemp("data") / "digits", progress=False)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves that to the collector
def test_labels_of_digits_and_webdataset_reads_them(digits: Shards) -> None:
    import webdataset as wds

    expected = load_digits().target
    np.testing.assert_array_equal(digits.labels(range(1797)), expected)
    assert digits.labels([3, 1, 3]).tolist() == expected[[3, 1, 3]].tolist()
    samples = wds.WebDataset([str(digits.folder / "shard-000001.tar")], shardshuffle=False).decode()
    assert [sample["cls"] for sample in samples] == expected[1000:].tolist()
    gc.collect()


def photos(folder: Path, *names: str) -> Path:
    for name, pixels in zip(names, smooth(len(names), (8, 8)), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(pixels, "PNG"))
    return folder


def test_sub_folders_at_the_top_are_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = photos(tmp_path / "in", "dog/a.png", "cat/b.png", "cat/old/c.png", "Zoo x/d.png")
    (tmp_path / "in/cat/broken.png").write_bytes(b"x")
    (tmp_path / "in/empty").mkdir()
    command = ["folder", "--source", str(source), "--size", "8", "--max-broken", "0.5", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert "4 images in 3 classes (Zoo x, cat, dog), " in capsys.readouterr().out
    shards = Shards.open(tmp_path / "out")
    # in the order of the paths; the broken image is left out with its label
    assert [shards.classes[n] for n in shards.labels(range(4))] == ["Zoo x", "cat", "cat", "dog"]
    assert shards.key(2) == "00000003"
    assert classes_of("folder", tmp_path / "out") == ("Zoo x", "cat", "dog")


def test_an_image_at_the_top_means_no_classes(tmp_path: Path) -> None:
    source = str(photos(tmp_path / "in", "dog/a.png", "b.png"))
    with pytest.raises(ValueError, match=r"^data set folder has no labels$"):
        classes_of("folder", tmp_path / "out", source=source)
    prepare("folder", tmp_path / "out", source=source, size=8, progress=False)
    assert Shards.open(tmp_path / "out").classes == ()
    assert "classes" not in json.loads((tmp_path / "out/manifest.json").read_text())


FAULTS = {
    "no class": (b"2", r"key 'b' has label b'2', the manifest has classes 0 to 1; prepare the data set again"),
    "negative": (b"-1", "key 'b' has label b'-1'"),
    "no number": (b"cat", "key 'b' has label b'cat'"),
    "empty": (b"", "key 'b' has label b''"),
    "endless": (b"0" * 10_000, "key 'b' has label b'0000000000000000'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_label_is_a_damaged_shard(tmp_path: Path, fault: str) -> None:
    label, message = FAULTS[fault]
    folder = crafted(tmp_path / "data", [plain("a.png"), plain("a.cls", b"1\n"), plain("b.png"), plain("b.cls", label)])
    assert Shards.open(folder).classes == ()  # not promised, and so left alone
    promise(folder)
    with pytest.raises(ValueError, match=rf"shard-000000\.tar: {message}"):
        Shards.open(folder)


def test_a_promised_label_that_is_missing_is_a_damaged_shard(tmp_path: Path) -> None:
    folder = crafted(tmp_path / "data", [plain("a.png"), plain("b.png")])
    Shards.open(folder)
    promise(folder)
    with pytest.raises(ValueError, match=r"shard-000000\.tar: key 'a' has no cls member, the manifest names classes"):
        Shards.open(folder)


def promise(folder: Path) -> None:
    """Let the manifest name two classes."""
    path = folder / "shard-000000.tar"
    record = ShardRecord(path.name, 2, path.stat().st_size, sha256(path))
    Manifest("crafted", (1, 8, 8), {}, 2, 2, (record,), classes=("x", "y")).write(folder / "manifest.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda start, stop: np.zeros(1, int), r"labels\(0, 3\) must be 3 whole numbers, got int64 \(1,\)"),
        (lambda start, stop: np.zeros(3), r"labels\(0, 3\) must be 3 whole numbers, got float64 \(3,\)"),
        (lambda start, stop: np.array([0, 1, 2]), r"labels must be in \[0, 1\], got 0 to 2"),
        (lambda start, stop: np.array([0, -1, 1]), r"labels must be in \[0, 1\], got -1 to 1"),
    ],
)
def test_wrong_labels_of_a_source_are_refused(
    values: Callable[[int, int], np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        write_shards(
            tmp_path,
            lambda start, stop: np.zeros((stop - start, 4, 4, 1), np.uint8),
            name="x",
            info={},
            total=3,
            shard_size=3,
            labels=Labels(("a", "b"), values),
            progress=False,
        )


# --- folders of before ---


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Digits as they were prepared before labels were kept."""
    from mlem.data.datasets.digits import Digits

    source = Digits().build()
    write_shards(
        tmp_path, source.images, name="digits", info=source.info, total=source.count, shard_size=1000, progress=False
    )
    return tmp_path


def test_an_old_folder_is_read_without_labels_and_not_made_again(old: Path) -> None:
    before = (old / "shard-000000.tar").stat().st_mtime_ns
    shards = ensure("digits", old, progress=False)
    assert (len(shards), shards.classes) == (1797, ())
    assert (old / "shard-000000.tar").stat().st_mtime_ns == before
    remedy = f"{old} was prepared without labels: make them with: python -m mlem.data digits --out {old}"
    with pytest.raises(ValueError, match=f"^{remedy}$"):
        classes_of("digits", old)


def test_preparing_an_old_folder_makes_its_labels_and_says_so(
    old: Path, digits: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    images = Shards.open(old).images(range(3))
    assert main(["digits", "--out", str(old)]) == 0
    said = capsys.readouterr().err
    assert f"{old} was prepared without labels: its shards are made again, with labels\n" in said
    for name in ("manifest.json", "shard-000000.tar", "shard-000001.tar"):
        assert (old / name).read_bytes() == (digits.folder / name).read_bytes()
    assert torch.equal(Shards.open(old).images(range(3)), images)
    assert main(["digits", "--out", str(old)]) == 0
    assert "without labels" not in capsys.readouterr().err


def test_what_an_older_version_began_is_made_again(old: Path, digits: Shards) -> None:
    (old / "manifest.json").rename(old / "manifest.unfinished.json")
    assert prepare("digits", old, progress=False) == 1797
    assert (old / "manifest.json").read_bytes() == (digits.folder / "manifest.json").read_bytes()
