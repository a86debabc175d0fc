"""Labels, embeddings and guidance from the command line, on a class-conditional family of real UNets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import save_file
from torch import Tensor

from mlem.cli import main as cli
from mlem.family import Family
from mlem.images import quantise
from mlem.level import Level
from mlem.multilevel import command as multilevel
from mlem.multilevel import pilot
from mlem.outputs import read_png, sample_path
from mlem.sampling import sample
from mlem.schedule import NoiseSchedule
from tests.commands import run_here
from tests.few_pilots import FEW
from tests.test_your_own_family import blocks

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
]
USUAL = ("trainer=cpu", "family=family", "sampler=ddim", "steps=4", "seeds=0-5", "batch_size=4", "metric=none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a family of two class-conditional levels, untrained."""
    levels: list[Level] = []
    for name, channels in (("s", 8), ("m", 16)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(channels)
            network = UNet2DModel(
                sample_size=8,
                in_channels=1,
                out_channels=1,
                block_out_channels=(channels, channels),
                layers_per_block=1,
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
                norm_num_groups=4,
                num_class_embeds=11,
            )
            # as after training: fresh embeddings are small beside the rest
            torch.nn.init.normal_(network.class_embedding.weight, std=3.0)
        conditions = {"class_labels": 10}
        levels.append(Level(name, network, NoiseSchedule.cosine(), (1, 8, 8), data="digits", conditions=conditions))
    path = tmp_path_factory.mktemp("labelled")
    Family(levels).save(path / "family")
    return path


@pytest.fixture
def family(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    """The family, in the current folder."""
    monkeypatch.chdir(folder)
    return Family.load("family")


def made(out: str, *options: str) -> Tensor:
    """The images of `sample.py`, as bytes."""
    run_here("sample", *USUAL, f"out={out}", *options)
    return torch.stack([quantise(read_png(sample_path(Path(out), index))) for index in range(6)])


def images(family: Family, **options: Any) -> Tensor:
    """What they should be."""
    return quantise(sample(family, indices=range(6), steps=4, batch_size=4, **options).x)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line of `python sample.py` before it ends with 2."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *USUAL, *options])
    with pytest.raises(SystemExit) as ended:
        cli.sample()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_level_remembers_what_it_is_told(family: Family) -> None:
    assert [level.conditions for level in family.levels] == [{"class_labels": 10}] * 2


def test_labels_are_taken_in_turn(family: Family) -> None:
    turns = images(family, conditions=lambda i: {"class_labels": torch.tensor([3, 7, 8])[i % 3]})
    assert torch.equal(made("turns", "labels='3,7-8'"), turns)
    every = images(family)
    assert torch.equal(made("every"), every)
    assert not torch.equal(every, turns)


def test_guidance_by_no_class_by_a_level_and_in_an_interval(family: Family) -> None:
    four = images(family.guided(2.0), conditions=lambda i: {"class_labels": torch.full_like(i, 4)})
    assert torch.equal(made("guided", "guidance.scale=2", "labels=4"), four)
    calls = json.loads(Path("guided/ledger.json").read_text())["levels"]["m"]["calls"]
    assert calls == 6 * 4 * 2
    weak = images(family.guided(2.0, weak="s", interval=(0.1, 9.0)))
    assert torch.equal(made("weak", "guidance.scale=2", "guidance.weak=s", "guidance.interval=[0.1,9]"), weak)


def test_the_page_on_training(family: Family) -> None:
    block = (
        blocks("docs/training.md")[0].replace("runs/digits_labels/family", "family").replace("range(64)", "range(6)")
    )
    names: dict[str, Any] = {"Family": Family, "sample": sample}
    exec(compile(block.replace("range(64)", "range(6)"), "docs/training.md", "exec"), names)
    assert names["x"].shape == (6, *family.shape)


def test_embeddings_come_from_a_file_row_by_row(family: Family) -> None:
    rows = torch.tensor([5, 1, 9, 2])
    save_file({"class_labels": rows}, "rows.safetensors")
    found = made("rows", "conditions=rows.safetensors")
    assert torch.equal(found, images(family, conditions=lambda i: {"class_labels": rows[i % 4]}))
    save_file({"m/class_labels": rows}, "rows_of_m.safetensors")
    assert torch.equal(made("rows_of_m", "conditions=rows_of_m.safetensors"), found)


def test_a_guided_family_is_calibrated_beside_the_other(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FEW.items():
        monkeypatch.setattr(pilot, name, value)
    small = ["--images", "2", "--times", "4", "--batch-sizes", "4", "--reference-steps", "16"]
    assert multilevel.main(["calibrate", "family", "--guidance", "2", *small]) == 0
    guided = Family.load("family").guided(2.0)
    assert guided.folder == Path("family/guided") / guided.weights_hash
    assert guided.fitted.calibration is not None
    assert Family.load("family").fitted.calibration is None
    plan = ("sampler=mlem_ddim", "budget=0.7", "cost=flops")
    found = images(guided, plan=guided.plan(budget=0.7, cost="flops"))
    assert torch.equal(made("planned", "guidance.scale=2", *plan), found)


def test_calibrations_and_memorised_plans_take_conditions_of_a_file(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def seen(*args: Any, **options: Any) -> Any:
        given.append(options["conditions"](torch.tensor([0, 1, 5]))["class_labels"].tolist())
        raise ValueError("seen")

    save_file({"class_labels": torch.tensor([5, 1, 9, 2])}, "four.safetensors")
    for verb in ("calibrate", "memorise"):
        monkeypatch.setattr(multilevel, verb, seen)
        assert multilevel.main([verb, "family", "--conditions", "four.safetensors"]) == 2
    assert given == [[5, 1, 1]] * 2


MISTAKES = {
    "labels=1,11": r"labels must be in [0, 10], 10 meaning no class, got 11",
    "labels=x": "labels must be ranges such as 0-63 or 0-9,20",
    "guidance.weak=s": "guidance.weak=s needs a scale: add guidance.scale=2",
    "guidance.scale=2 guidance.weak=m": "guidance: weak=m must be the cheapest level, s",
    "guidance.scale=2 guidance.interval=[3]": "guidance.interval must be a list of two numbers",
    "guidance.scale=2 guidance.interval=[3,1]": "guidance: interval of guidance must be noise-to-signal ratios",
    "conditions=none.safetensors": "conditions=none.safetensors does not exist",
    "conditions=broken.safetensors": "conditions=broken.safetensors is not a whole safetensors file",
    "labels=1 conditions=none.safetensors": "labels= and conditions= exclude each other; use one",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes_get_one_line(
    family: Family, options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.safetensors").write_bytes(b"not this")
    assert MISTAKES[options] in refused(monkeypatch, capsys, "out=refused", *options.split())
    assert not Path("refused").exists()


def test_other_samples_are_not_added_to_a_folder(
    family: Family, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made("owned", "labels=1")
    said = refused(monkeypatch, capsys, "out=owned", "labels=2")
    assert "owned holds samples made with other settings (labels: 1 there, 2 now)" in said
    assert "(guidance: " in refused(monkeypatch, capsys, "out=owned", "labels=1", "guidance.scale=2")
