"""`python sample.py sampler=...` and the evaluation for the midpoint solvers: options, ranks, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlem.comparison.entry import Entry
from mlem.data import Shards, held_out_batches
from mlem.family import Family
from mlem.outputs import read_png
from mlem.training.denoising import FamilyModule
from tests import evaluating
from tests.commands import run_here, succeed

RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
PARALLEL = ["root=runs/tiny", "sampler=parallel_midpoint", "steps=3", "sampler.options.midpoints=4"]
PARALLEL += ["sampler.options.window=8", "seeds=0-2", "batch_size=2"]


@pytest.fixture
def here(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the folder with the trained family."""
    monkeypatch.chdir(trained)
    return trained


@pytest.mark.parametrize(
    "options",
    [
        ["sampler=randomized_midpoint", "sampler.options.clock=ou"],
        ["sampler=randomized_midpoint", "sampler.options.midpoints=shared"],
        ["sampler=randomized_midpoint_sde"],
        ["sampler=predictor_corrector", "sampler.options.lipschitz=estimate"],
        ["sampler=predictor_corrector", "sampler.options.predictor=parallel_midpoint"],
    ],
)
def test_samplers_make_pictures(here: Path, tmp_path: Path, capfd: pytest.CaptureFixture, options: list[str]) -> None:
    out = tmp_path / "out"
    run_here("sample", "root=runs/tiny", "trainer=cpu", "steps=4", "seeds=0-2", f"out={out}", *options)
    assert len(list(out.glob("0*.png"))) == 3
    printed = capfd.readouterr().out
    assert ("Lipschitz constant of the score, estimated on level s: " in printed) == (options[-1].endswith("estimate"))
    settings = json.loads((out / "settings.json").read_text())
    key, _, value = options[-1].removeprefix("sampler.options.").partition("=")
    if key != "sampler":
        assert settings["options"][key] == value


def test_a_batch_spread_over_two_ranks_is_the_batch(trained: Path, tmp_path: Path) -> None:
    """All ranks share every call: the same pictures, each written once, the calls shared out."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    succeed("sample", *PARALLEL, "trainer=cpu", f"out={alone}", cwd=trained)
    printed = succeed("sample", *PARALLEL, "sampler.over=ranks", f"out={shared}", *RANKS, cwd=trained)
    for path in sorted(alone.glob("0*.png")):
        difference = read_png(path) - read_png(shared / path.name)
        assert difference.abs().max() <= 2 / 255  # a level rounds otherwise in a batch of another size
    assert len(list(shared.glob("0*.png"))) == 3
    costs = [json.loads((folder / "ledger.json").read_text()) for folder in (alone, shared)]
    assert costs[0]["images"] == costs[1]["images"] == 3
    assert costs[1]["rounds"] == pytest.approx(costs[0]["rounds"], rel=0.2)
    assert costs[1]["levels"]["s"]["calls"] == pytest.approx(costs[0]["levels"]["s"]["calls"], rel=0.2)
    assert printed.count("3 images computed, level s") == 1
    again = succeed("sample", *PARALLEL, "sampler.over=ranks", f"out={shared}", *RANKS, cwd=trained)
    assert "nothing to do" in again


@pytest.mark.filterwarnings("ignore::mlem.metrics.FewImagesWarning")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # Lightning's use of torch
def test_the_evaluation_runs_them(trained: Path, tmp_path: Path) -> None:
    """Rounds beside calls; a sampler that follows the law alone has no error, and does not spoil the figures."""
    shards = Shards.open(trained / "data" / "digits")
    evaluation = evaluating.make(tmp_path, shards)
    evaluation.samplers = (
        Entry("randomized_midpoint", (2,), options={"clock": "ou"}),
        Entry("parallel_midpoint", (2,), options={"midpoints": 4, "rounds": 2}),
        Entry("predictor_corrector", (3,)),
    )
    loader = held_out_batches(shards, shards.split(16)[1], 8, 0, 1)
    runner = evaluating.trainer(tmp_path, [evaluation])
    runner.test(FamilyModule(Family.load(trained / "runs/tiny/family"), 0), dataloaders=loader, verbose=False)
    own, parallel, law = evaluation.rows[-3:]
    assert own.sampler == "randomized_midpoint_clock-ou"
    assert own.evaluations == own.rounds == 4
    assert parallel.rounds < parallel.evaluations <= 2 * (1 + 2 * 4)
    assert own.mse > 0
    assert parallel.mse > 0
    assert law.to_json()["mse"] is None
    assert law.scores["fid_random256@7"] > 0
    for name in ("error_vs_time", "quality_vs_evaluations"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_options_change_the_settings(here: Path, tmp_path: Path) -> None:
    """Samples of other options are refused beside these."""
    out = [
        "root=runs/tiny",
        "trainer=cpu",
        "seeds=0",
        f"out={tmp_path / 'out'}",
        "sampler=randomized_midpoint",
        "steps=2",
    ]
    run_here("sample", *out)
    with pytest.raises(ValueError, match="holds samples made with other settings"):
        run_here("sample", *out, "sampler.options.clock=ou")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["sampler=randomized_midpoint", "sampler.options.clock=sun"],
            "sampler.options: clock must be one of kappa, ou",
        ),
        (
            ["sampler=parallel_midpoint", "sampler.options.rounds=0"],
            "sampler.options: rounds must be a whole number >= 1",
        ),
        (["sampler=parallel_midpoint", "sampler.options.window=4"], "window must hold whole blocks of midpoints=8"),
        (["sampler=predictor_corrector", "sampler.options.friction=0"], "friction of the corrector must be a positive"),
        (["sampler=parallel_midpoint", "budget=0.3"], "parallel_midpoint evaluates many times at once"),
        (["sampler=predictor_corrector", "sampler.options.lipschitz=much"], "lipschitz must be a positive number or a"),
        (["sampler=ddim", "+sampler.options.clock=ou"], "sampler.options: ddim has no option 'clock'; it has none"),
    ],
)
def test_bad_options_leave_nothing_behind(here: Path, tmp_path: Path, options: list[str], says: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        run_here("sample", "root=runs/tiny", "trainer=cpu", "seeds=0-1", f"out={tmp_path / 'out'}", *options)
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()
