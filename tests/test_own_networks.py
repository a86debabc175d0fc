"""Modules of one's own as levels: any shape of a sample, saved and loaded, calibrated and sampled."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_1d import UNet1DModel
from torch import Tensor, nn

from mlem.family import Family
from mlem.level import Level
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.fitted import Fitted
from mlem.networks import CLASSES, build, seconds_per_image
from mlem.sampling import sample
from mlem.schedule import NoiseSchedule
from tests.problems import level as unet_level

COSINE = NoiseSchedule.cosine()


class Perceptron(nn.Module):
    """Two linear layers on the last axis of x, which see the time too."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(features + 1, width), nn.Linear(width, features)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = (timestep / 1000).to(x.dtype).view(-1, *[1] * (x.dim() - 1)).expand(*x.shape[:-1], 1)
        return self.last(torch.nn.functional.silu(self.first(torch.cat([x, time], -1))))


class Volumes(nn.Module):
    """Convolutions in three dimensions."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv3d(channels, width, 3, padding=1), nn.Conv3d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + timestep.view(-1, 1, 1, 1, 1).to(x.dtype) / 1000))


class Shrinking(nn.Module):
    """No matrix product, which torch could count."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.rate * x


class Tied(Perceptron):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.twin = self.last


NETWORKS: dict[str, tuple[tuple[int, ...], Callable[[int], nn.Module]]] = {
    "vector": ((5,), lambda width: Perceptron(5, width)),
    "tokens": ((6, 3), lambda width: Perceptron(3, width)),
    "image": ((2, 4, 4), lambda width: Perceptron(4, width)),
    "volume": ((2, 3, 4, 4), lambda width: Volumes(2, width)),
}


def seeded(make: Callable[[int], nn.Module], width: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        return make(width)


def pair(kind: str) -> Family:
    shape, make = NETWORKS[kind]
    return Family([Level(name, seeded(make, width), COSINE, shape) for name, width in (("s", 4), ("l", 16))])


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_level_of_any_shape_is_counted_timed_saved_and_sampled(kind: str, tmp_path: Path) -> None:
    shape, make = NETWORKS[kind]
    level = pair(kind).level()
    assert level.flops > pair(kind).level("s").flops > 0
    assert seconds_per_image(level.network, shape, 2) > 0
    level.save(tmp_path)
    again = Level.load(tmp_path, network=make(16))
    assert (again.shape, again.flops) == (shape, level.flops)
    before, after = (sample(one, steps=3, indices=range(3)).x for one in (level, again))
    assert before.shape == (3, *shape)
    assert torch.equal(before, after)


@pytest.mark.parametrize(("kind", "solver"), [("tokens", "ddim"), ("tokens", "ddpm"), ("volume", "dpm_solver_pp")])
def test_a_family_of_own_networks_is_calibrated_and_sampled_with_hindsight(
    kind: str, solver: str, tmp_path: Path
) -> None:
    shape, make = NETWORKS[kind]
    family = pair(kind)
    family.save(tmp_path)
    again = Family.load(tmp_path, networks={"s": make(4), "l": make(16)})
    assert again.weights_hash == family.weights_hash
    calibration = calibrate(again, images=4, times=6, batch_sizes=(4,))
    again.fitted = Fitted(calibration)
    plan = again.plan(budget=0.5, estimator="hindsight", cost="flops")
    result = sample(again, solver=solver, steps=8, indices=range(5), plan=plan)
    assert result.x.shape == (5, *shape)
    calls = {name: cost.calls for name, cost in result.ledger.levels.items()}
    assert 0 < calls["l"] < 8 * 5
    two = sample(again, solver=solver, steps=8, indices=range(2), plan=plan).x
    torch.testing.assert_close(result.x[:2], two, rtol=0, atol=1e-5)  # sums of a batch of two are ordered otherwise


def test_without_network_one_line_says_what_to_pass(tmp_path: Path) -> None:
    pair("tokens").save(tmp_path)
    says = rf"^{tmp_path}/level_s holds a network of class '{__name__}.Perceptron', but only UNet2DModel, .* are built "
    with pytest.raises(
        ValueError, match=says + r"from a file; build it and pass it: Level.load\('.*level_s', network=...\)$"
    ):
        Family.load(tmp_path)
    with pytest.raises(ValueError, match=r"^networks= names 'xl'; the levels are s, l$"):
        Family.load(tmp_path, networks={"s": Perceptron(3, 4), "l": Perceptron(3, 16), "xl": Perceptron(3, 64)})


def test_another_network_is_refused(tmp_path: Path) -> None:
    pair("tokens").level().save(tmp_path)
    with pytest.raises(ValueError, match="does not fit network= ") as caught:
        Level.load(tmp_path, network=Perceptron(3, 4))
    assert "3 keys differ: first.bias ((16,) in the file, (4,) in the network); " in str(caught.value)
    assert str(caught.value).endswith(f"pass a network like the saved one, a '{__name__}.Perceptron'")


def test_a_name_in_a_file_builds_and_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlem_hostile.py").write_text("class Network: pass")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "level"
    unet_level().save(folder)
    for name in ("mlem_hostile.Network", "UNet1DModel", "os.system", "../UNet2DModel", None, ["UNet2DModel"]):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"_class_name": name}))
        with pytest.raises(ValueError, match=r"but only UNet2DModel, .* are built from a file"):
            Level.load(folder)
    assert "mlem_hostile" not in sys.modules


def test_a_class_that_only_shares_the_name_is_not_taken_for_it(tmp_path: Path) -> None:
    assert "UNet2DModel" in CLASSES
    other = type("UNet2DModel", (Perceptron,), {"__module__": "elsewhere"})(3, 4)
    Level("s", other, COSINE, (6, 3)).save(tmp_path)
    with pytest.raises(ValueError, match=r"of class 'elsewhere\.UNet2DModel'"):
        Level.load(tmp_path)


def test_a_diffusers_model_off_the_list_is_saved_as_diffusers_does(tmp_path: Path) -> None:
    blocks = {"down_block_types": ("DownBlock1DNoSkip",), "up_block_types": ("UpBlock1DNoSkip",)}
    network = UNet1DModel(
        sample_size=16, in_channels=2, out_channels=2, extra_in_channels=64, block_out_channels=(32,), **blocks
    )
    level = Level("wave", network.eval(), COSINE, (2, 16))
    level.save(tmp_path)
    theirs = UNet1DModel.from_pretrained(tmp_path, use_safetensors=True)
    ours = Level.load(tmp_path, network=UNet1DModel.from_config(network.config))
    x, timestep = torch.ones(2, 2, 16), torch.tensor([3.0, 400.0])
    with torch.no_grad():
        assert torch.equal(theirs(x, timestep).sample, ours.network(x, timestep).sample)


def test_flops_that_torch_cannot_count_are_asked_for(tmp_path: Path) -> None:
    level = Level("tiny", Shrinking(), COSINE, (4,))
    with pytest.raises(
        ValueError, match=r"^torch counts no FLOPs in level tiny \(Shrinking\); give .* Level\(..., flops=\)$"
    ):
        level.save(tmp_path)
    assert not list(tmp_path.iterdir())
    Level("tiny", Shrinking(), COSINE, (4,), flops=7).save(tmp_path)
    assert Level.load(tmp_path, network=Shrinking(0.1)).flops == 7
    with pytest.raises(ValueError, match=r"^flops must be >= 1, got 0$"):
        Level("tiny", Shrinking(), COSINE, (4,), flops=0)


def test_shared_weights_are_saved_and_stay_shared(tmp_path: Path) -> None:
    network = Tied()
    Level("s", network, COSINE, (3,)).save(tmp_path)
    again = Level.load(tmp_path, network=Tied()).network
    assert torch.equal(again.twin.weight, network.last.weight)
    assert again.twin.weight is again.last.weight


def test_bfloat16_weights_are_saved_hashed_and_sampled(tmp_path: Path) -> None:
    network = seeded(NETWORKS["tokens"][1], 4).bfloat16()
    family = Family([Level("s", network, COSINE, (6, 3))])
    family.save(tmp_path)
    again = Family.load(tmp_path, networks={"s": Perceptron(3, 4).bfloat16()})
    assert again.weights_hash == family.weights_hash
    assert torch.equal(*(sample(one, steps=2, indices=[0]).x for one in (family, again)))


@pytest.mark.parametrize("shape", [(), (0, 3), (2.5,), (-1,)])
def test_a_shape_must_be_whole_numbers(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^shape must be one or more whole numbers >= 1, got \["):
        Level("s", Perceptron(3, 4), COSINE, shape)


def test_networks_are_built_by_name() -> None:
    network = build("unet", "xs", (1, 8, 8), dropout=0.25)
    assert type(network).__name__ in CLASSES
    with pytest.raises(ValueError, match=r"^network must be one of unet, dit, got 'unt'; did you mean unet\?$"):
        build("unt", "xs", (1, 8, 8))
    with pytest.raises(ValueError, match=r"^unet has no option 'drop'; its options are dropout, attention, classes$"):
        build("unet", "xs", (1, 8, 8), drop=0.1)
