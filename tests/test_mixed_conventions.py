"""Families whose levels have conventions of their own: each is asked in its own, at the same noise level."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mlem.denoiser import NetworkDenoiser
from mlem.family import Family
from mlem.level import Level
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.plan import Plan
from mlem.sampling import sample
from mlem.schedule import NoiseSchedule
from tests.labelled import CLASSES, PATHS, labelled_family, labels
from tests.problems import level


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mixed(small: str, large: str) -> Family:
    return Family([labelled_family(path=small).level("1"), labelled_family(path=large).level("2")])


PAIRS = [(small, large) for small in PATHS for large in PATHS if small != large]


@pytest.mark.parametrize(("small", "large"), PAIRS)
def test_a_small_level_of_another_convention_says_the_same(small: str, large: str) -> None:
    """As a level of the large one's convention does, from pure noise to the data."""
    schedule, alike = PATHS[large][0], labelled_family(path=large).level("1")
    t = torch.tensor([0.002, 0.1, 0.4, 0.7, 0.95])
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    told = {"class_labels": torch.arange(5) % CLASSES}
    family = mixed(small, large)
    found = family.denoisers_for(torch.arange(5), labels([0, 1, 2]))[0](x, t)
    # time reaches networks in float32
    torch.testing.assert_close(found, alike.denoiser.given(told)(x, t), rtol=1e-4, atol=1e-5)
    assert family.schedule is schedule


@pytest.mark.parametrize(("small", "large"), [("vp", "flow"), ("edm", "vp"), ("flow", "edm")])
def test_plans_and_calibration_sum_over_conventions(small: str, large: str) -> None:
    family, alike = mixed(small, large), labelled_family(path=large)
    plan = Plan.draw(torch.tensor([[1.0, 0.5]]).expand(12, 2), coins="systematic", levels=("1", "2"))
    found, truth = (
        sample(one, indices=range(4), steps=12, grid="log_snr", plan=plan, conditions=labels([0, 2])).x
        for one in (family, alike)
    )
    torch.testing.assert_close(found, truth, rtol=2e-3, atol=2e-3)
    family.fitted = Fitted(calibrate(family, images=4, times=6, batch_sizes=[4]))
    own = family.fitted.calibration_for(family).differences
    other = calibrate(alike, images=4, times=6, batch_sizes=[4]).differences
    torch.testing.assert_close(own, other, rtol=0.05, atol=1e-6)
    spec = family.plan(budget=0.6, cost="flops")
    assert sample(family, indices=range(2), steps=8, plan=spec).x.isfinite().all()


def test_the_small_level_alone_is_sampled_at_the_family_s_times() -> None:
    family = mixed("vp", "flow")
    found = sample(family, indices=range(3), steps=12, level="1", grid="flow", conditions=labels([0])).x
    alike = sample(
        labelled_family(path="flow").level("1"), indices=range(3), steps=12, grid="flow", conditions=labels([0])
    ).x
    torch.testing.assert_close(found, alike, rtol=1e-3, atol=1e-3)


def test_a_level_that_ends_below_is_asked_at_its_end() -> None:
    seen: list[torch.Tensor] = []
    denoiser = NetworkDenoiser(
        lambda x, time: seen.append(time) or x, NoiseSchedule.flow(), "v", own=NoiseSchedule.cosine()
    )
    denoiser(torch.zeros(2, 1), torch.tensor([1.0, 0.9999]))
    assert seen[0].tolist() == [999.0, 999.0]


def test_other_timesteps_and_predictions_save_load_and_count_in_the_hash(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    short = NoiseSchedule.from_diffusers({"num_train_timesteps": 250, "beta_schedule": "squaredcos_cap_v2"})
    family = Family([level("xs", schedule=short, prediction="eps"), level("s", prediction="v")])
    family.save(tmp_path / "family")
    loaded = Family.load(tmp_path / "family")
    assert [str(one.prediction) for one in loaded.levels] == ["eps", "v"]
    assert [one.schedule.num_timesteps for one in loaded.levels] == [250, 1000]
    plan = Plan.draw(torch.ones(4, 2, dtype=torch.float64), levels=("xs", "s"))
    assert torch.equal(*(sample(one, indices=[0], steps=4, plan=plan).x for one in (family, loaded)))
    small, large = family.levels
    other = Family([Level("xs", small.network, small.schedule, small.shape, "x0", flops=small.flops), large])
    assert loaded.weights_hash == family.weights_hash != other.weights_hash
