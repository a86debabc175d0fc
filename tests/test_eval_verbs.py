"""The three verbs of `sample.py`: the reference alone, images of a folder, and samples as they are made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mlem.data import Shards
from mlem.data.datasets.folder import Folder
from mlem.images import quantise
from mlem.metrics import FID, Measure
from mlem.outputs import png_tree, read_pixels, write_png
from tests.commands import finish, run_here, start_ranks, succeed, succeed_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
    pytest.mark.filterwarnings("ignore::mlem.metrics.FewImagesWarning"),
]
FEW = ["metric=fid_random256", "metric.reference=300"]
ALL = [*FEW, "metric.kid=true", "metric.precision_recall=true", "metric.blocks=2"]


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In a folder with the trained family and the digits; its references are its own."""
    for name in ("runs", "data"):
        shutil.copytree(trained / name, tmp_path / name, ignore=shutil.ignore_patterns("reference", "wandb"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tree(here: Path) -> Path:
    """40 digits with noise, as PNGs in two folders, and what is not to be counted."""
    folder = here / "images"
    for index, pixels in enumerate(quantise(noisy(here))):
        write_png(folder / ("a" if index < 20 else "b") / f"{index:03d}.png", pixels)
    (folder / "a" / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    (folder / "b" / "settings.json").write_text("{}")
    (folder / "b" / "grid.png").write_bytes(b"the grid of a folder of samples")
    return folder


def noisy(folder: Path) -> torch.Tensor:
    images = Shards.open(folder / "data/digits").images(range(700, 740))
    return images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def scores(folder: Path) -> dict[str, dict[str, Any]]:
    return {score["name"]: score for score in json.loads((folder / "metrics.json").read_text())["scores"]}


def same(one: dict[str, Any], two: dict[str, Any]) -> None:
    for key, value in two.items():
        assert one[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)


def test_the_reference_is_computed_once(here: Path, capsys: pytest.CaptureFixture) -> None:
    for state, options in (
        ("computed", FEW),
        ("already exist", FEW),
        ("computed", ["metric.reference=301"]),  # fid_random256 by default
        ("computed", [*FEW, "metric.kid=true"]),  # which needs the features too
        ("already exist", FEW),
    ):
        run_here("sample", "eval=ref", "trainer=cpu", *options)
        assert f"reference statistics {state} (random256, 30" in capsys.readouterr().out
    assert {path.name.split("_")[0] for path in (here / "data/digits/reference").iterdir()} == {
        "random256@300",
        "random256@301",
    }


def test_a_folder_is_scored_as_its_tensors_are(here: Path, tree: Path) -> None:
    run_here("sample", "eval=folder", f"folder={tree}", "out=scores", "batch_size=7", "trainer=cpu", *ALL)
    reals = Shards.open(here / "data/digits").images(range(300))
    measure = Measure(FID(keep=True), [(range(300), reals)], {"count": 300}, kid=True, precision_recall=True, blocks=2)
    fid = measure.start("cpu")
    fid.update(noisy(here), range(40))
    expected = measure.scores(fid)
    found = scores(here / "scores")
    assert list(found) == [score.name for score in expected]
    assert "recall_random256@20" in found
    for score in expected:
        same(found[score.name], vars(score))


def test_samples_are_scored_as_they_are_made_and_again(here: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["root=runs/tiny", "trainer=cpu", "sampler=ddpm", "steps=3", "batch_size=4", "seeds=3-12", *FEW]
    out = here / "samples"
    run_here("sample", *options, f"out={out}")
    printed = capsys.readouterr().out
    assert "warning: fid_random256@10: 10 generated and 300 real images for 256 features" in printed
    made = scores(out)
    assert list(made) == ["fid_random256@10"]
    assert f"fid_random256@10: {made['fid_random256@10']['value']:.5g} (against 300 real images)" in printed
    (out / "metrics.json").unlink()
    run_here("sample", *options, f"out={out}")
    assert "nothing to do" in capsys.readouterr().out
    assert scores(out) == made
    run_here("sample", "eval=folder", f"folder={out}", "out=again", "trainer=cpu", *FEW)
    assert scores(here / "again")["fid_random256@10"]["value"] == pytest.approx(
        made["fid_random256@10"]["value"], rel=1e-9
    )


def test_without_a_metric_samples_are_not_scored(here: Path) -> None:
    run_here("sample", "root=runs/tiny", "trainer=cpu", "steps=2", "seeds=0-1", "out=plain")
    assert not (here / "plain/metrics.json").exists()
    assert not (here / "data/digits/reference").exists()


def test_two_ranks_give_the_same_and_report_a_broken_image_once(here: Path, tree: Path) -> None:
    options = ["eval=folder", f"folder={tree}", *ALL]
    run_here("sample", *options, "out=one", "trainer=cpu")
    printed = succeed_ranks("sample", *options, "out=two", cwd=here)
    assert printed.count("fid_random256@40") == 2  # the warning and the score
    one, two = scores(here / "one"), scores(here / "two")
    assert one.keys() == two.keys()
    for name, score in one.items():
        same(two[name], score)
    broken = tree / "b" / "021.png"  # of the second rank
    broken.write_bytes(broken.read_bytes()[:60])
    done = [finish(process) for process in start_ranks("sample", *options, cwd=here)]
    ours = [line for one in done for line in one.stderr.splitlines() if line.startswith("sample.py: ")]
    assert all(one.returncode == 2 for one in done)
    assert len(ours) == 1
    assert f"{broken} cannot be read as a PNG" in ours[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["eval=folder"], "eval=folder needs the images: add folder=PATH"),
        (["eval=folder", "folder=data"], "folder=data holds no PNG"),
        (["eval=folder", "folder=nowhere"], "folder=nowhere holds no PNG"),
        (["folder=data"], "add eval=folder, or leave it out"),
        (["eval=ref", "metric=none"], "eval=ref needs a metric, got metric=none"),
        (["eval=ref", "metric=fid_inception"], "its weights file at"),
        (["metric=fid_inception"], "its weights file at"),
        (["metric=fid_random256", "metric.blocks=40"], "metric.blocks must be in [1, 32] for 64 images, got 40"),
        (
            ["metric=fid_random256", "data=dead_leaves", "data.options.count=4", "family=runs/tiny/family"],
            "metric=none",
        ),
    ],
)
def test_bad_choices_are_refused_before_anything_is_sampled(here: Path, options: list[str], says: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run_here("sample", "root=runs/tiny", "trainer=cpu", "out=out", *options)
    assert says in str(error.value)
    assert not (here / "out").exists()


def test_other_images_are_named(tmp_path: Path) -> None:
    for name, mode, size in (("colour", "RGB", 8), ("alpha", "RGBA", 8), ("large", "L", 9), ("deep", "I;16", 8)):
        Image.new(mode, (size, size)).save(path := tmp_path / f"{name}.png")
        with pytest.raises(ValueError, match=rf"{name}\.png is {mode} {size}x{size}, not L 8x8; convert it"):
            read_pixels(path, (1, 8, 8))
    assert len(png_tree(tmp_path)) == 4
    Image.new("L", (8, 8)).save(path := tmp_path / "clear.png", transparency=0)
    with pytest.raises(ValueError, match=r"clear\.png is L 8x8 with transparency, not grey or RGB; convert it"):
        read_pixels(path)
    (exif := Image.Exif())[0x0112] = 6
    Image.new("L", (8, 8)).save(path := tmp_path / "turned.png", exif=exif)
    with pytest.raises(ValueError, match=r"turned\.png is L 8x8 rotated by EXIF, not grey or RGB; convert it"):
        read_pixels(path)
    Image.new("L", (8, 8)).save(tmp_path / "jpeg.png", format="JPEG")
    with pytest.raises(ValueError, match=r"jpeg\.png cannot be read as a PNG"):
        read_pixels(tmp_path / "jpeg.png", (1, 8, 8))


def test_both_walks_over_a_folder_of_pictures_agree(tmp_path: Path) -> None:
    for name in ("a.png", "b/c.PNG", ".hidden.png", ".cache/d.png", "b/.git/e.png", "elsewhere/f.png"):
        (path := tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path, format="PNG")
    (tmp_path / "in/elsewhere").rename(tmp_path / "out")
    (tmp_path / "in/link.png").symlink_to(tmp_path / "out/f.png")
    (tmp_path / "in/linked").symlink_to(tmp_path / "out")
    (tmp_path / "in/folder.png").mkdir()
    counted = [str(path.relative_to(tmp_path / "in")) for path in png_tree(tmp_path / "in")]
    assert counted == ["a.png", "b/c.PNG"]
    assert Folder(str(tmp_path / "in"), size=8).build().open().count == len(counted)


def test_the_verbs_stand_in_the_help(tmp_path: Path) -> None:
    printed = succeed("sample", "--help", cwd=tmp_path)
    for line in ("eval=  (default samples)", "  ref     ", "  folder  ", "metric=  (default none)", "folder: null"):
        assert line in printed
