"""Reused features in calibration, planning and recommendation: measured, counted, and chosen where they pay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from mlem import Family, Level, Reuse, Sampler
from mlem.ledger import Ledger
from mlem.multilevel import pilot as pilots
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.calibration import Calibration
from mlem.multilevel.correction import REUSES
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.identity import seen_reusing
from mlem.multilevel.report import report
from mlem.networks import DeepCache
from tests.problems import level

SHAPE = (1, 8, 8)
TWO = Reuse(2, 1)


@pytest.fixture(scope="module")
def family() -> Family:
    """Two untrained UNets, calibrated on two images; seconds are made up, 1 and 20, and 4 on kept features."""
    found = Family([level("xs", SHAPE), level("s", SHAPE)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pilots, "discretisations", lambda: [("unipc", "uniform"), ("ddpm", "uniform")])
        patch.setattr(pilots, "PILOTS", (("unipc", "uniform", (8, 12), 1),))
        patch.setattr(pilots, "STEPS", {"ode": (4, 8, 16), "sde": (8, 16)})
        patch.setattr(pilots, "SPENT", (3.0, 6.0))
        patch.setattr(pilots, "PAYS", 0.0)  # whatever the times, all kinds of reuse
        known = pilots.pilot(found, calibrate(found, images=2, times=4, batch_sizes=(2,)), images=2, reference_steps=40)
    times = {"seconds": {64: (1.0, 20.0)}, "outside": {64: {"ode": 0.5, "sde": 0.5}}, "shallow": {64: {1: 4.0}}}
    return Family(found.levels, Fitted(replace(known, **times)))


@pytest.fixture(scope="module")
def known(family: Family) -> Calibration:
    return family.fitted.calibration_for(family)


def test_a_calibration_measures_reuse_on_the_solvers_and_grids_of_the_pilots(known: Calibration) -> None:
    for reuse in REUSES:
        assert list(known.discretisation[f"unipc/uniform/{reuse}"]) == [4, 8, 16]
        assert f"ddpm/uniform/{reuse}" not in known.discretisation
        for kind in ("hindsight", "switch"):
            plain, kept = known.pilots[f"ode/{kind}"], known.pilots[f"ode/{kind}/{reuse}"]
            assert [(row[0], row[3]) for row in kept] == [(row[0], row[3]) for row in plain]  # the same plans
            assert [row[1] for row in kept] != [row[1] for row in plain]
    assert Calibration.from_dict(known.to_dict()).to_dict() == known.to_dict()


@pytest.mark.parametrize(("shallow", "tried"), [(0.0, len(REUSES)), (0.99, 1)])
def test_rarer_whole_calls_are_tried_while_they_pay(
    shallow: float, tried: int, known: Calibration, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features that save nothing are tried once, and no plans are made for them."""
    monkeypatch.setattr(pilots, "discretisations", lambda: [("unipc", "uniform")])
    monkeypatch.setattr(pilots, "PILOTS", (("unipc", "uniform", (8,), 1),))
    monkeypatch.setattr(pilots, "STEPS", {"ode": (4, 8, 16), "sde": (8,)})
    monkeypatch.setattr(pilots, "_pays", lambda kept, plain, share: share < 0.9)
    monkeypatch.setattr(pilots, "SPENT", (3.0,))
    found = pilots.pilot(family, replace(known, shallow={64: {1: 20 * shallow}}), images=2, reference_steps=20)
    assert [str(one) in " ".join(found.discretisation) for one in REUSES] == [n < tried for n in range(len(REUSES))]
    kept = REUSES if tried > 1 else ()
    assert {key.rpartition("/")[2] for key in found.pilots if "every" in key} == {str(one) for one in kept}


def test_reuse_pays_where_it_often_errs_less_in_the_same_time() -> None:
    plain = {steps: torch.full((2,), steps**-2.0) for steps in (4, 8, 16, 32)}
    half = {steps: torch.full((2,), 3 * steps**-2.0) for steps in (8, 16, 32)}  # as plain does in 0.58 of the steps
    assert pilots._pays(half, plain, 0.5)
    assert not pilots._pays(half, plain, 0.6)
    assert pilots._pays(half | {8: torch.ones(2)}, plain, 0.5)
    assert not pilots._pays(half | {8: torch.ones(2), 16: torch.ones(2), 32: torch.ones(2)}, plain, 0.5)


def test_calls_on_kept_features_are_timed() -> None:
    found = calibrate(Family([level("xs", SHAPE), level("s", SHAPE)]), images=2, times=3, batch_sizes=(2, 4))
    assert {size: list(times) for size, times in found.shallow.items()} == {2: [1], 4: [1]}
    assert all(0 < times[1] < 1 for times in found.shallow.values())


def test_seconds_count_whole_evaluations_and_those_on_kept_features(known: Calibration) -> None:
    calls = {"xs": 3.0, "s": 5.0}
    assert known.predicted_seconds(calls, 6, "ode") == 3 + 5 * 20 + 6 * 0.5
    assert known.predicted_seconds(calls, 6, "ode", reuse=TWO) == 3 + 3 * 20 + 2 * 4 + 6 * 0.5
    assert known.predicted_seconds({"xs": 3.0}, 0, "ode", reuse=TWO) == 3
    seen = known.reusing(TWO)
    assert seen.seconds == {64: (1.0, 12.0)}
    for one, other, more in zip(
        *(known.pilots[f"unipc/hindsight{words}"] for words in ("", f"/{TWO}")),
        seen.pilots["unipc/hindsight/reuse"],
        strict=True,
    ):
        assert more == [one[0], pytest.approx(other[1] / one[1])]


def test_what_was_not_measured_is_refused(family: Family, known: Calibration) -> None:
    for one, reuse in ((known, Reuse(7, 1)), (known, Reuse(2, 0)), (replace(known, shallow={64: {}}), TWO)):
        with pytest.raises(ValueError, match=rf"^reuse of features \({reuse}\) was not measured for this family; "):
            one.reusing(reuse)


def test_a_plan_is_made_for_the_reuse_that_it_is_used_with(family: Family, known: Calibration) -> None:
    """As many seconds of cheaper calls: more of them, within the budget."""
    spec = family.plan(budget=0.4)
    whole, kept = (
        Sampler(family, solver="unipc", steps=12, grid="uniform", plan=spec, reuse=reuse) for reuse in (None, TWO)
    )
    assert whole.plan is not None
    assert kept.plan is not None
    most = 0.4 * 12 * (20 + 0.5)
    calls = dict(zip(kept.plan.levels, kept.plan.expected_calls.tolist(), strict=True))
    assert calls["s"] > dict(zip(whole.plan.levels, whole.plan.expected_calls.tolist(), strict=True))["s"]
    assert known.predicted_seconds(calls, 12, "ode", reuse=TWO) <= most + 20 - 4  # the first is a whole one
    unknown = Sampler(family, solver="unipc", steps=12, grid="uniform", plan=spec, reuse=Reuse(7, 1))
    assert unknown.plan is not None
    assert unknown.plan.fingerprint() == whole.plan.fingerprint()


def whole_calls_of(ledger: Ledger, largest: Level, reuse: Reuse) -> int:
    """How many calls per image ran the whole network, from the FLOPs."""
    cost, share = ledger.levels[largest.name], DeepCache(largest.network, reuse, SHAPE).shallow_share
    assert isinstance(largest.flops, int)
    return round((cost.flops / largest.flops - cost.calls * share) / (1 - share) / ledger.images)


def test_it_is_recommended_where_it_pays_and_runs_as_predicted(family: Family, known: Calibration) -> None:
    """With pilots that say that reuse adds nothing, and then that it ruins everything."""
    for factor in (1.0, 1e4):
        adds = dict(known.pilots)
        for name in [name for name in adds if "/every" in name]:
            rows = known.pilots[name.rpartition("/")[0]]
            adds[name] = [[row[0], factor * row[1], *row[2:]] for row in rows]
        alone = {name: found for name, found in known.discretisation.items() if "/every" not in name}
        of = Family(family.levels, Fitted(replace(known, pilots=adds, discretisation=alone)))
        target = 2 * known.discretisation["unipc/uniform"][16]
        choice = of.recommend(mse=target)
        assert (choice.reuse is not None) == (factor == 1.0)
        sampler = Sampler(of, **choice.options)
        ledger = sampler.run(range(2)).ledger
        calls = {name: cost.calls / ledger.images for name, cost in ledger.levels.items()}
        whole = None if choice.reuse is None else whole_calls_of(ledger, of.level(), choice.reuse)
        expected = known.predicted_seconds(calls, choice.steps, "ode", reuse=choice.reuse, whole=whole)
        assert choice.predicted_seconds == pytest.approx(expected)
        assert str(choice).endswith("branch 1)") == (choice.reuse is not None)


def test_a_few_lucky_images_do_not_make_reuse_better_than_the_whole_network(family: Family, known: Calibration) -> None:
    def lucky(found: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
        return {
            name: {steps: error * (1e-3 if "/every" in name else 1.0) for steps, error in errors.items()}
            for name, errors in found.items()
        }

    measured = (lucky(errors) for errors in (known.discretisation, known.stderr, known.trimmed))
    names = dict(zip(("discretisation", "stderr", "trimmed"), measured, strict=True))
    of = Family(family.levels, Fitted(replace(known, **names)))
    choice = of.recommend(seconds=80.0)
    kept = [one for one in (choice, *choice.alternatives) if one.reuse is not None and one.plan is None]
    assert kept
    for one in kept:
        assert one.predicted_mse >= known.discretisation["unipc/uniform"][one.steps]


def test_the_family_seen_with_reuse_shares_all_but_the_calibration(family: Family) -> None:
    seen = seen_reusing(family, TWO)
    assert seen.levels is family.levels
    assert seen.kept is family.kept
    assert seen.weights_hash == family.weights_hash
    assert seen.fitted is not family.fitted


def test_the_trajectory_before_leaves_nothing_behind(family: Family) -> None:
    from mlem.multilevel.probes import plan_samples
    from mlem.solvers import GridPoint, make_solver

    solver, kept = make_solver("unipc"), family.reusing(TWO)
    points = GridPoint.of(family.schedule, solver.grid(family.schedule, 5, "uniform"))
    plan = Sampler(family, solver="unipc", steps=5, grid="uniform", plan=family.plan(budget=0.7)).plan
    assert plan is not None
    with torch.inference_mode():
        one, two = (plan_samples(kept, plan, solver, points, torch.arange(2), 0) for _ in range(2))
    assert torch.equal(one, two)


def test_a_report_shows_where_a_few_images_outweigh_the_others(
    known: Calibration, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two images the worst one is left out."""
    whole, without = known.discretisation["unipc/uniform"], known.trimmed["unipc/uniform"]
    assert list(without) == list(whole)
    assert all(without[steps] <= whole[steps] for steps in whole)
    heavy = replace(known, trimmed=known.trimmed | {"unipc/uniform": {steps: mse / 3 for steps, mse in whole.items()}})
    for one, bracket in ((heavy, True), (replace(known, trimmed={}), False)):
        report(one, Console(width=200))
        said = capsys.readouterr().out
        assert (f"{whole[8]:.1e} ({whole[8] / 3:.1e})" in said) is bracket
        assert ("In brackets: without the worst twentieth of the images" in said) is bracket
