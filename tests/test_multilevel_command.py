"""Multilevel sampling from the command line: calibrate, plan, sample; on any number of ranks, after a kill."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from mlem.comparison.figures import error_vs_time
from mlem.comparison.row import Row
from mlem.family import Family
from mlem.files import read_json, write_record
from mlem.images import quantise
from mlem.multilevel import command as multilevel
from mlem.multilevel.correction import PILOTS, RECOMMENDED, REUSES
from mlem.multilevel.pilot import STEPS, discretisations
from mlem.multilevel.plan import Plan
from mlem.outputs import read_png, sample_path
from mlem.sampling import sample
from tests.commands import TRAIN, configure, job, metrics, run_here, run_in, start, succeed_ranks, wait_until
from tests.conftest import FEWER
from tests.test_sample_command import images

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
]
FAMILY = Path("runs/digits/family")
MLEM = ("trainer=cpu", "sampler=mlem", "cost=flops", "budget=0.6", "steps=8", "batch_size=4")


def tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """`python -m mlem.multilevel`, in this process."""
    assert multilevel.main(list(map(str, arguments))) == 0


def ledger(out: Path) -> dict[str, Any]:
    return json.loads((out / "ledger.json").read_text())


def calls(out: Path) -> dict[str, float]:
    """Calls of each level for an image."""
    found = ledger(out)
    return {name: cost["calls"] / found["images"] for name, cost in found["levels"].items()}


# --- train.py ------------------------------------------------------------------------------------------------------


def test_training_a_family_ends_with_its_calibration(made: tuple[Path, str]) -> None:
    folder, printed = made
    assert printed.count("calibrating the family") == 1
    assert "mean squared error of level s alone, by steps" in printed
    family = Family.load(folder / FAMILY)
    found = family.fitted.calibration_for(family)
    assert found.about["images"] == found.about["pilot_images"] == 2
    assert len(found.log_snr) == 4
    assert list(found.seconds) == [64]
    kinds = ("hindsight", "switch", "held", "jump/systematic", "jump/bernoulli")
    ways = ("", *(f"/{reuse}" for reuse in REUSES))
    expected = {f"{kind}/{name}" for kind in ("sde", "ode") for name in kinds}
    recommended = itertools.product(("sde", "ode", "ddpm", "unipc", "unipc_3"), RECOMMENDED, ways)
    expected |= {f"{by}/{name}{way}" for by, name, way in recommended}
    assert set(found.pilots) == expected
    counts = {name: tuple(sorted(errors)) for name, errors in found.discretisation.items()}
    # 20 steps of this are the reference itself
    assert counts.pop("dpm_solver_pp/log_snr") == tuple(steps for steps in FEWER["ode"] if steps != 20)
    assert all(steps in FEWER.values() for steps in counts.values())
    assert min(mse for errors in found.discretisation.values() for mse in errors.values()) > 0


def test_a_calibrated_family_is_not_calibrated_again(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But it is where the calibration is of other weights."""
    folder, asked = Path(shutil.copytree(made[0], tmp_path / "copy")), []
    monkeypatch.setattr(sys.modules["mlem.cli.train"], "calibrate_folder", lambda *_, **how: asked.append(how))
    monkeypatch.setattr(sys.modules["mlem.cli.train"], "evaluate_family", lambda *_: None)  # for speed
    path = folder / FAMILY / "calibration.json"
    before = path.read_bytes()
    assert "calibrating" not in run_in(folder, lambda: run_here("train", *TRAIN))
    assert path.read_bytes() == before
    assert not asked
    plain = read_json(path)
    write_record(path, plain | {"about": plain["about"] | {"weights": "others"}})
    again = [*TRAIN, "evaluation.samplers=[{solver:ddpm,steps:[2]}]"]
    assert "calibrating the family" in run_in(folder, lambda: run_here("train", *again))
    assert asked == [{"images": 2, "times": 4, "batch_sizes": [64], "reference_steps": 20, "device": "cpu"}]


def test_a_calibration_that_is_kept_says_how_to_have_another(capsys: pytest.CaptureFixture) -> None:
    from mlem.cli.train import _say_other_options

    found = {"about": {"images": 2, "reference_steps": 20}, "log_snr": [0.0] * 4, "seconds": {"64": []}}
    for options in ([], ["calibration.images=0"]):
        _say_other_options(job("train", *TRAIN, *options).calibration, found, FAMILY)
    assert not capsys.readouterr().out
    changed = ("calibration.images=3", "calibration.batch_sizes=[64,8]")
    _say_other_options(job("train", *TRAIN, *changed).calibration, found, FAMILY)
    assert capsys.readouterr().out == (
        "runs/digits/family/calibration.json is kept (calibration.images 2 there, 3 now; calibration.batch_sizes [64] "
        "there, [8, 64] now); to renew it: python -m mlem.multilevel calibrate runs/digits/family --images 3 "
        "--times 4 --reference-steps 20 --batch-sizes 8 64, then this again\n"
    )


def test_a_plan_is_evaluated_beside_the_levels(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row "mlem" with its calls, in the table, the metrics, the grids of pictures and the figure."""
    folder, printed = made
    row = re.search(r"│ mlem +│ ddpm_hindsight │ 8 +│ ([\d.]+) xs \+ ([\d.]+) s +│", printed)
    assert row is not None
    family, runs = Family.load(folder / FAMILY), folder / "runs/digits"
    made_here = sample(family, indices=[0], solver="ddpm", steps=8, plan=family.plan(budget=0.6, cost="flops"))
    assert [float(row[1]), float(row[2])] == [cost.calls for cost in made_here.ledger.levels.values()]
    assert any("ddpm_hindsight" in path.name for path in (runs / "grids").iterdir())
    assert any("ddpm_hindsight" in name for line in metrics(runs / "metrics.jsonl") for name in line)
    assert (runs / "error_vs_time.png").stat().st_size > 1000
    figures: dict[str, Figure] = {}
    monkeypatch.setattr("mlem.comparison.figures.save", lambda figure, path: figures.update({"drawn": figure}))
    found = read_json(runs / "evaluation.json")
    rows = [Row.from_json(row) for row in found["rows"]]
    error_vs_time(rows, tmp_path / "figure.png", found["caption"])
    words = [text.get_text() for text in figures["drawn"].findobj(Text)]
    assert any("mlem" in word for word in words)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("{budgets:0.5}", "evaluation.samplers[0].plan: budgets: there is no such option; did you mean budget?"),
        ("{budget:2}", "evaluation.samplers[0].plan: budget must be in (0, 1], a share of the largest level's cost"),
        ("best", "evaluation.samplers[0].plan must be options, such as plan: {name: value}, got best"),
        ("{probabilities:[1,2]}", "evaluation.samplers[0].plan: probabilities must be in (0, 1], got 1, 2"),
        ("{coins:nested}", "evaluation.samplers[0].plan: calibrated probabilities need budget= or mse="),
    ],
)
def test_a_bad_plan_names_its_entry(entry: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    entry = f"evaluation.samplers=[{{solver:ddpm,steps:[2],plan:{entry}}}]"
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        run_here("train", *TRAIN, entry)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("{budget:0.6,levels:[xs,m]}", "level must be one of xs, s, got 'm'"),
        ("{budget:0.6,levels:[s,xs]}", "levels must be distinct and cheapest first, as in xs, s; got s, xs"),
        ("{probabilities:[1,0.5,0.1]}", "probabilities= must be 2 numbers, for xs, s, got 3"),
        ("{probabilities:learned,delta:0}", "learned probabilities need a trained family of "),
        ("{budget:0.01,cost:flops}", "budget=0.01 is too small for 2 steps of xs, s: no plan costs less than 0."),
        (
            "{budget:0.01,cost:flops,estimator:jump}",
            "budget=0.01 is too small for 2 steps of xs, s: no plan costs less",
        ),
    ],
)
def test_a_plan_that_no_calibration_mends_is_refused_before_training(
    entry: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    samplers = f"evaluation.samplers=[{{solver:ddpm,steps:[2]}},{{solver:ddpm,steps:[2],plan:{entry}}}]"
    with pytest.raises(ValueError, match=rf"^evaluation\.samplers\[1\]: {re.escape(says)}"):
        run_here("train", *TRAIN, samplers)
    assert not list(tmp_path.iterdir())


def test_a_plan_that_its_solver_cannot_follow_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    says = r"^evaluation\.samplers\[0\]: hindsight needs an mlem solver with one evaluation per step, not heun"
    with pytest.raises(ValueError, match=says):
        run_here("train", *TRAIN, "evaluation.samplers=[{solver:heun,steps:[2],plan:{budget:0.5}}]")
    assert not list(tmp_path.iterdir())


def test_a_plan_without_calibration_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    says = r"^evaluation\.samplers\[1\] has a plan, which needs calibration\.images >= 2, got 0$"
    with pytest.raises(ValueError, match=says):
        run_here("train", *TRAIN, "calibration.images=0")
    assert not list(tmp_path.iterdir())


# --- python -m mlem.multilevel -------------------------------------------------------------------------------------


def test_calibrate_writes_and_reports(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As a command of its own; `report` prints the same again. What is measured does not depend on who asks."""
    family = Path(shutil.copytree(made[0] / FAMILY, tmp_path / "family"))
    trained = read_json(family / "calibration.json")
    (family / "calibration.json").unlink()
    last = [one for one in discretisations() if one[0] == "dpm_solver_pp"]
    for name, value in (("discretisations", lambda: last), ("PILOTS", PILOTS[1:]), ("REUSES", ())):
        monkeypatch.setattr(sys.modules["mlem.multilevel.pilot"], name, value)  # for speed
    options = ["--images", 2, "--times", 4, "--reference-steps", 20, "--batch-sizes", 1, 8]
    tool(monkeypatch, "calibrate", family, *options)
    printed = capsys.readouterr().out
    found = read_json(family / "calibration.json")
    assert sorted(found["seconds"]) == ["1", "8"]
    for name in ("differences", "log_snr", "flops"):
        assert found[name] == trained[name]
    for name in ("dpm_solver_pp/uniform", "dpm_solver_pp/log_snr"):
        measured = found["discretisation"][name]
        assert list(map(int, measured)) == [steps for steps in STEPS["ode"] if (steps, name[-3:]) != (20, "snr")]
        assert {steps: measured[steps] for steps in trained["discretisation"][name]} == trained["discretisation"][name]
    assert found["pilots"]["ode/held"] == trained["pilots"]["ode/held"]
    tool(monkeypatch, "report", family)
    assert capsys.readouterr().out == printed
    assert "levels (2 trajectories, cpu)" in printed
    assert re.search(r"│ xs +│", printed)


def test_until_errors_are_known_well_more_images_are_taken(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    family = Path(shutil.copytree(made[0] / FAMILY, tmp_path / "family"))
    for name, value in (("discretisations", lambda: discretisations()[-1:]), ("PILOTS", ())):
        monkeypatch.setattr(sys.modules["mlem.multilevel.pilot"], name, value)  # for speed
    monkeypatch.setattr(sys.modules["mlem.multilevel.command"], "MOST_IMAGES", 6)
    options = ["--images", 2, "--times", 4, "--reference-steps", 100, "--batch-sizes", 2]
    for until, count in (("900%", 2), ("0.0001", 6)):
        tool(monkeypatch, "calibrate", family, *options, "--until", until)
        assert read_json(family / "calibration.json")["about"]["pilot_images"] == count
        assert f"Standard errors over {count} images: at most " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tool(monkeypatch, "calibrate", family, "--until", "much")
    assert "argument --until: must be a share, such as 20% or 0.2, got 'much'" in capsys.readouterr().err


def test_memorise_keeps_the_best_plan(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture
) -> None:
    family = Path(shutil.copytree(here / FAMILY, tmp_path / "family"))
    options = ["--draws", 4, "--images", 2, "--steps", 8, "--reference-steps", 20, "--budget", 0.6, "--cost", "flops"]
    tool(monkeypatch, "memorise", family, *options, "--coins", "bernoulli", "--levels", "xs", "s")
    printed = capsys.readouterr().out
    about = read_json(family / "plans/best.json")["about"]
    assert (about["draws"], about["images"], about["steps"], about["solver"]) == (4, 2, 8, "ddpm")
    assert about["chosen_mse"] > 0
    assert 0 < about["judged_mse"] < about["others_mse"] + 3 * about["others_spread"]
    assert f"best of 4 draws: mean squared error {about['chosen_mse']:.3g} on the 2 images" in printed
    assert f"{about['judged_mse']:.3g} on 2 others, where all draws have {about['others_mse']:.3g} ±" in printed
    common = ("trainer=cpu", f"family={family}", "sampler=mlem", "steps=8", "seeds=0-1")
    run_here("sample", *common, "plan=best", f"out={out}")
    assert calls(out) == dict(zip(("xs", "s"), Plan.load(family / "plans/best.json").calls.tolist(), strict=True))
    # the plan's file by itself gives the same pictures
    run_here("sample", *common, f"plan={family}/plans/best.json", f"out={tmp_path / 'file'}")
    assert images(tmp_path / "file") == images(out)


# --- sample.py -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["mlem", "mlem_ddim", "mlem_dpm"])
def test_the_mlem_samplers_print_the_calls_of_each_level(
    here: Path, out: Path, sampler: str, capsys: pytest.CaptureFixture
) -> None:
    """The defaults of configs/sampler, but for a budget that this small family can meet."""
    budget = configure("sample", f"sampler={sampler}").budget
    assert 0.3 < budget < 0.5
    options = ("trainer=cpu", f"sampler={sampler}", "cost=flops", "seeds=0-1", f"out={out}")
    run_here("sample", *options)
    printed, found = capsys.readouterr().out, calls(out)
    for name, count in found.items():
        assert f"level {name}: {count:g} calls per image (expected {count:.4g})" in printed
    family = Family.load(FAMILY)
    steps = configure("sample", f"sampler={sampler}").steps
    flops = sum(count * family.level(name).flops for name, count in found.items()) / family.level().flops
    assert flops <= budget * steps
    assert f"total {flops:.4g} evaluations of level s by FLOPs; it alone would make {steps}" in printed
    assert re.search(
        r"predicted mean squared error \S+; \w+ with level s alone in \d+ steps, at the same cost", printed
    )


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        (("levels=[xs,s]",), {"levels": ("xs", "s")}),
        (("estimator=held", "order=1"), {"estimator": "held", "order": 1}),
        (("estimator=jump",), {"estimator": "jump"}),
        (("estimator=jump", "coins=poisson"), {"estimator": "jump", "coins": "poisson"}),
        (("estimator=jump", "coins=bernoulli", "seed=3"), {"estimator": "jump", "coins": "bernoulli", "seed": 3}),
        (("estimator=jump", "per_sample=true"), {"estimator": "jump", "per_sample": True}),
        (("probabilities=theory",), {"probabilities": "theory"}),
        (("probabilities=[1,0.3]",), {"probabilities": (1, 0.3)}),
        (("mse=0.3",), {"budget": None, "mse": 0.3}),
        (("budget=0.9",), {"budget": 0.9}),
    ],
    ids=str,
)
def test_options_shape_the_plan(here: Path, out: Path, options: tuple[str, ...], spec: dict[str, Any]) -> None:
    """The pictures are those of the same spec in Python; `mse=` takes the place of the sampler's own budget."""
    asked = [option for option in MLEM if not (option.startswith("budget") and spec.get("budget", 0) is None)]
    run_here("sample", *asked, *options, "seeds=0-3", f"out={out}")
    family = Family.load(FAMILY)
    plan = family.plan(**{"budget": 0.6, "cost": "flops", "batch_size": 4} | spec)
    seed = spec.get("seed", 0)
    options_of = {"solver": "ddpm", "steps": 8, "grid": "log_snr", "batch_size": 4, "seed": seed}
    made = sample(family, indices=range(4), plan=plan, **options_of)
    assert calls(out) == {name: cost.calls / 4 for name, cost in made.ledger.levels.items()}
    stored = torch.stack([read_png(sample_path(out, index)) for index in range(4)])
    assert torch.equal(quantise(made.x), quantise(stored))


def test_ranks_and_kills_leave_the_same_bytes(here: Path, tmp_path: Path) -> None:
    """One rank, and a run that is killed and finished by two; another budget is refused in its folder."""
    options = (*MLEM, "steps=50", "batch_size=2", "seeds=0-9")
    run_here("sample", *options, f"out={tmp_path / 'one'}")
    one, cut = images(tmp_path / "one"), tmp_path / "cut"
    with start("sample", *options, f"out={cut}", cwd=here) as process:
        wait_until(lambda: len(images(cut)) >= 3, process)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = images(cut)
    assert before == {name: one[name] for name in before}
    assert len(before) < len(one) == 10
    printed = succeed_ranks("sample", *options, f"out={cut}", cwd=here)
    assert images(cut) == one
    assert printed.count("level xs:") == printed.count("level s:") == 1
    with pytest.raises(ValueError, match=r"plan: \w+ there, \w+ now.*choose another out="):
        run_here("sample", *options, "budget=0.5", f"out={cut}")
    assert images(cut) == one
