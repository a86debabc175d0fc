"""Latents: encoding a data set once, training on it, decoding samples; and one line for every mistake."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from mlem.comparison.coupled import Comparison
from mlem.comparison.entry import Entry
from mlem.data import Shards, held_out_batches, prepare, train_loader
from mlem.data.command import main
from mlem.data.shards.loading import BatchSource
from mlem.decoder import Decoder
from mlem.family import Family
from mlem.images import quantise
from mlem.metrics import ssim
from mlem.noise import NoiseStream
from mlem.outputs import read_pixels, sample_path
from mlem.sampling import sample
from tests.commands import PLAIN, TINY, run_here, run_in
from tests.decoders import save_decoder
from tests.test_your_own_family import blocks


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 8x8 digits in data/digits, a decoder in vae, and their latents in data/latents."""
    home = tmp_path_factory.mktemp("latents")
    save_decoder(home / "vae", shift_factor=0.25)
    prepare("digits", home / "data/digits", progress=False)
    assert main(words(home)) == 0
    return home


def words(home: Path, out: str = "data/latents", **options: str) -> list[str]:
    """The command that makes the latents."""
    given = {"source": home / "data/digits", "decoder": home / "vae", "out": home / out, "shard-size": 600} | options
    return ["latents", *(str(word) for name, value in given.items() for word in (f"--{name}", value))]


def network(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder).eval()


# --- encoding ---


@torch.no_grad()
def test_shards_hold_mean_and_deviation_in_float16(home: Path) -> None:
    digits, latents = Shards.open(home / "data/digits"), Shards.open(home / "data/latents")
    assert (len(latents), latents.shape, latents.classes) == (1797, (4, 4, 4), digits.classes)
    expected = network(home / "vae").encode(digits.images([5, 1790])).latent_dist
    for row, i in enumerate((5, 1790)):
        stored = latents.read(i)
        assert (stored.shape, stored.dtype) == ((2, 4, 4, 4), torch.float16)
        torch.testing.assert_close(stored[0].float(), expected.mean[row], rtol=2**-11, atol=1e-5)
        torch.testing.assert_close(stored[1].float(), expected.std[row], rtol=2**-11, atol=1e-5)
    assert torch.equal(latents.labels(range(1797)), digits.labels(range(1797)))


def test_the_manifest_says_where_they_come_from(home: Path) -> None:
    about = json.loads((home / "data/latents/manifest.json").read_text())
    assert about["latents"] == {"scaling_factor": 0.18215, "shift_factor": 0.25}
    assert about["info"]["data"] == "digits"
    assert about["info"]["decoder"] == Decoder(home / "vae").fingerprint
    assert "latents" not in json.loads((home / "data/digits/manifest.json").read_text())
    assert Decoder(home / "data/latents/decoder").fingerprint == Decoder(home / "vae").fingerprint


def test_interrupted_and_run_again_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlem.data.datasets import latents

    prepare("dead_leaves", tmp_path / "leaves", progress=False, size=8, count=90)
    given = {"source": str(tmp_path / "leaves"), "decoder": str(save_decoder(tmp_path / "vae", 3)), "shard-size": "40"}
    assert main(words(tmp_path, "whole", **given)) == 0
    encode = latents._latents

    def interrupted(*arguments: Any) -> np.ndarray:
        if arguments[2] >= 40:  # in the second shard
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(latents, "_latents", interrupted)
        assert main(words(tmp_path, "again", **given)) == 130
    kept = tmp_path / "again/shard-000000.tar"
    assert [*(tmp_path / "again").glob("*.tar")] == [kept]
    written = kept.stat().st_mtime_ns
    assert main(words(tmp_path, "again", **given)) == 0
    assert kept.stat().st_mtime_ns == written
    for path in (tmp_path / "whole").glob("[!.]*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


# --- drawing ---


def test_training_draws_from_them_by_seed_and_position(home: Path) -> None:
    shards = Shards.open(home / "data/latents")
    one = BatchSource(shards, np.arange(8), batch_size=8, seed=3)
    first, second = one.batch(0), one.batch(1)  # two passes
    mean, deviation = torch.stack([shards.read(int(i)) for i in first["index"]]).float().unbind(1)
    noise = NoiseStream(3, "latents").normal(first["position"], [0], (4, 4, 4), torch.float32)[0]
    torch.testing.assert_close(first["image"], (mean + deviation * noise - 0.25) * 0.18215)
    order = {int(i): row for row, i in enumerate(second["index"])}
    again = second["image"][[order[int(i)] for i in first["index"]]]
    assert not torch.isclose(first["image"], again).any(1).all()
    assert torch.equal(next(iter(train_loader(one)))["image"], first["image"])
    other = BatchSource(shards, np.arange(8), batch_size=8, seed=4).batch(0)["image"]
    assert not torch.equal(other, first["image"])
    halves = [BatchSource(shards, np.arange(8), batch_size=8, seed=3, rank=r, world_size=2).batch(0) for r in (0, 1)]
    assert torch.equal(torch.cat([half["image"] for half in halves]), first["image"])


def test_held_out_draws_stay(home: Path) -> None:
    shards = Shards.open(home / "data/latents")
    (whole,), parts = held_out_batches(shards, np.arange(6), 6), [*held_out_batches(shards, np.arange(6), 2)]
    assert torch.equal(whole["image"], torch.cat([part["image"] for part in parts]))


# --- the decoder ---


@torch.no_grad()
def test_decoding_is_that_of_diffusers_for_any_batch_size(home: Path) -> None:
    decoder, x = Decoder(home / "vae"), torch.randn(19, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = network(home / "vae").decode(x / 0.18215 + 0.25).sample
    found = decoder.decode(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.cat([decoder.decode(one) for one in x.split(1)]), found, rtol=1e-5, atol=1e-5)
    assert not found.requires_grad
    assert decoder.decode(x[:0]).shape == (0, 1, 8, 8)


def test_a_decoder_works_in_the_dtype_of_its_weights(home: Path, tmp_path: Path) -> None:
    network(home / "vae").to(torch.bfloat16).save_pretrained(tmp_path)
    decoder = Decoder(tmp_path)
    assert decoder.network.dtype == torch.bfloat16
    assert decoder.decode(torch.zeros(1, 4, 4, 4)).dtype == torch.float32
    network(home / "vae").to(torch.float16).save_pretrained(tmp_path)  # its config says force_upcast
    assert Decoder(tmp_path).network.dtype == torch.float32


# --- training and sampling ---


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """`home` with a family of two levels in runs/latents/family, trained on the latents with classes."""
    options = [*TINY[1:], "data=latents", "model=family", "model.levels=[xs,s]", "model.conditional=true"]
    options += [
        "logger=jsonl",
        "metric.reference=16",
        "training.steps=2",
        "evaluation.samplers=[{solver:ddpm,steps:[2]}]",
    ]
    run_in(home, lambda: run_here("train", *options))
    return home


def test_a_trained_family_carries_its_decoder(trained: Path) -> None:
    family = Family.load(trained / "runs/latents/family")
    assert family.decoder is not None
    assert family.decoder.fingerprint == Decoder(trained / "vae").fingerprint
    assert family.decoder.folder == trained / "runs/latents/family/decoder"
    assert all(level.latents == family.decoder.latents for level in family.levels)
    assert (family.shape, family.levels[0].conditions) == ((4, 4, 4), {"class_labels": 10})
    assert read_pixels(next((trained / "runs/latents/grids").glob("*.png"))).shape[1] > 16  # pictures were drawn
    (row, *_) = json.loads((trained / "runs/latents/evaluation.json").read_text())["rows"]
    assert any(name.startswith("fid_") for name in row)
    assert 0 < row["ssim"] < 1


def test_the_page_on_training(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    names: dict[str, Any] = {"Family": Family, "sample": sample}
    exec(compile(blocks("docs/training.md")[1].replace("range(64)", "range(2)"), "docs/training.md", "exec"), names)
    assert (names["x"].shape, names["pictures"].shape) == ((2, 4, 4, 4), (2, 1, 8, 8))


def test_similarity_is_of_what_latents_show(trained: Path, tmp_path: Path) -> None:
    family = Family.load(trained / "runs/latents/family")
    seen, entry = [], Entry("ddim", (2,), levels=("xs",))
    for name in ("with", "without"):
        comparison = Comparison(family, range(2), tmp_path / name, reference_steps=3)
        (run,) = comparison.runs(entry)
        comparison.measure([run])
        seen.append(comparison.rows[0])
        if name == "with":
            pictures = family.pictures(sample(family, solver="ddim", steps=2, level="xs", indices=range(2)).x)
            truth = family.pictures(comparison.truth(run.solver.reference))
            assert seen[0].image_ssim == pytest.approx(ssim(pictures, truth).tolist(), rel=1e-4)
        family.decoder = None
    assert seen[0].mse == seen[1].mse > 0
    assert math.isnan(seen[1].psnr)
    assert seen[1].image_psnr == ()


def sampled(home: Path, *options: str) -> Path:
    out = home / "out"
    shutil.rmtree(out, ignore_errors=True)
    common = ["trainer=cpu", "sampler=ddim", "steps=3", "seeds=0-4", "batch_size=4", f"out={out}"]
    run_in(home, lambda: run_here("sample", *common, *options))
    return out


def test_sample_py_writes_decoded_pictures(trained: Path) -> None:
    out = sampled(trained, "family=runs/latents/family", "data=digits", "metric=fid_random256", "metric.reference=16")
    family = Family.load(trained / "runs/latents/family")
    parts = [sample(family.level(), solver="ddim", steps=3, indices=part).x for part in (range(4), range(4, 5))]
    expected = quantise(torch.cat([network(trained / "vae").decode(x / 0.18215 + 0.25).sample for x in parts]))
    assert expected.shape == (5, 1, 8, 8)
    found = torch.stack([read_pixels(sample_path(out, i)) for i in range(5)])
    assert torch.equal(found, expected)
    assert len(found.unique()) > 2
    assert json.loads((out / "settings.json").read_text())["decoder"] == Decoder(trained / "vae").fingerprint
    assert json.loads((out / "metrics.json").read_text())["data"] == "digits"


def test_a_level_by_itself_has_the_decoder_of_its_data(trained: Path) -> None:
    out = sampled(trained, "model=unet_s", "data=latents", "root=runs/latents")
    both = sampled(trained, "family=runs/latents/family", "data=latents")
    assert read_pixels(sample_path(out, 0)).shape == (1, 8, 8)
    assert torch.equal(read_pixels(sample_path(out, 0)), read_pixels(sample_path(both, 0)))


def test_a_family_of_a_pipeline_finds_its_decoder(trained: Path, tmp_path: Path) -> None:
    family = Family.load(trained / "runs/latents/family")
    assert family.decoder is not None
    family.guided(2.0).pictures(torch.zeros(1, 4, 4, 4))
    shutil.copytree(trained / "vae", tmp_path / "pipe/vae")
    found = Decoder.of_pipeline(tmp_path / "pipe")
    assert found is not None
    assert found.fingerprint == family.decoder.fingerprint
    assert Decoder.of_pipeline(tmp_path) is None
    family.save(tmp_path / "copy")
    family.decoder = None
    family.save(tmp_path / "copy")
    assert not (tmp_path / "copy/decoder").exists()
    assert Family.load(tmp_path / "copy").decoder is None


# --- mistakes ---


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _pickle(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")


def _cut(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        r"vae has no config\.json; name the folder of an A",
    ),
    "another class": (
        lambda folder: _edit(folder / "config.json", _class_name="VQModel"),
        r"vae holds a VQModel; only",
    ),
    "a pickle": (_pickle, r"vae holds diffusion_pytorch_model\.bin, a pickle, which mlem does not read"),
    "cut short": (_cut, r"is not a safetensors file, or it was cut short"),
    "other weights": (
        lambda folder: _edit(folder / "config.json", layers_per_block=2),
        r"weights do not fit its config",
    ),
    "no number": (lambda folder: _edit(folder / "config.json", scaling_factor="x"), r"config\.json is damaged"),
    "own scales": (lambda folder: _edit(folder / "config.json", latents_mean=[0.0] * 4), r"latents_mean"),
    "channels": (
        lambda folder: save_decoder(folder, 3),
        r"vae encodes images with 3 channels, but these are \(1, 8, 8\)",
    ),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_decoder_is_refused(
    home: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "vae", tmp_path / "vae")
    damage, message = DAMAGED[fault]
    damage(tmp_path / "vae")
    capsys.readouterr()
    assert main(words(home, str(tmp_path / "out"), decoder=str(tmp_path / "vae"))) == 2
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if line.startswith("error: ")] == [said.splitlines()[-1]]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)


def test_pictures_that_cannot_be_halved_are_refused(home: Path, tmp_path: Path) -> None:
    prepare("dead_leaves", tmp_path / "leaves", progress=False, size=7, count=2)
    decoder = save_decoder(tmp_path / "vae", 3)
    with pytest.raises(ValueError, match=r"vae needs images whose sides are multiples of 2, got 7x7; prepare the data"):
        prepare("latents", tmp_path / "out", source=tmp_path / "leaves", decoder=decoder)
    with pytest.raises(ValueError, match=r"latents already holds latents; name the image data set"):
        prepare("latents", tmp_path / "out", source=home / "data/latents", decoder=save_decoder(tmp_path / "four", 4))
    with pytest.raises(ValueError, match=r"^decoder must be given: the folder of the AutoencoderKL"):
        prepare("latents", tmp_path / "out", source=tmp_path / "leaves")


PLAIN_LATENTS = (*PLAIN, "data=latents", "training.steps=1", "root=runs/refused")


def test_training_refuses_what_does_not_fit(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_decoder(home / "other", seed=1)
    with pytest.raises(ValueError, match=r"data/latents holds other data: decoder is '\w{16}', requested '\w{16}'"):
        run_in(home, lambda: run_here("train", *PLAIN_LATENTS, f"data.options.decoder={other}"))
    with pytest.raises(
        ValueError, match=r"^training\.flip=true: latents of mirrored pictures are not mirrored latents"
    ):
        run_in(home, lambda: run_here("train", *PLAIN_LATENTS, "training.flip=true"))
    with pytest.raises(ValueError, match=r"prepare it: python -m mlem\.data latents --source FOLDER --decoder FOLDER"):
        run_in(home, lambda: run_here("train", *PLAIN_LATENTS, "data.folder=nowhere"))


def test_a_decoder_that_was_changed_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs/latents/family", tmp_path / "family")
    shutil.copytree(trained / "data/latents", tmp_path / "data")
    save_decoder(tmp_path / "family/decoder", seed=1, shift_factor=0.25)
    family = Family.load(tmp_path / "family")
    with pytest.raises(ValueError, match=r"family/decoder has hash \w{16}, expected \w{16}; copy the folder again"):
        family.pictures(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match=r"^the family has decoder \w{16} and data=latents was encoded by \w{16}"):
        sampled(trained, f"family={tmp_path / 'family'}", "data=latents")
    shutil.rmtree(tmp_path / "family/decoder")
    with pytest.raises(FileNotFoundError, match=r"family/decoder has no config\.json"):
        Family.load(tmp_path / "family")


def test_latents_without_a_decoder_are_not_drawn(trained: Path, tmp_path: Path) -> None:
    family = Family.load(trained / "runs/latents/family")
    family.decoder = None
    family.save(tmp_path / "family")
    with pytest.raises(ValueError, match=r"^the family makes latents and has no decoder: save it with one"):
        sampled(trained, f"family={tmp_path / 'family'}", "data=digits")
    with pytest.raises(ValueError, match=r"^level s makes latents and has no decoder: name its data set of latents"):
        sampled(trained, "model=unet_s", "data=digits", "root=runs/latents")
    with pytest.raises(ValueError, match=r"^the family makes latents scaled by .* and has no decoder: set family"):
        family.pictures(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match=r"vae decodes latents with 4 channels, but these are \(3, 4, 4\)"):
        Decoder(trained / "vae").decode(torch.zeros(1, 3, 4, 4))


def test_an_array_of_another_kind_is_a_damaged_shard(home: Path) -> None:
    from mlem.data.shards.arrays import array_bytes, array_of

    good = np.arange(8, dtype=np.float16).reshape(2, 1, 2, 2)
    np.testing.assert_array_equal(array_of(array_bytes(good), good.shape), good)
    with pytest.raises(ValueError, match=r"^is float16 \(2, 1, 2, 2\), the manifest says float16 \(2, 1, 4, 2\)$"):
        array_of(array_bytes(good), (2, 1, 4, 2))
    with pytest.raises(ValueError, match=r"^holds 15 bytes of numbers, expected 16$"):
        array_of(array_bytes(good)[:-1], good.shape)
    with pytest.raises(ValueError, match=r"^holds NaN or infinity$"):
        array_of(array_bytes(good * np.float16(np.nan)), good.shape)
