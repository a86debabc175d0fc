"""Inception: what is missing is said at the start; our path equals torch-fidelity's own calculation."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mlem.files import sha256
from mlem.metrics import FID
from mlem.metrics.inception import ORIGINAL
from tests.commands import environment
from tests.fidelity import COUNT, NAMES
from tests.test_fid import digits

FIDELITY = Path(sys.prefix) / "fidelity"
"""Where `make setup` puts torch-fidelity, beside the environment: it would need a torchvision."""


def test_inception_without_weights_says_what_to_do_at_construction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    monkeypatch.setattr("mlem.metrics.inception.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install mlem-diffusion\[fid\]") as error:
        FID("inception", (3, 32, 32))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    monkeypatch.setattr("mlem.metrics.inception.find_spec", lambda name: True)
    with pytest.raises(ValueError, match=r"needs its weights file at .*elsewhere\.pth; "):
        FID("inception", (3, 32, 32), weights=tmp_path / "elsewhere.pth")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    found = sha256(path)
    with pytest.raises(ValueError, match=f"does not start with 6726825d; .* add metric.sha256={found[:12]}"):
        FID("inception", (3, 32, 32))
    with pytest.raises(ValueError, match=f"has SHA-256 {found[:16]}..., but metric.sha256 is 0123456789; correct"):
        FID("inception", (3, 32, 32), sha256="0123456789")
    with pytest.raises(ValueError, match=f"first 8 or more digits of the file's SHA-256, got '{found[:4]}'"):
        FID("inception", (3, 32, 32), sha256=found[:4])
    with pytest.raises(ValueError, match="is damaged or holds more than tensors; fetch"):
        FID("inception", (3, 32, 32), sha256=found)


@pytest.mark.parametrize("original", [True, False])
def test_inception_gets_three_channels_and_the_original_resize(
    original: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wiring alone, with a stand-in network."""
    seen = {}

    class StandIn(nn.Module):
        def __init__(self, name: str, features_list: list[str], path: str, antialias: bool) -> None:
            super().__init__()
            seen.update(features=features_list, path=path, antialias=antialias)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen["shape"] = tuple(images.shape)
            return images.flatten(1)[:, :64].float().repeat(1, 32)

    weights = tmp_path / "weights.pth"
    torch.save({}, weights)
    found = ORIGINAL if original else "0a" * 32
    monkeypatch.setattr("mlem.metrics.inception.find_spec", lambda name: True)
    monkeypatch.setattr("mlem.metrics.inception.sha256_of", lambda path: found)
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", StandIn)
    monkeypatch.setitem(sys.modules, "torch_fidelity", sys)
    fid = FID("inception", (1, 8, 8), weights, None if original else found[:9].upper())
    fid.update(digits()[:5])
    assert seen == {"features": ["2048"], "path": str(weights), "antialias": False, "shape": (5, 3, 8, 8)}
    assert (fid.name, fid.num_features) == ("fid_inception" if original else "fid_inception-0a0a0a0a", 2048)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fidelity")
    paths = [environment()["PYTHONPATH"]]
    if find_spec("torch_fidelity") is None:
        if not FIDELITY.is_dir():
            pytest.skip(f"torch-fidelity is not here: make setup, or pip install --no-deps --target {FIDELITY} it")
        paths.append(str(FIDELITY))
    done = subprocess.run(
        [sys.executable, "-m", "tests.fidelity"],
        cwd=folder,
        env=environment(PYTHONPATH=":".join(paths)),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("source", ["png", "tensor"])
def test_scores_equal_those_of_torch_fidelity(results: dict[str, Any], source: str) -> None:
    ours = {score["name"]: score["value"] for score in results[source]}
    protocol = f"inception-{results['sha256'][:8]}"
    assert list(ours) == [f"{kind}_{protocol}@{COUNT}" for kind in NAMES]
    for kind, value in results["theirs"].items():
        assert ours[f"{kind}_{protocol}@{COUNT}"] == pytest.approx(value, rel=1e-3), kind
    assert results["theirs"]["fid"] > 0


def test_png_and_tensor_agree_and_the_reference_is_read_once(results: dict[str, Any]) -> None:
    assert results["cached"]
    for one, two in zip(results["png"], results["tensor"], strict=True):
        assert one["value"] == pytest.approx(two["value"], rel=1e-5)


def test_files_that_are_no_inception_are_refused_in_one_line(results: dict[str, Any]) -> None:
    said = results["refusals"]
    assert "does not fit Inception" in said["misfit"]
    assert "\n" not in said["misfit"] + said["payload"]
    assert "holds more than tensors; fetch" in said["payload"]
