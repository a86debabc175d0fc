"""What is recommended: it reaches its target on other images, never slower than what a user would have typed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlem import Family, Sampler, sample
from mlem.multilevel import checking
from mlem.multilevel import pilot as pilot_module
from mlem.multilevel.alone import error_alone
from mlem.multilevel.calibration import Calibration
from mlem.multilevel.candidate import WIDE, Candidate, Check, Recommendation
from mlem.multilevel.correction import correction, reuse_factor, tail
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.timing import timed_here, timed_on
from mlem.trajectory import samples
from tests.waves import family

pytestmark = pytest.mark.usefixtures("float64_module")

INDICES = range(128)


@pytest.fixture(scope="module")
def waves() -> Family:
    """Three levels whose seconds are 1 : 8 : 64, with pilots; the solver's error is its own."""
    few = [("ddpm", "uniform"), ("unipc", "uniform"), ("unipc_3", "log_snr")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pilot_module, "discretisations", lambda: few)  # for speed
        calibration = pilot_module.pilot(
            family(), family().fitted.calibration_for(family()), images=32, reference_steps=200
        )
    return Family(family().levels, Fitted(calibration))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where times of families from other machines are kept; not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mlem" / "times"


def error(of: Family, one: Candidate, kind: str) -> float:
    """Mean squared error on images that no calibration has seen."""
    truth = sample(of, solver={"ode": "dpm_solver_pp", "sde": "ddpm"}[kind], steps=200, indices=INDICES).x
    return (sample(of, indices=INDICES, **one.options).x - truth).square().mean().item()


@pytest.mark.parametrize(("kind", "mse"), [("ode", 1e-4), ("ode", 1e-6), ("sde", 5e-3), ("sde", 2e-3)])
def test_it_reaches_an_error_as_fast_as_anything(waves: Family, kind: str, mse: float) -> None:
    choice = waves.recommend(mse=mse, kind=kind)
    assert error(waves, choice, kind) <= 1.2 * mse
    assert choice.interval[0] < choice.predicted_mse <= choice.upper_mse <= mse
    assert choice.predicted_seconds <= 1.03 * min(one.predicted_seconds for one in choice.alternatives)
    plain = [one for one in choice.alternatives if one.level == "3" and one.upper_mse <= mse]
    assert plain
    assert choice.level != "3"
    assert choice.why.startswith(f"{plain[0].predicted_seconds / choice.predicted_seconds:.2g} times as fast as 3 ")


@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_in_a_time_it_errs_least(waves: Family, kind: str) -> None:
    seconds = 16 * 64.0
    choice = waves.recommend(seconds=seconds, kind=kind)
    assert choice.predicted_seconds <= 1.0001 * seconds
    plain = next(one for one in choice.alternatives if one.level == "3")
    assert error(waves, choice, kind) < error(waves, plain, kind)


@pytest.mark.parametrize(("kind", "mse"), [("ode", 1e-4), ("ode", 1e-6), ("sde", 5e-3)])
def test_what_is_measured_first_is_no_slower_and_surer(waves: Family, kind: str, mse: float) -> None:
    predicted, choice = waves.recommend(mse=mse, kind=kind), waves.recommend(mse=mse, kind=kind, check=64)
    assert choice.check is not None
    assert predicted.check is None
    assert choice.check.images == 64
    assert choice.check.interval[0] < choice.check.mse < choice.check.upper_mse <= mse
    assert error(waves, choice, kind) <= 1.1 * mse
    assert choice.predicted_seconds <= predicted.predicted_seconds
    assert choice.check.upper_mse >= 0.5 * mse


def test_the_many_step_run_is_made_once(waves: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    of, steps = Family(waves.levels, waves.fitted), list[int]()
    monkeypatch.setattr(checking, "samples", lambda *args: steps.append(len(args[2]) - 1) or samples(*args))
    for mse in (1e-4, 1e-5):
        of.recommend(mse=mse, check=16)
    assert steps.count(200) == 1


def test_a_measurement_mends_a_prediction_that_is_wrong(waves: Family) -> None:
    """By a factor of five either way; then nothing less than the truth."""
    known: Calibration = waves.fitted.calibration_for(waves)
    for factor in (0.2, 5.0):
        errors = {
            key: {steps: factor * one for steps, one in found.items()} for key, found in known.discretisation.items()
        }
        of = Family(waves.levels, Fitted(replace(known, discretisation=errors)))
        choice = of.recommend(mse=1e-4, check=64)
        assert error(of, choice, "ode") <= 1.1e-4
        assert choice.check is not None
        assert choice.check.upper_mse >= 0.3e-4


def test_in_a_time_the_choice_is_measured_too(waves: Family) -> None:
    choice, predicted = (waves.recommend(seconds=16 * 64.0, check=count) for count in (32, 0))
    assert choice.check is not None
    assert (str(choice), choice.predicted_mse) == (str(predicted), predicted.predicted_mse)
    assert choice.check.mse == pytest.approx(error(waves, choice, "ode"), rel=0.5)


def test_where_levels_do_not_pay_one_runs(waves: Family) -> None:
    """All levels take as long: the largest alone, and the line that says why."""
    calibration = waves.fitted.calibration_for(waves)
    whole = {key: errors for key, errors in calibration.discretisation.items() if "forecast" not in key}
    slow = replace(calibration, seconds={64: (0.98, 0.99, 1.0)}, discretisation=whole)
    choice = Family(waves.levels, Fitted(slow)).recommend(mse=1e-5)
    assert (choice.level, choice.plan) == ("3", None)
    assert choice.why.startswith("3 alone is fastest: a call of 3 takes 1.02 times as long as one of 1")
    assert choice.options == {"solver": choice.solver, "steps": choice.steps, "grid": choice.grid, "level": "3"}


@pytest.mark.parametrize("mse", [1e-3, 1e-5])
def test_a_forecast_of_the_largest_level_is_recommended_where_it_is_fastest(waves: Family, mse: float) -> None:
    """All levels take as long, and outputs are smooth: it reaches the error in fewer calls than the level alone."""
    calibration = waves.fitted.calibration_for(waves)
    alike = Family(waves.levels, Fitted(replace(calibration, seconds={64: (0.98, 0.99, 1.0)})))
    choice = alike.recommend(mse=mse)
    assert choice.plan is not None
    assert (choice.plan.estimator, choice.plan.levels) == ("forecast", ("3",))
    assert choice.predicted_seconds == pytest.approx(math.ceil(choice.steps / 2), rel=1e-2)
    assert choice.why.endswith(f" 3 alone in {choice.alternatives[0].steps} steps of {choice.alternatives[0].solver}")
    assert error(alike, choice, "ode") <= 1.1 * mse


def test_a_plan_that_is_recommended_runs_as_it_was_predicted_to(waves: Family) -> None:
    choice = waves.recommend(mse=1e-5)
    assert choice.plan is not None
    sampler = Sampler(waves, **choice.options)
    ledger = sampler.run(INDICES).ledger
    calls = {name: cost.calls / ledger.images for name, cost in ledger.levels.items()}
    seconds = dict(zip(waves.names, waves.fitted.calibration_for(waves).seconds[64], strict=True))
    assert sum(seconds[name] * count for name, count in calls.items()) == pytest.approx(choice.predicted_seconds)


def test_a_choice_that_misses_and_is_made_again_is_asked_for_less() -> None:
    def choose(mse: float) -> Recommendation:
        steps = 8 if mse > 0.8e-2 else 12
        return Recommendation("ddpm", steps, "uniform", "xl", None, mse, (mse, mse), float(steps))

    def judge(one: Candidate) -> Check:
        return Check(64, {8: 1.04e-2, 12: 0.9e-2}[one.steps], 0.0)

    assert checking.adjusted(choose, 1e-2, judge).steps == 12


def test_a_family_from_another_machine_is_timed_here(waves: Family, kept: Path) -> None:
    calibration = waves.fitted.calibration_for(waves)
    here = timed_on(torch.device("cpu"))
    for noted, own in (({}, True), ({"machine": here}, True), ({"machine": "1 cores Babbage"}, False)):
        of = Family(waves.levels, Fitted(replace(calibration, about=calibration.about | noted)))
        of.recommend(mse=1e-2)
        found = of.fitted.calibration_for(of)
        assert (found.seconds == calibration.seconds) is own
        assert kept.exists() is not own
        assert found.discretisation == calibration.discretisation
    assert found.about["machine"] == here
    assert max(found.seconds[64]) < 1


def test_times_on_this_machine_are_kept_so_that_a_choice_is_made_again(waves: Family, kept: Path) -> None:
    calibration = waves.fitted.calibration_for(waves)
    foreign = replace(calibration, about=calibration.about | {"machine": "1 cores Babbage"})
    first = timed_here(waves, foreign, 64)
    assert timed_here(waves, foreign, 64).fingerprint == first.fingerprint
    assert timed_here(waves, foreign, 32).seconds.keys() == {32}  # another batch, other times
    [path] = [path for path in kept.iterdir() if json.loads(path.read_text())["seconds"].keys() == {"64"}]
    path.write_text(path.read_text()[:100])
    assert timed_here(waves, foreign, 64).fingerprint != first.fingerprint  # measured again
    assert json.loads(path.read_text())["seconds"].keys() == {"64"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, r"takes mse=, the allowed error, or seconds=, per image; pass one of them$"),
        ({"mse": 1e-3, "seconds": 1.0}, r"; pass one of them$"),
        ({"mse": 0.0}, r"^mse must be a number > 0, got 0\.0$"),
        ({"seconds": float("nan")}, r"^seconds must be a number > 0, got nan$"),
        ({"mse": 1e-3, "kind": "pde"}, r"^kind must be one of ode, sde, got .pde.; did you mean sde\?$"),
        ({"mse": 1e-30}, r"^mse=1e-30: nothing surely reaches it in 1000 steps, where .* remains; allow more"),
        ({"mse": 1e-3, "check": 1}, r"^check must be a whole number >= 2, got 1$"),
        ({"seconds": 0.5}, r"^seconds=0\.5 per image: a step of 1 takes 1; allow more$"),
    ],
)
def test_mistakes_get_one_line(waves: Family, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        waves.recommend(**options)


def test_a_calibration_without_pilots_is_refused(waves: Family) -> None:
    of = Family(waves.levels, Fitted(replace(waves.fitted.calibration_for(waves), discretisation={}, stderr={})))
    with pytest.raises(ValueError, match=r"^no error of an ODE solver was measured for this family: python -m mlem\."):
        of.recommend(mse=1e-3)


def test_steps_that_were_not_measured_are_said(waves: Family) -> None:
    assert not waves.recommend(mse=1e-4).extrapolated
    calibration: Calibration = waves.fitted.calibration_for(waves)
    few = {key: {8: found[8], 16: found[16]} for key, found in calibration.discretisation.items()}
    of = Family(waves.levels, Fitted(replace(calibration, discretisation=few, stderr={})))
    assert of.recommend(mse=1e-6).extrapolated


# --- how sure a prediction is --------------------------------------------------------------------------------------


def test_pilots_along_a_line_are_followed_and_others_distrusted() -> None:
    """log(measured / predicted) = 0.5 + 0.1 log(predicted) - 0.2 log(steps), exactly, and with scatter."""
    pilots = [
        [predicted, predicted * 2.718281828**0.5 * predicted**0.1 * steps**-0.2, 0.0, steps]
        for predicted in (1e-5, 1e-4, 1e-3)
        for steps in (16.0, 32.0, 64.0)
    ]
    found = correction(pilots, 3e-4, 24)
    assert found.factor == pytest.approx(2.718281828**0.5 * 3e-4**0.1 * 24**-0.2, rel=0.05)
    assert found.spread < 0.2
    scattered = [[row[0], row[1] * (3.0 if number % 2 else 1 / 3.0), *row[2:]] for number, row in enumerate(pilots)]
    assert correction(scattered, 3e-4, 24).spread > 0.8
    unsure = [[*row[:2], 0.5 * row[1], row[3]] for row in pilots]
    assert correction(unsure, 3e-4, 24).spread > 0.5
    assert correction([], 3e-4, 24) == (1.0, 1.0)


def test_what_reuse_adds_is_an_error_of_its_own() -> None:
    """Factors of 1 + 1e-4 / error, but for one that is too small by chance, and one below 1."""
    pilots = [[error, 1 + 1e-4 / error] for error in (1e-5, 1e-4, 1e-3, 1e-2)]
    assert reuse_factor(pilots, 1e-4).factor == pytest.approx(2)
    assert 1.1 < reuse_factor(pilots, 3e-4).factor < 2
    assert reuse_factor(pilots, 1e-7).factor == pytest.approx(1e2 * pilots[0][1])
    assert reuse_factor(pilots, 1.0) == (pytest.approx(pilots[-1][1]), 0.05)
    assert reuse_factor(pilots, 3e-5).spread > 0.5
    lucky = [[1e-5, 0.5], *pilots[1:3], [1e-2, 0.9]]
    assert reuse_factor(lucky, 1e-5).factor == pytest.approx(2)
    assert reuse_factor(lucky, 1e-2).factor == 1


def test_what_one_image_in_many_does_is_shared_by_measurements_near_by() -> None:
    near, far = np.zeros(3), np.array([0.0, 0.0, 30.0])
    factor, spread = tail([1.0, 1.0, 4.0], [1.0, 1.0, 1.0], near)
    assert factor == pytest.approx(2)
    assert spread == pytest.approx(np.log(2))  # each is that far from 2
    assert tail([1.0, 1.0, 4.0], [1.0, 1.0, 1.0], far) == pytest.approx((1, 0))
    assert tail([2.0], [1.0], np.array([30.0])) == pytest.approx((2, 0))  # the nearest, however far
    pilots = [[10.0**-n, 2 * 10.0**-n, 10.0**-n / 100, 24.0] for n in range(2, 8)]
    heavy = [[*row, row[1] / (6 if number % 2 else 1)] for number, row in enumerate(pilots)]
    light = [[*row, row[1]] for row in pilots]
    assert correction(light, 1e-4, 24) == pytest.approx(correction(pilots, 1e-4, 24))
    assert correction(heavy, 1e-4, 24).spread > 2 * correction(light, 1e-4, 24).spread


def test_errors_of_many_images_lie_in_the_interval_of_few(waves: Family) -> None:
    """One image in twenty errs up to a hundred times as much, of which one set of 64 images sees more than another."""
    known, random = waves.fitted.calibration_for(waves), np.random.default_rng(0)
    counts, inside = (8, 10, 12, 14, 16), []
    for _ in range(100):
        errors = {steps: random.exponential(size=64) * 100 ** (random.random(64) < 0.05) for steps in counts}
        measured = {steps: float(each.mean()) for steps, each in errors.items()}
        stderr = {steps: float(each.std()) / 8 for steps, each in errors.items()}
        trimmed = {steps: float(np.sort(each)[:60].mean()) for steps, each in errors.items()}
        names = {"discretisation": {"a/b": measured}, "stderr": {"a/b": stderr}, "trimmed": {"a/b": trimmed}}
        found = error_alone(replace(known, **names), "a/b", 12)
        assert found is not None
        others = random.exponential(size=64) * 100 ** (random.random(64) < 0.05)
        inside.append(abs(np.log(others.mean() / found.error)) < WIDE * found.spread)
    assert np.mean(inside) > 0.9  # 0.66 for a mean and twice its own standard error


def test_between_measured_steps_an_error_is_less_sure(waves: Family) -> None:
    known = waves.fitted.calibration_for(waves)
    sure, between = (error_alone(known, "unipc/uniform", steps) for steps in (12, 13))
    assert sure is not None
    assert between is not None
    assert between.spread > sure.spread
    assert between.error < sure.error
    assert error_alone(known, "unipc/karras", 12) is None
