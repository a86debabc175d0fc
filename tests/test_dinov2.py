"""DINOv2: pixels and positions of the published features, names, the cache, and what is said of unusable weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, Dinov2Config, Dinov2Model
from transformers.utils import logging

from mlem.files import sha256
from mlem.images import quantise
from mlem.metrics import FID, FewImagesWarning
from mlem.metrics.dinov2 import _resampled
from mlem.outputs import write_png
from tests.commands import run_here, run_in
from tests.test_fid import digits, noise

pytestmark = pytest.mark.filterwarnings("ignore::mlem.metrics.FewImagesWarning")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 with random weights; its positions are those of 70 x 70 pixels, 5 x 5 patches."""
    folder = tmp_path_factory.mktemp("dinov2") / "tiny"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1, "patch_size": 28}
    logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Dinov2Model(Dinov2Config(**sizes, image_size=140))
        for weight in network.parameters():  # transformers begins with features that are nearly one another
            weight.data.normal_(std=0.3)
        network.save_pretrained(folder)
    logging.enable_progress_bar()
    return folder


def features(fid: FID, images: Tensor) -> Tensor:
    with torch.no_grad():
        return fid.network(images)


def test_features_are_class_tokens_of_pillows_pixels(weights: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fid = FID("dinov2", (3, 20, 28), weights)
    assert capfd.readouterr() == ("", "")  # no progress bars
    assert logging.is_progress_bar_enabled()
    images = torch.randint(0, 256, (3, 3, 20, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = []
    for image in images:
        one = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
        pixels.append((np.asarray(one) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    network = Dinov2Model.from_pretrained(weights, local_files_only=True).eval()
    network.embeddings.position_embeddings = fid.network.network.embeddings.position_embeddings
    with torch.no_grad():
        expected = network(torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2).float()).last_hidden_state[:, 0]
    found = features(fid, images)
    assert (tuple(found.shape), fid.num_features) == ((3, 16), 16)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.std(0).max() > 0.01  # they are not all the same
    torch.testing.assert_close(features(fid, images.repeat(11, 1, 1, 1))[-3:], expected, rtol=1e-5, atol=1e-5)


def test_positions_are_resampled_as_in_the_original_network() -> None:
    """Patch i of 8 is at (i + 0.5) * 5 / 8.1 - 0.5 of the own 5; Keys' cubic kernel with a = -0.75."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x, a = abs(x), -0.75
        near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
        return np.where(x <= 1, near, np.where(x < 2, far, 0))

    place, own = (np.arange(8) + 0.5) * 5 / 8.1 - 0.5, np.arange(-3, 8)  # the edges go on outside
    matrix = np.zeros((8, 5))
    np.add.at(matrix.T, own.clip(0, 4), kernel(place - own[:, None]))
    grid = torch.rand(5, 5, 2, generator=torch.Generator().manual_seed(0))
    found = _resampled(torch.cat([torch.full((1, 1, 2), 7.0), grid.flatten(0, 1)[None]], 1), 8)
    assert (tuple(found.shape), found[0, 0].tolist()) == ((1, 65, 2), [7.0, 7.0])
    expected = np.einsum("ik,jl,kld->ijd", matrix, matrix, grid.numpy())
    np.testing.assert_allclose(found[0, 1:].unflatten(0, (8, 8)), expected, atol=1e-6)
    published = torch.zeros(1, 1 + 8 * 8, 2)
    assert _resampled(published, 8) is published


def test_scores_are_named_after_size_weights_and_count(weights: Path) -> None:
    digest = sha256(weights / "model.safetensors")[:8]
    fid = FID("dinov2", (1, 8, 8), weights, digest.upper())
    fid.update_real(digits()[:20])
    fid.update(digits()[:20])
    equal = fid.compute()
    assert (fid.name, equal.name) == (f"fd_dinov2-16-{digest}", f"fd_dinov2-16-{digest}@20")
    assert abs(equal.value) < 1e-6
    fid.reset()
    fid.update(noise(20))
    assert fid.compute().value > 1e-3
    colour = FID("dinov2", (3, 8, 8), weights)  # grey is the colour of three equal channels
    grey = torch.randint(0, 256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(features(colour, grey.repeat(1, 3, 1, 1)), features(fid, grey.repeat(1, 3, 1, 1)))


def test_folders_are_scored_against_a_cached_reference(weights: Path, tmp_path: Path) -> None:
    for index, pixels in enumerate(quantise(torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)))):
        write_png(tmp_path / "images" / f"{index}.png", pixels)
    options = ["data=dead_leaves", "data.options.size=16", "data.options.count=30", "trainer=cpu", "metric.kid=true"]
    options += ["metric=fd_dinov2", f"metric.weights={weights}", "metric.reference=24"]
    run_in(tmp_path, lambda: run_here("sample", "eval=folder", "folder=images", "out=scores", *options))
    (cached,) = tmp_path.glob("data/*/reference/*")
    name = f"dinov2-16-{sha256(weights / 'model.safetensors')[:8]}"
    assert cached.name.startswith(f"{name}@24_")
    scores = json.loads((tmp_path / "scores/metrics.json").read_text())["scores"]
    assert [score["name"] for score in scores] == [f"fd_{name}@12", f"kid_{name}@12"]
    printed = run_in(tmp_path, lambda: run_here("sample", "eval=ref", *options))
    assert f"reference statistics already exist ({name}, 24 images of dead_leaves" in printed


def _edit(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def _save(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "metric.weights=own has no config.json: name the"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "metric.weights=own has no model.safetens"),
    "another class": (lambda folder: CLIPTextConfig().save_pretrained(folder), "own holds a clip_text_model, not a"),
    "odd patches": (lambda folder: _edit(folder, patch_size=15), "has patch_size 15 and num_channels 3: it must take"),
    "cut short": (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 9), "own is damaged (.*); copy"),
    "wider": (lambda folder: _edit(folder, hidden_size=32), "own is damaged (.*); copy the folder again"),
    "missing": (lambda folder: _save(folder, lambda tensors: tensors.pop("layernorm.bias")), "1 weights do not fit"),
    "NaN": (lambda folder: _save(folder, lambda tensors: tensors["layernorm.bias"].fill_(torch.nan)), "hold NaN"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_unusable_weights_are_one_line(
    mistake: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, says = MISTAKES[mistake]
    shutil.copytree(weights, tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    spoil(Path("own"))
    with pytest.raises(ValueError, match=says.replace("(", r"\(").replace(")", r"\)")) as error:
        FID("dinov2", (1, 8, 8), "own")
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_what_is_not_there_is_said_with_the_remedy(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^metric=fd_dinov2 needs the folder .*: add metric\.weights=FOLDER$"):
        FID("dinov2", (1, 8, 8))
    with pytest.raises(ValueError, match=r"metric\.sha256 is 0123456789; correct one of them"):
        FID("dinov2", (1, 8, 8), weights, "0123456789")
    with pytest.raises(ValueError, match=r"dinov2 takes images of 1 or 3 channels, got image_shape \(2, 8, 8\)"):
        FID("dinov2", (2, 8, 8), weights)
    monkeypatch.setattr("mlem.metrics.dinov2.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs transformers: pip install mlem-diffusion\[pipelines\]$"):
        FID("dinov2", (1, 8, 8), weights)


def test_few_images_warn(weights: Path) -> None:
    fid = FID("dinov2", (1, 8, 8), weights)
    fid.update_real(digits()[:3])
    fid.update(digits()[:3])
    with pytest.warns(FewImagesWarning, match="3 generated and 3 real images for 16 features"):
        fid.compute()
