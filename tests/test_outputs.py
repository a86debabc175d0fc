"""Folders of samples: where an image lies, what the manifest catches, packs, and merging partial runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mlem.data import Shards
from mlem.files import write_json
from mlem.ledger import Ledger
from mlem.outputs import (
    claim,
    finish,
    merge,
    pack,
    png_tree,
    read_pixels,
    sample_path,
    survey,
    verify,
    write_png,
    write_samples,
)
from mlem.outputs.command import main
from mlem.outputs.manifest import spans
from mlem.sampling import Sampler
from mlem.schedule import NoiseSchedule

SETTINGS = {"solver": "ddim", "steps": 2, "seed": 0}


def make(folder: Path, indices: range, *, settings: dict[str, Any] = SETTINGS, batch_size: int = 4) -> Path:
    """A finished folder of 4x4 RGB samples, the work of one run."""
    sampler = Sampler(
        lambda x, t: 0.5 * x, schedule=NoiseSchedule.cosine(), solver="ddim", steps=2, shape=(3, 4, 4), seed=0
    )
    claim(folder, settings)
    ledger, failure, made = write_samples(sampler, indices, folder, batch_size=batch_size)
    assert failure is None
    found = survey(folder)
    finish(folder, indices, ledger, found.noted | found.sound | made)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples 0-11 in one run."""
    return make(tmp_path_factory.mktemp("whole") / "samples", range(12))


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def images(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in png_tree(folder)}


def test_the_first_thousand_lie_flat_and_the_others_by_thousands() -> None:
    names = [sample_path(Path(), index).as_posix() for index in (0, 999, 1000, 12345, 123456789)]
    assert names[:4] == ["00000000.png", "00000999.png", "00001/00001000.png", "00012/00012345.png"]
    assert names[4] == "123456/123456789.png"


def test_the_path_depends_on_the_index_alone(tmp_path: Path) -> None:
    folder = make(tmp_path / "samples", range(998, 1003))
    there = images(folder)
    assert list(there) == ["00000998.png", "00000999.png", *(f"00001/0000100{i}.png" for i in range(3))]
    make(folder, range(2998, 3000))
    assert images(folder).items() >= there.items()
    assert verify(folder) == (7, {})


def test_a_flat_folder_of_an_old_version_is_taken_over(tmp_path: Path) -> None:
    folder = make(tmp_path / "samples", range(998, 1003))
    before = images(folder)
    for path in (folder / "00001").iterdir():
        path.rename(folder / path.name)
    for name in ("images.sha256", "manifest.json"):
        (folder / name).unlink()
    assert list(survey(folder).sound) == [*range(998, 1003)]
    assert images(folder) == before


def test_the_manifest_counts_and_lists_as_sha256sum_does(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    assert (manifest["count"], manifest["indices"], manifest["settings"]) == (12, "0-11", SETTINGS)
    checked = subprocess.run(["sha256sum", "--check", "images.sha256"], cwd=whole, capture_output=True, text=True)
    assert checked.returncode == 0
    assert checked.stdout.count(": OK") == 12
    assert (whole / "manifest.json").stat().st_size < 1000


def test_damaged_missing_and_foreign_images_are_named(copy: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["verify", str(copy)]) == 0
    assert "12 images, as in the manifest" in capsys.readouterr().out
    flip(sample_path(copy, 3))
    sample_path(copy, 7).unlink()
    shutil.copy(sample_path(copy, 0), sample_path(copy, 20))
    assert main(["verify", str(copy)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{copy}/00000003.png differs from its SHA-256 in images.sha256"
    assert said[1] == f"{copy}/00000007.png is missing"
    assert said[2] == f"{copy}/00000020.png is not in manifest.json"
    assert said[3].startswith(f"{copy}: 3 faults; run the sample command again")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_damaged_is_made_again(copy: Path, whole: Path) -> None:
    flip(sample_path(copy, 3))
    sample_path(copy, 7).unlink()
    make(copy, range(12))
    assert images(copy) == images(whole)
    assert verify(copy) == (12, {})


def test_without_a_manifest_half_files_are_made_again(copy: Path, whole: Path) -> None:
    """As after a power cut in the first run."""
    (copy / "manifest.json").unlink()
    sample_path(copy, 5).write_bytes(sample_path(copy, 5).read_bytes()[:-20])
    sample_path(copy, 6).write_bytes(b"")
    flip(sample_path(copy, 8))
    assert survey(copy).broken == dict.fromkeys((5, 6, 8), "is not a complete PNG")
    make(copy, range(12))
    assert images(copy) == images(whole)


def test_damage_outside_of_what_is_made_stays_named(copy: Path) -> None:
    flip(sample_path(copy, 3))
    make(copy, range(12, 14))
    assert verify(copy) == (14, {3: "differs from its SHA-256 in images.sha256"})


def test_a_manifest_without_its_list_is_refused(copy: Path, capsys: pytest.CaptureFixture) -> None:
    with open(copy / "images.sha256", "a") as file:
        file.write("\n")
    assert main(["verify", str(copy)]) == 2
    assert "images.sha256 does not match manifest.json: run its sample command" in capsys.readouterr().err
    (copy / "manifest.json").unlink()
    assert main(["verify", str(copy)]) == 2
    assert "has no manifest.json: run its sample command again" in capsys.readouterr().err


@pytest.mark.parametrize("indices", [[5], [0, 1, 2], [0, 2, 3, 9, 8], [1999, 0]])
def test_spans_say_what_seeds_takes(indices: list[int]) -> None:
    from mlem.cli.values import parse_indices

    assert [*parse_indices(spans(indices), "seeds")] == sorted(indices)


def hashes(folder: Path) -> dict[int, str]:
    return survey(folder).sound


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_what_adm_reads(tmp_path: Path, channels: int) -> None:
    pixels = torch.randint(256, (5, channels, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = {index: write_png(sample_path(tmp_path, index), image) for index, image in enumerate(pixels)}
    path = pack(tmp_path, [4, 0, 2], made, "npz")
    with np.load(path) as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], pixels[[4, 0, 2]].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    before = path.stat().st_mtime_ns
    pack(tmp_path, [4, 0, 2], made, "npz")
    assert path.stat().st_mtime_ns == before
    pack(tmp_path, [4, 0], made, "npz")
    with np.load(path) as archive:
        assert len(archive["arr_0"]) == 2
    assert not list(tmp_path.glob(".*"))


def test_shards_are_a_data_set(copy: Path) -> None:
    path = pack(copy, range(12), hashes(copy), "shards")
    packed = Shards.open(path)
    assert (len(packed), packed.shape) == (12, (3, 4, 4))
    for index in (0, 11):
        pixels = read_pixels(sample_path(copy, index)).float()
        assert torch.equal(((packed.images([index])[0] + 1) * 127.5).round(), pixels)
    before = (path / "shard-000000.tar").read_bytes()
    pack(copy, range(5), hashes(copy), "shards")
    assert len(Shards.open(path)) == 5
    pack(copy, range(12), hashes(copy), "shards")
    assert (path / "shard-000000.tar").read_bytes() == before
    assert len(png_tree(copy)) == 12


def test_partial_runs_merge_into_the_whole(whole: Path, tmp_path: Path) -> None:
    parts = [make(tmp_path / "a", range(4)), make(tmp_path / "b", range(4, 12))]
    assert merge(tmp_path / "out", parts[:1]) == 4
    assert merge(tmp_path / "out", parts) == 12
    assert images(tmp_path / "out") == images(whole)
    assert (tmp_path / "out/images.sha256").read_bytes() == (whole / "images.sha256").read_bytes()
    assert verify(tmp_path / "out") == (12, {})
    assert Ledger.from_dict(json.loads((tmp_path / "out/ledger.json").read_text())).images == 12


def test_a_flipped_digit_of_a_ledger_is_noticed(copy: Path, tmp_path: Path) -> None:
    """It would be added to the cost of every later run, and of every merge."""
    path = copy / "ledger.json"
    other = path.read_text().replace('"images": 12', '"images": 13')
    assert other != path.read_text()
    path.write_text(other)
    for use in (lambda: make(copy, range(14)), lambda: merge(tmp_path / "out", [copy])):
        with pytest.raises(ValueError, match=rf"^{path} differs from its checksum"):
            use()


def test_an_interrupted_merge_goes_on(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[merge.__module__]  # the package gives the function's name
    parts, calls, write = [whole, make(tmp_path / "a", range(12, 16))], [], module.atomic_write

    def failing(*given: Any, **options: Any) -> Any:
        calls.append(given)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return write(*given, **options)

    monkeypatch.setattr(module, "atomic_write", failing)
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "out", parts)
    times = {path: path.stat().st_mtime_ns for path in png_tree(tmp_path / "out")}
    assert len(times) == 5
    assert merge(tmp_path / "out", parts) == 16
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())


def test_an_overlap_with_equal_bytes_merges(whole: Path, tmp_path: Path) -> None:
    part = make(tmp_path / "a", range(8, 16))
    assert merge(tmp_path / "out", [whole, part]) == 16


def other_pixels(folder: Path) -> None:
    made = write_png(sample_path(folder, 3), torch.zeros(3, 4, 4, dtype=torch.uint8))
    finish(folder, range(12), Ledger(), hashes(folder) | {3: made})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (other_pixels, "1 images differ between {whole} and {copy}, the first is sample 3: SHA-256 "),
        (lambda copy: flip(sample_path(copy, 3)), "{copy}: sample 3 differs from its SHA-256 in images.sha256; run"),
        (
            lambda copy: write_json(copy / "settings.json", SETTINGS | {"steps": 3}),
            "cannot be merged: steps: 2 in {whole}, 3 in {copy}",
        ),
        (lambda copy: (copy / "settings.json").unlink(), "{copy} holds no samples (no settings.json)"),
        (
            lambda copy: write_json(copy / "settings.json", []),
            "{copy}/settings.json holds a JSON list, not an object; ",
        ),
        (
            lambda copy: write_json(copy / "manifest.json", []),
            "{copy}/manifest.json holds a JSON list, not an object; ",
        ),
        (lambda copy: write_json(copy / "ledger.json", []), "{copy}/ledger.json holds a JSON list, not an object; "),
        (lambda copy: write_json(copy / "ledger.json", {}), "{copy}/ledger.json is damaged (no 'levels'); restore it"),
        (
            lambda copy: write_json(copy / "ledger.json", {"levels": {}, "wall_seconds": "1", "images": 1}),
            "{copy}/ledger.json is damaged ('1' is not a number); restore it or delete it",
        ),
        (
            lambda copy: write_json(copy / "ledger.json", {"levels": {"xs": {"cost": 1}}}),
            "{copy}/ledger.json is damaged (",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_one_line(
    whole: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture, spoil: Callable, says: str
) -> None:
    spoil(copy)
    assert main(["merge", str(tmp_path / "out"), str(whole), str(copy)]) == 2
    assert says.format(whole=whole, copy=copy) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["manifest.json", "settings.json", "ledger.json"])
def test_json_of_another_kind_is_named_and_nothing_lost(copy: Path, whole: Path, name: str) -> None:
    write_json(copy / name, [])
    with pytest.raises(ValueError, match=rf"^{copy / name} holds a JSON list, not an object; restore it or delete it"):
        make(copy, range(14))
    assert images(copy).items() >= images(whole).items()


@pytest.mark.parametrize("name", ["000000009.png", "00001/000001001.png", "000001/00001001.png", "00001/00000005.png"])
def test_a_file_that_is_named_otherwise_is_no_sample(copy: Path, whole: Path, name: str) -> None:
    """A zero too many, or in another folder."""
    (copy / name).parent.mkdir(exist_ok=True)
    shutil.copy(sample_path(whole, 1), copy / name)
    assert list(survey(copy).sound) == [*range(12)]
    assert verify(make(copy, range(12))) == (12, {})


def test_a_folder_that_was_sampled_into_is_no_place_to_merge(whole: Path, copy: Path) -> None:
    with pytest.raises(ValueError, match="was sampled into; name it as a part"):
        merge(copy, [whole])


def test_images_that_are_no_samples_are_no_place_to_merge(whole: Path, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="may not be samples"):
        merge(tmp_path, [whole])
