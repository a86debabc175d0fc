"""`sampler=auto`: what is recommended is sampled, and what does not go with it is refused in one line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mlem import Family
from mlem.files import read_json
from mlem.multilevel import pilot as pilot_module
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.correction import REUSES
from mlem.multilevel.fitted import Fitted
from tests.commands import run_here, run_in
from tests.few_pilots import FEW
from tests.problems import level


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "sampler=auto needs one target: mse=, such as mse=1e-3, or seconds=, per image"),
        (["mse=1e-3", "seconds=1"], "sampler=auto needs one target: "),
        (["mse=1e-3", "steps=4"], "sampler=auto chooses steps itself; leave out steps=4"),
        (["mse=1e-3", "budget=0.3"], "sampler=auto chooses budget itself; leave out budget=0.3"),
        (["mse=1e-3", "level=xs"], "sampler=auto chooses level itself; leave out level=xs"),
        (["mse=1e-3", "+sampler.options.order=2"], "sampler=auto has only the options kind and check; leave out order"),
        (
            ["mse=1e-3", "sampler.options.check=1"],
            "sampler.options.check must be a number of images from 2 to 1000000000, or 0 for none, got 1",
        ),
        (["mse=1e-3"], "this family of digits is not calibrated: "),
        (["sampler=ddim", "seconds=1"], "seconds=1 is a target of sampler=auto: add it, or use budget="),
    ],
    ids=str,
)
def test_mistakes_of_sampler_auto_get_one_line(options: list[str], says: str, tmp_path: Path) -> None:
    Family([level("xs", data="digits"), level("s", data="digits")]).save(tmp_path / "family")
    with pytest.raises(ValueError, match="^" + re.escape(says)):
        run_here("sample", f"family={tmp_path}/family", f"root={tmp_path}", "sampler=auto", *options)


def test_sampler_auto_reuses_features_where_that_is_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a folder of such images is no folder of others."""
    Family([level("xs", data="digits"), level("s", data="digits", seed=1)]).save(tmp_path / "family")
    of = Family.load(tmp_path / "family")
    monkeypatch.setattr(pilot_module, "discretisations", lambda: [("unipc", "uniform")])  # for speed
    monkeypatch.setattr(pilot_module, "PILOTS", (("unipc", "uniform", (12,), 1),))
    monkeypatch.setattr(pilot_module, "PAYS", 0.0)  # whatever the times, all kinds of reuse
    known = pilot_module.pilot(of, calibrate(of, images=2, times=4, batch_sizes=(2,)), images=2, reference_steps=40)
    times = {"seconds": {2: (1.0, 20.0)}, "outside": {2: {"ode": 0.0, "sde": 0.0}}, "shallow": {2: {1: 0.1}}}
    of.fitted = Fitted(replace(known, **times))
    of.save_fitted(tmp_path / "family")
    target = 1.5 * max(known.discretisation[f"unipc/uniform/{reuse}"][16] for reuse in REUSES)
    asked = ["sampler=auto", f"mse={target}", "seeds=0-1", "batch_size=2", f"root={tmp_path}", "out=pictures"]
    printed = run_in(tmp_path, lambda: run_here("sample", f"family={tmp_path}/family", *asked))
    assert "features reused (every" in printed.splitlines()[0]
    assert "every" in read_json(tmp_path / "pictures" / "settings.json")["reuse"]
    of.fitted = Fitted(replace(known, **times | {"shallow": {2: {1: 20.0}}}))
    of.save_fitted(tmp_path / "family")
    with pytest.raises(ValueError, match=r"holds samples made with other settings \(.*reuse"):
        run_in(tmp_path, lambda: run_here("sample", f"family={tmp_path}/family", *asked))


def test_sampler_auto_samples_what_is_recommended(tmp_path: Path) -> None:
    """A calibrated family, from the command line: the recommendation in words, and the images."""
    with pytest.MonkeyPatch.context() as patch:
        of = Family([level("xs", data="digits"), level("s", data="digits", seed=1)])
        of.save(tmp_path / "family")
        of = Family.load(tmp_path / "family")
        calibration = calibrate(of, images=2, times=4, batch_sizes=(2,))
        few = FEW | {"discretisations": lambda: [("dpm_solver_pp", "log_snr")]}  # for speed
        for name, value in few.items():
            patch.setattr(pilot_module, name, value)
        of.fitted = Fitted(pilot_module.pilot(of, calibration, images=2, reference_steps=100))
        of.save_fitted(tmp_path / "family")
        asked = ["sampler=auto", "mse=10", "seeds=0-1", "batch_size=2"]
        printed = run_in(tmp_path, lambda: run_here("sample", f"family={tmp_path}/family", f"root={tmp_path}", *asked))
    lines = printed.splitlines()
    assert lines[0].startswith("recommended: dpm_solver_pp, ")
    assert "expected" in lines[2]
    steps = lines[0].split(", ")[1].split()[0]
    assert sorted(path.name for path in (tmp_path / "samples" / f"auto_{steps}").glob("0*.png")) == [
        "00000000.png",
        "00000001.png",
    ]
