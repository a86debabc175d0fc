"""Rivals in a comparison: what each runs, the file of all of them, the command, and mistakes."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mlem import Family, Plan, Reuse, sample
from mlem.comparison.coupled import Comparison, read_rows
from mlem.comparison.entry import Entry
from mlem.comparison.fastest import Advice, Alternative, Fastest, Measured
from mlem.comparison.figures import rivals_vs_time
from mlem.comparison.handmade import Forecast, Windows
from mlem.comparison.lineup import Lineup
from mlem.comparison.rivals import fastest, recommended
from mlem.comparison.setup import Setup
from mlem.files import read_json
from mlem.multilevel.candidate import Recommendation
from tests.commands import run_here, run_in
from tests.problems import level

SHAPE = (1, 8, 8)
ENTRIES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "fewer steps": ({"levels": ["largest"]}, {"s": 8}),
    "T-Stitch": ({"running": [["smallest", 0.25], ["largest", 0.75]]}, {"xs": 2, "s": 6}),
    "large-small-large": ({"running": [["s", 0.25], ["xs", 0.5], ["s", 0.25]]}, {"xs": 4, "s": 4}),
    "forecast": ({"forecast": {"every": 3, "order": 2}}, {"s": 3}),
    "DeepCache": ({"reuse": {"every": 2, "branch": 1}}, {"s": 8}),
}
"""Rival -> its options, and calls of each level in 8 steps."""
ROWS = (
    Measured("fewer steps", "ddim", "uniform", 8, "", 2e-3, 5e-3, 1e-4, {"m": 8}),
    Measured("fewer steps", "ddim", "uniform", 16, "", 4e-3, 1e-3, 1e-4, {"m": 16}),
    Measured("hindsight", "ddim", "uniform", 16, "budget0.3", 3e-3, 9e-4, 1e-4, {"xs": 18, "m": 4}),
)
ADVICE = Advice(
    text="ddim, 16 steps",
    mse=8e-4,
    interval=(6e-4, 1e-3),
    seconds=3e-3,
    target=1e-3,
    why="1.3 times as fast as m alone",
    options={"solver": "ddim", "steps": 16, "plan": {"estimator": "hindsight", "levels": ["xs", "m"]}},
    alternatives=(Alternative("ddim, 17 steps, m", 9e-4, (8e-4, 1e-3), 4e-3),),
)
FOUND = Fastest({"family": "digits", "caption": "digits, 4 images"}, ROWS, ADVICE, (1e-2, 1e-3))


def entry(rival: str, **options: Any) -> Entry:
    return Entry.from_options({"rival": rival, "solver": "ddim", "steps": [8]} | options, "here", named=True)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Fastest]:
    """Two untrained levels, and every rival that needs no calibration."""
    family = Family([level(size, SHAPE, data="digits") for size in ("xs", "s")])
    comparison = Comparison(family, range(3), tmp_path_factory.mktemp("rivals"), reference_steps=12)
    runs = [run for rival, (own, _) in ENTRIES.items() for run in comparison.runs(entry(rival, **own))]
    comparison.measure(runs)
    return comparison, fastest(comparison, runs, {}, [1e-3, 1e-1], "ode", "family")


def test_each_rival_runs_what_its_paper_says(compared: tuple[Comparison, Fastest]) -> None:
    comparison, found = compared
    assert {row.group: dict(row.calls) for row in found.rows} == {rival: calls for rival, (_, calls) in ENTRIES.items()}
    assert [row.detail for row in found.rows] == [
        "",
        "0.25 smallest + 0.75 largest",
        "0.25 s + 0.5 xs + 0.25 s",
        "every 3, order 2",
        "every 2, branch 1",
    ]
    assert {row.solver for row in found.rows} == {"ddim"}
    assert [row.group for row in found.rows if row.multilevel] == ["T-Stitch", "large-small-large"]
    assert found.recommendation is None
    assert found.targets == (1e-1, 1e-3)
    rows = {row.rival: row for row in comparison.rows}
    top = comparison.family.level().flops
    assert rows["forecast"].flops == 3 * top
    assert rows["DeepCache"].flops < 8 * top == rows["fewer steps"].flops


@pytest.mark.parametrize(
    "own",
    [
        {"level": "xs", "plan": None},
        {"level": "s", "plan": None, "reuse": Reuse(2, 1)},
        {"level": None, "plan": Plan.switching([0, 1, 1, 1], ["xs", "s"]), "reuse": Reuse(3, 1)},
    ],
    ids=["one level", "kept features", "a plan on kept features"],
)
def test_what_is_recommended_runs_as_recommended(compared: tuple[Comparison, Fastest], own: dict[str, Any]) -> None:
    comparison, _ = compared
    own |= {"predicted_mse": 0.1, "interval": (0.05, 0.2), "predicted_seconds": 1e-3}
    choice = Recommendation(solver="unipc", steps=4, grid="uniform", **own)
    [run] = comparison.runs(recommended(choice, 0.1))
    x = comparison.setup.sampler(run).run(range(3)).x
    assert torch.equal(x, sample(comparison.family, indices=range(3), **choice.options).x)


def test_its_rows_name_the_rival_and_others_none(compared: tuple[Comparison, Fastest], tmp_path: Path) -> None:
    comparison, _ = compared
    assert [row.rival for row in read_rows(comparison.path)] == list(ENTRIES)
    first, *_ = comparison.rows
    plain = replace(first, rival="")
    assert plain.to_csv().keys() == first.to_csv().keys() - {"rival"}  # as before there were rivals
    mixed = Comparison(comparison.family, range(3), tmp_path, reference_steps=12)
    mixed.measure(mixed.runs(Entry("ddim", (2,), levels=("xs",))))
    mixed.measure(mixed.runs(replace(entry("fewer steps", levels=["xs"]), steps=(2,))))
    assert [row.rival for row in read_rows(mixed.path)] == ["", "fewer steps"]
    assert [row.to_csv() for row in read_rows(mixed.path)] == [row.to_csv() for row in mixed.rows]


def test_the_small_level_runs_the_first_share_of_the_steps() -> None:
    family = Family([level(size, SHAPE) for size in ("xs", "s")])
    for share, first in ((0.25, 2), (0.5, 5), (0.75, 8)):
        plan = Windows((("smallest", share), ("s", 1 - share))).plan(family, 10)
        assert plan.fingerprint() == Plan.switching([0] * first + [1] * (10 - first), ["xs", "s"]).fingerprint()
    middle = Windows((("s", 0.2), ("xs", 0.3), ("s", 0.5))).plan(family, 10)
    assert middle.counts is not None
    assert middle.counts[:, 1].tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1, 1]
    assert Windows((("s", 1.0),)).plan(family, 3).levels == ("s",)
    assert Forecast(4, 0).plan(family, 9).counts.flatten().tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 1]  # type: ignore[union-attr]


def test_in_a_lineup_they_stand_beside_levels_alone() -> None:
    family = Family([level(size, SHAPE) for size in ("xs", "s")])
    options = [{}, {"running": [["xs", 0.5], ["s", 0.5]]}, {"forecast": {"every": 2}}]
    entries = [Entry.from_options({"solver": "ddim", "steps": [4]} | own, "here") for own in options]
    lineup = Lineup(Setup(family, [[0, 1]], reference_steps=8), entries)
    lineup.add([0, 1])
    *alone, windows, forecast = lineup.rows()
    assert [row.level for row in alone] == ["xs", "s"]
    assert [row.sampler for row in (windows, forecast)] == [
        "ddim_windows_0.5-xs-0.5-s",
        "ddim_forecast_every-2_order-1",
    ]
    assert [dict(row.calls) for row in (windows, forecast)] == [{"xs": 2, "s": 2}, {"s": 2}]
    assert all(row.mse > 0 for row in (windows, forecast))
    assert not Lineup(Setup(Family(family.levels[:1]), [[0, 1]]), entries[1:]).tallies


def test_the_file_comes_back_as_it_was(tmp_path: Path) -> None:
    for number, found in enumerate((FOUND, replace(FOUND, recommendation=None))):
        found.save(path := tmp_path / f"{number}.json")
        assert Fastest.load(path) == found
    plain = read_json(tmp_path / "0.json")
    assert plain["recommendation"]["alternatives"][0]["interval"] == [8e-4, 1e-3]
    path.write_text(path.read_text().replace('"solver": "ddim"', '"solver": "ddpm"', 1))
    with pytest.raises(ValueError, match="differs from its checksum"):
        Fastest.load(path)
    path.write_text('{"format": 1, "rows": []}')
    with pytest.raises(
        ValueError, match=r"is damaged \(no 'recommendation'\); measure it again: python sample.py eval="
    ):
        Fastest.load(path)


def test_the_fastest_row_of_an_error() -> None:
    assert FOUND.groups == ["fewer steps", "hindsight"]
    assert FOUND.best(1e-2) is ROWS[0]
    assert FOUND.best(1e-3) is ROWS[2]
    assert FOUND.best(1e-3, ["fewer steps"]) is ROWS[1]
    assert FOUND.best(1e-4) is None


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    rivals_vs_time(FOUND, tmp_path / "fastest.png")
    assert (tmp_path / "fastest.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"rivals_vs_time has nothing to draw: no rows with .* in \(0, 0.1\]"):
        rivals_vs_time(replace(FOUND, rows=(replace(ROWS[0], mse=0.2),)), tmp_path / "none.png")


COMMAND = (
    "eval=rivals",
    "family=runs/digits/family",
    "root=runs/digits",
    "trainer=cpu",
    "seeds=0-3",
    "batch_size=4",
    "eval.reference_steps=12",
    "eval.targets=[1.0,1e-9]",
    "eval.check=2",
    "eval.samplers=[{rival: fewer steps, solver: dpm_solver_pp, steps: [4, 8], levels: [largest]},"
    "{rival: forecast, solver: dpm_solver_pp, steps: [8], forecast: {every: 2}},"
    "{rival: hindsight, solver: dpm_solver_pp, steps: [8], plan: {budget: 0.7, cost: flops}},"
    "{rival: DeepCache, solver: parallel_midpoint, steps: [8], reuse: {every: 2}}]",
)


def test_the_command_writes_rows_figure_and_recommendation(made: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(made[0] / "runs/digits/family", tmp_path / "runs/digits/family")
    printed = run_in(tmp_path, lambda: run_here("sample", *COMMAND))
    folder = tmp_path / "runs/digits/fastest"
    found = Fastest.load(folder / "fastest.json")
    assert found.groups == ["fewer steps", "forecast", "hindsight", "recommended"]
    assert found.targets == (1.0, 1e-9)
    assert found.recommendation is not None
    assert found.recommendation.target == 1.0
    assert found.recommendation.interval[0] < found.recommendation.mse < found.recommendation.interval[1]
    assert (folder / "fastest.png").exists()
    assert not (folder / "summary.json").exists()  # whose ratios are of eval=benchmark
    assert f"recommended: {found.recommendation.text}" in printed
    assert "measured on 2 images" in printed
    assert "left out: the recommendation for 1e-09: mse=1e-09: nothing surely reaches it" in printed
    assert "left out: DeepCache, every 2, branch 2, parallel_midpoint: " in printed
    rows = (folder / "runs.csv").read_text()
    again = run_in(tmp_path, lambda: run_here("sample", *COMMAND))
    assert f"recommended: {found.recommendation.text}" in again
    assert (folder / "runs.csv").read_text() == rows  # nothing was measured again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"running": [["xs", 0.5]]}, "the shares of running must be above 0 and add up to 1, got [0.5]"),
        ({"running": [["xs", 1.5], ["s", -0.5]]}, "the shares of running must be above 0 and add up to 1, got [1.5, "),
        ({"running": "xs"}, "running must be a list of [level, share], got xs"),
        ({"running": [["xs", "half"]]}, "running must be a list of [level, share], such as [xs, 0.5], got ['xs', 'ha"),
        ({"forecast": {"order": 1}}, "forecast must be {every: n}, optionally with order: n, got {'order': 1}"),
        ({"forecast": {"every": 0}}, "every of forecast must be a whole number >= 1, got 0"),
        ({"forecast": {"every": 2, "order": 3}}, "order of forecast must be one of 0, 1, 2, got 3"),
        (
            {"forecast": {"every": 2}, "plan": {"budget": 0.5}},
            "each of plan and forecast says what runs; use only one",
        ),
    ],
    ids=str,
)
def test_mistakes_get_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^here: {re.escape(message)}"):
        entry("a rival", **options)


def test_a_level_that_there_is_not_is_named() -> None:
    setup = Setup(Family([level("xs", SHAPE)]), [[0]])
    with pytest.raises(ValueError, match="level must be one of xs, got 'large'"):
        setup.runs(entry("T-Stitch", running=[["large", 1.0]]))
    with pytest.raises(ValueError, match=r"parallel_midpoint evaluates many times at once, but a plan once per row"):
        setup.runs(replace(entry("forecast", forecast={"every": 2}), solver="parallel_midpoint"))
