"""Multilevel sampling from the command line: one line for every mistake."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from mlem.cli import main as cli
from mlem.files import read_json, write_json
from mlem.multilevel import command as multilevel
from mlem.multilevel.plan import Plan
from tests.commands import REPOSITORY, execute, run_here
from tests.test_multilevel_command import FAMILY, calls

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
]


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *options: str) -> str:
    """What `python sample.py` says on standard error before it ends with 2."""
    monkeypatch.setattr(sys, "argv", ["sample.py", "trainer=cpu", *options])
    with pytest.raises(SystemExit) as stop:
        cli.sample()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("plan=nothing",), "plan=nothing: there are none; memorise one with: python -m mlem.multilevel memorise"),
        (
            ("plan=nothing.json",),
            "nothing.json is not a plan; make one with: python -m mlem.multilevel memorise FAMILY",
        ),
        (("coins=systematic",), "coins=systematic shapes a multilevel plan: add budget=, such as budget=0.25"),
        (("per_sample=true",), "per_sample=true shapes a multilevel plan: add budget=, such as budget=0.25"),
        (("cost=flops",), "cost=flops shapes a multilevel plan: add budget=, such as budget=0.25"),
        (("budget=0",), "budget must be in (0, 1], a share of the largest level's cost, got 0"),
        (("budget=2",), "budget must be in (0, 1], a share of the largest level's cost, got 2"),
        (
            ("budget=0.001",),
            "budget=0.001 of 50 evaluations is 0.05 evaluations of the largest level, but ",
        ),
        (("budget=0.5", "mse=0.1"), "give only one of budget, mse and delta, got budget and mse"),
        (("budget=0.5", "levels=[xs,zz]"), "level must be one of xs, s, got 'zz'"),
        (
            ("budget=0.5", "model=unet_xs"),
            "budget= shares work among levels, but model= is a single level; leave it out",
        ),
        (("budget=0.5", "level=s"), "level=s runs one level, budget= several; use one"),
        (("mse=1e-9",), "mse=1e-09: the error of ddim in 50 steps on the log_snr grid alone is "),
        (("plan=best", "coins=nested"), "plan=best is already made: leave out coins="),
        (("plan=best", "levels=[xs,s]"), "plan=best is already made: leave out levels="),
        (("plan=best", "per_sample=true"), "plan=best is already made: leave out per_sample="),
        (("plan=best", "sampler=mlem", "estimator=jump"), "plan=best is already made: leave out estimator="),
        (("plan=best", "sampler=mlem", "mse=0.1"), "plan=best is already made: leave out mse="),
        (("budget=0.5", "coins=dice"), "coins must be one of systematic, bernoulli, nested, poisson, got 'dice'"),
        (("budget=0.5", "estimator=guess"), "estimator must be one of jump, held, hindsight, switch, got 'guess'"),
        (
            ("sampler=heun", "budget=0.5", "cost=flops", "estimator=hindsight"),
            "hindsight needs an mlem solver with one evaluation per step, not heun; use estimator=held",
        ),
        (("probabilities=learned",), "this family of digits has no learned coefficients: python train.py model=coeff"),
        (("budget=0.5", "probabilities=learned"), "this family of digits has no learned coefficients: python train"),
        (("budget=0.5", "probabilities=lerned"), "probabilities must be calibrated, learned, theory or numbers, got"),
        (("budget=0.5", "probabilities=[1,0.5,0.2]"), "probabilities= must be 2 numbers, for xs, s, got 3"),
    ],
    ids=str,
)
def test_bad_choices_get_one_line(
    here: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    options: tuple[str, ...],
    says: str,
) -> None:
    said = refused(monkeypatch, capsys, *options, f"out={out}")
    assert said.startswith("sample.py: ")
    assert says in said
    assert not out.exists()


def test_plans_of_other_steps_or_levels_get_one_line(
    here: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "plan.json"
    for plan, says in (
        (Plan.draw(torch.ones(4, 2)), "the plan has 4 rows, but ddim in 8 steps evaluates 8 times; draw it for these"),
        (
            Plan.draw(torch.ones(8, 3)),
            "the plan is for 3 levels, but the family has 2 (xs, s); draw it for these levels",
        ),
        (Plan.draw(torch.ones(8, 2), levels=("xs", "m")), "level must be one of xs, s, got 'm'"),
    ):
        plan.save(path)
        assert says in refused(monkeypatch, capsys, "steps=8", f"plan={path}", f"out={out}")
    write_json(path, {"format": 0})
    assert "plan.json has format 0, but this version reads 1" in refused(
        monkeypatch, capsys, f"plan={path}", f"out={out}"
    )
    assert not out.exists()


def test_a_family_that_is_not_calibrated_gets_one_line(
    here: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    family = Path(shutil.copytree(here / FAMILY, tmp_path / "family"))
    path = family / "calibration.json"
    plain = read_json(path)
    write_json(path, plain | {"about": plain["about"] | {"weights": "others"}})
    options = (f"family={family}", "budget=0.5", f"out={out}")
    assert "the calibration is for other weights or guidance: python -m" in refused(monkeypatch, capsys, *options)
    path.unlink()
    says = "sample.py: this family of digits is not calibrated: python -m mlem.multilevel calibrate FAMILY\n"
    assert refused(monkeypatch, capsys, *options) == says
    assert multilevel.main(["report", str(family)]) == 2
    assert capsys.readouterr().err == says.replace("sample.py", "mlem.multilevel")
    # numbers need no calibration
    run_here("sample", "trainer=cpu", *options, "budget=0.9", "probabilities=[1,0.5]", "steps=8", "seeds=0")
    assert set(calls(out)) == {"xs", "s"}


@pytest.mark.parametrize("plain", [[], {}, {"format": 1}, {"format": 1, "names": 3}], ids=str)
def test_a_damaged_calibration_gets_one_line(
    here: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, plain: object
) -> None:
    family = Path(shutil.copytree(here / FAMILY, tmp_path / "family"))
    write_json(family / "calibration.json", plain)
    said = refused(monkeypatch, capsys, f"family={family}", "budget=0.5", f"out={out}")
    assert "calibration.json " in said
    assert not out.exists()
    assert multilevel.main(["report", str(family)]) == 2
    assert capsys.readouterr().err == said.replace("sample.py", "mlem.multilevel")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("memorise", "--name", "../../x"), "--name must be letters, digits, or any of _ . + -, got '../../x'"),
        (("memorise", "--name", "a/b"), "--name must be letters, digits, or any of _ . + -, got 'a/b'"),
        (("memorise", "--name", "a.json"), "--name must not end in .json, or plan= would take it for a path, got 'a."),
        (("memorise", "--images", "0"), "images must be >= 1, got 0; the best is chosen by its error on them"),
        (("memorise", "--images", "-1"), "images must be >= 1, got -1; the best is chosen by its error on them"),
        (
            ("memorise", "--solver", "heun", "--estimator", "hindsight"),
            "hindsight needs an mlem solver with one evaluation per step, not heun; use estimator=held",
        ),
        (("calibrate", "--reference-steps", "0"), "reference_steps must be a whole number >= 1, got 0"),
    ],
    ids=str,
)
def test_bad_options_of_the_tool_get_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, options: tuple[str, ...], says: str
) -> None:
    """At once: nothing is measured."""
    monkeypatch.setattr(multilevel, "calibrate", None)
    before = {path: path.read_bytes() for path in FAMILY.rglob("*.json")}
    more = ["--coins", "nested"] if options[0] == "memorise" else []
    assert multilevel.main([options[0], str(FAMILY), *more, *options[1:]]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"mlem.multilevel: {says}")
    assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in FAMILY.rglob("*.json")} == before


def test_a_device_that_is_not_here_gets_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert multilevel.main(["calibrate", str(FAMILY), "--device", "gpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mlem.multilevel: --device gpu cannot be used (")
    assert said.endswith("); use cpu or another device\n")
    assert said.count("\n") == 1


def test_the_tool_runs_as_a_module(here: Path, tmp_path: Path) -> None:
    """And says in one line what folder is no family."""
    done = execute("mlem/multilevel/__main__", "report", str(tmp_path), cwd=here)
    assert done.returncode == 2
    assert done.stderr == (
        f"mlem.multilevel: {tmp_path} holds no family (no family.json); make one with: python train.py model=family\n"
    )
    assert (REPOSITORY / "mlem/multilevel/__main__.py").exists()
