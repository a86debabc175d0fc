"""benchmarks/guidance.py: the classifier knows real digits, and a small run writes its table and figure."""

from __future__ import annotations

from pathlib import Path

import guidance
import pytest
import torch

from mlem.family import Family
from mlem.files import read_json
from mlem.level import Level
from mlem.networks import told, unet
from mlem.schedule import NoiseSchedule

SHAPE = (1, 8, 8)


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """Two untrained levels that are told which digit."""
    torch.manual_seed(0)
    schedule, conditions = NoiseSchedule.cosine(), told("unet", 10)
    networks = {size: unet(size, SHAPE, classes=10) for size in ("xs", "s")}
    levels = [Level(size, one, schedule, SHAPE, data="digits", conditions=conditions) for size, one in networks.items()]
    Family(levels).save(tmp_path / "family")
    return tmp_path / "family"


def test_the_classifier_sees_real_digits_and_not_others() -> None:
    pixels, labels = guidance.real_digits()
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    assert guidance.agreement(x, torch.from_numpy(labels)) > 0.99
    assert guidance.agreement(x, torch.from_numpy((labels + 1) % 10)) < 0.01
    assert 0.9 < guidance.held_out_agreement() < 1
    assert guidance.fid(x) < 1e-6 < guidance.fid(x.flip(3))


@pytest.mark.filterwarnings("ignore::mlem.metrics.FewImagesWarning")
def test_a_small_run(family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--samples", "10", "--scales", "2", "--images", "2", "--out", str(tmp_path)]
    guidance.main([str(family), *options, "--figure", str(tmp_path / "g.png")])
    found = read_json(tmp_path / "guidance.json")
    top, plan = found["rows"]
    assert [(row["scale"], row["sampler"]) for row in (top, plan)] == [(2, "level s"), (2, "plan")]
    assert top["calls"] == {"s": 32}  # guidance asks twice in each of 16 steps
    assert top["evaluations"] == pytest.approx(16)
    assert 8 < plan["evaluations"] <= 16.01
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((family / "guided").glob("*/calibration.json"))) == 1  # kept
    assert "scale 2, plan: label seen in" in capsys.readouterr().out
