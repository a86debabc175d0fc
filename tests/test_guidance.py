"""Guidance: closed forms, what it costs, and what was fitted with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlem.family import Family
from mlem.guidance import GuidedNetwork
from mlem.level import Level
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.plan import Plan
from mlem.networks import flops
from mlem.sampling import sample
from mlem.schedule import NoiseSchedule
from tests.labelled import CLASSES, DEVIATIONS, PATHS, gaussian_factor, labelled_family, labels, shrunk

SCALE = 1.5


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", range(CLASSES))
def test_classifier_free_guidance_has_the_law_of_the_guided_score(value: int, path: str) -> None:
    found = shrunk(labelled_family(path=path).guided(SCALE), value)
    truth = gaussian_factor(DEVIATIONS[value].item(), SCALE, path=path)
    truth *= gaussian_factor(DEVIATIONS[-1].item(), 1 - SCALE, path=path)
    assert torch.allclose(found, truth, rtol=2e-3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", range(CLASSES))
def test_autoguidance_has_the_law_of_the_guided_score(value: int, path: str) -> None:
    family = labelled_family(path=path)
    by_name = family.guided(SCALE, weak="1")
    found = shrunk(by_name, value)
    own = DEVIATIONS[value].item()
    truth = gaussian_factor(own, SCALE, path=path) * gaussian_factor(1.3 * own, 1 - SCALE, path=path)
    assert torch.allclose(found, truth, rtol=2e-3)
    assert by_name.level("1") is family.level("1")
    assert torch.equal(shrunk(Family([family.level("2")]).guided(SCALE, weak=family.level("1")), value), found)


def test_in_an_interval_it_acts_in_the_interval_alone() -> None:
    # the ends are points of no grid: the steps that hold them are a part of either side
    found = shrunk(labelled_family().guided(SCALE, interval=(0.1, 3.0)), 0)
    one, none = DEVIATIONS[0].item(), DEVIATIONS[-1].item()
    truth = gaussian_factor(one, high=0.1) * gaussian_factor(one, low=3.0)
    truth *= gaussian_factor(one, SCALE, 0.1, 3.0) * gaussian_factor(none, 1 - SCALE, 0.1, 3.0)
    assert torch.allclose(found, truth, rtol=5e-3)


def test_scale_1_is_no_guidance_and_scale_0_is_no_class() -> None:
    family = labelled_family()
    options: dict[str, Any] = {"indices": range(4), "steps": 6}
    plain = sample(family, **options, conditions=labels([1])).x
    assert torch.allclose(sample(family.guided(1.0), **options, conditions=labels([1])).x, plain, rtol=1e-9)
    none = sample(family, **options, conditions=labels([CLASSES])).x
    assert torch.allclose(sample(family.guided(0.0), **options, conditions=labels([1])).x, none, rtol=1e-9)


def test_it_is_one_call_of_a_doubled_batch() -> None:
    seen: list[tuple[int, list[int]]] = []

    class Seen(nn.Module):
        def forward(self, x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
            seen.append((len(x), class_labels.tolist()))
            return x

    schedule = NoiseSchedule.cosine()
    level = Level("a", Seen(), schedule, (2,), flops=5, conditions={"class_labels": 10})
    result = sample(Family([level]).guided(2.0), indices=range(3), steps=1, conditions=labels([4, 5, 6]))
    assert seen == [(6, [4, 5, 6, 10, 10, 10])]
    cost = result.ledger.levels["a"]
    assert (cost.calls, cost.flops, result.ledger.rounds) == (6, 30.0, 1)


def test_what_it_costs_is_counted_row_by_row() -> None:
    family = labelled_family()
    small, large = (float(level.flops) for level in family.levels)
    options: dict[str, Any] = {"indices": range(4), "steps": 10, "grid": "log_snr"}
    always = sample(family.guided(2.0), **options).ledger.levels["2"]
    assert (always.calls, always.flops) == (80, 80 * large)
    weak = sample(family.guided(2.0, weak="1"), **options).ledger.levels["2"]
    assert (weak.calls, weak.flops) == (80, pytest.approx(40 * large + 40 * small))
    inside = sample(family.guided(2.0, interval=(0.5, 2.0)), **options).ledger.levels["2"]
    kappa = family.schedule.kappa(torch.tensor(sample_times(family)))
    acts = int(((kappa >= 0.5) & (kappa <= 2.0)).sum())
    assert 0 < acts < 10
    assert (inside.calls, inside.flops) == (40 + 4 * acts, pytest.approx((40 + 4 * acts) * large))
    assert family.guided(2.0).level().flops == flops(family.guided(2.0).level().network, (2,), {"class_labels": 3})


def sample_times(family: Family) -> list[float]:
    """Where DDIM asks on the log-SNR grid in 10 steps."""
    from mlem.grids import TimeGrid

    return list(TimeGrid.make("log_snr", family.schedule, 10).times[:-1])


def test_under_a_plan_every_level_is_guided_and_expected_calls_count_both_sides() -> None:
    family = labelled_family().guided(SCALE, interval=(0.1, 3.0))
    ones = Plan.draw(torch.ones(12, 2, dtype=torch.float64), levels=("1", "2"))
    options: dict[str, Any] = {"indices": range(6), "steps": 12, "conditions": labels([0, 2])}
    run = sample(family, plan=ones, **options)
    assert torch.equal(run.x, sample(family, **options).x)
    some = Plan.draw(torch.tensor([[1.0, 0.5]]).expand(12, 2), coins="systematic", levels=("1", "2"))
    cost = sample(family, plan=some, **options).ledger.levels["2"]
    assert cost.calls > 6 * 6
    assert cost.expected_calls == pytest.approx(cost.calls)


def test_what_was_fitted_belongs_to_its_guidance(tmp_path: Path) -> None:
    plain = labelled_family()
    guided = plain.guided(2.0)
    hashes = {
        family.weights_hash
        for family in (
            plain,
            guided,
            plain.guided(3.0),
            plain.guided(2.0, null={"class_labels": 0}),
            plain.guided(2.0, weak="1"),
            plain.guided(2.0, interval=(0.1, 1.0)),
            plain.guided(2.0, interval=(0.1, 2.0)),
        )
    }
    assert len(hashes) == 7
    assert plain.guided(2.0).weights_hash == guided.weights_hash
    found = calibrate(guided, images=4, times=6, batch_sizes=[4])
    other = plain.guided(3.0)
    for family, fits in ((guided, True), (other, False), (plain, False)):
        family.fitted = Fitted(found)
        plan = family.plan(budget=0.6, cost="flops")
        if fits:
            made = sample(family, indices=range(2), steps=8, plan=plan)
            assert len(made.x) == 2
        else:
            with pytest.raises(ValueError, match="the calibration is for other weights or guidance"):
                sample(family, indices=range(2), steps=8, plan=plan)


def test_a_guided_family_is_made_anew_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a family under guidance is not saved; save the unguided one"):
        labelled_family().guided(2.0).save(tmp_path / "family")
    assert not (tmp_path / "family").exists()


def other_prediction() -> Level:
    one = labelled_family().level("1")
    return Level("w", one.network, one.schedule, (2,), "v", flops=5, conditions=one.conditions)


def unconditional() -> Family:
    return Family([Level("s", nn.Linear(2, 2), NoiseSchedule.cosine(), (2,), flops=5)])


MISTAKES: dict[str, tuple[Any, str]] = {
    "nothing to leave out": (lambda: unconditional().guided(2.0), "it takes no condition that could be left out"),
    "null of another name": (lambda: labelled_family().guided(2.0, null={"text": 1}), "level 1 takes class_labels"),
    "not the cheapest": (lambda: labelled_family().guided(2.0, weak="2"), "weak=2 must be the cheapest level, 1"),
    "no level": (lambda: labelled_family().guided(2.0, weak="9"), "level must be one of 1, 2, got '9'"),
    "infinite": (lambda: labelled_family().guided(float("inf")), "scale of guidance must be a finite number, got inf"),
    "interval": (lambda: labelled_family().guided(2.0, interval=(3.0, 1.0)), "0 <= low < high, got"),
    "convention": (lambda: labelled_family().guided(2.0, weak=other_prediction()), "weak=w has prediction v, level 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_guidance_that_does_not_fit_gets_one_line(mistake: str) -> None:
    make, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=words):
        make()


def test_a_row_of_numbers_may_stand_for_no_condition() -> None:
    class Told(nn.Module):
        def forward(self, x: Tensor, time: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            return text.sum((1, 2))[:, None] + mask[:, :2]

    null = torch.arange(6.0).view(3, 2)
    network = GuidedNetwork(Told(), 2.0, {"text": null})
    text, mask = torch.rand(4, 3, 2), torch.rand(4, 3)
    found = network(torch.zeros(4, 2), torch.zeros(4), text=text, mask=mask)
    told, other = text.sum((1, 2))[:, None] + mask[:, :2], 15.0 + mask[:, :2]
    assert torch.allclose(found, other + 2 * (told - other))
