"""The benchmarks of randomized midpoints in their quick form: slopes in range, claims in the file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import midpoints, mixtures, orders, parallel
from mlem.family import Family
from mlem.files import read_json
from tests.problems import level


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(module.__file__), *map(str, arguments)])
    module.main()


def test_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(orders, monkeypatch, "--quick", "--out", tmp_path)
    tables = read_json(tmp_path / "orders.json")
    rms = {(row["label"], row["grid"]): row for row in tables["root mean square"]}
    for label, low, high in (("DDIM", 0.9, 1.1), ("Heun", 1.8, 2.2), ("DPM-Solver++ 2M", 1.8, 2.2)):
        assert low < rms[label, "t"]["slope"] < high
    kappa, ou = (f"randomized midpoint, {clock}" for clock in ("kappa", "OU"))
    assert rms[kappa, "t"]["slope"] >= 1.4
    # at equal evaluations: below DDIM, and the OU form far above it
    assert rms[kappa, "t"]["error"][-1] < rms["DDIM", "t"]["error"][-1]
    assert rms[ou, "t"]["error"][-1] > 3 * rms[kappa, "t"]["error"][-1]
    mean = {(row["label"], row["grid"]): row for row in tables["of the mean"]}
    low, high = mean[kappa, "t"]["interval"]
    assert low < mean[kappa, "t"]["slope"] < high
    assert high >= 1.8
    for row in tables["root mean square"] + tables["strong"]:
        assert row["interval"][0] <= row["slope"] <= row["interval"][1]


@pytest.mark.usefixtures("float64")
def test_midpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(midpoints, monkeypatch, "--quick", "--out", tmp_path, "--only", "parallel")
    run(midpoints, monkeypatch, "--quick", "--out", tmp_path, "--only", "corrector")
    found = read_json(tmp_path / "midpoints.json")
    for row in found["parallel"]["rows"]:
        assert row["parallel_midpoint"]["error"] <= midpoints.ERROR
        assert 4 * row["parallel_midpoint"]["rounds"] < row["ddim"]["steps"]
    # DDIM's error is that of each coordinate times sqrt(d)
    assert 0.4 < found["parallel"]["fits"]["power, ddim"]["b"] < 0.6
    assert found["parallel"]["fits"]["power"]["b"] < 0.2
    for row in found["corrector"]["rows"]:
        assert row["evaluations"] <= row["asked"]
        assert row["evaluations"] >= row["asked"] - 6
    cells = [cell for cell in found["corrector"]["claims"] if (cell["distance"], cell["d"]) == ("to the ODE", 16)]
    assert [cell["grids"] for cell in cells] == ["best", "common"]
    assert all(cell["ratio"] < 1 for cell in cells)


@pytest.mark.usefixtures("float64")
def test_exact_samples_are_as_near_the_law_as_they_can_be() -> None:
    """The mean of the squared distance falls as 1/N, and the quantiles of a Gaussian alone are those of the normal."""
    problem = mixtures.Problem(2, distance=0.0, deviation=1.0)
    squares = {
        count: sum(
            mixtures.distance(problem.slices(problem.exact(count, seed)), problem.quantiles(count)) ** 2
            for seed in range(10)
        )
        for count in (200, 3200)
    }
    assert 8 < squares[200] / squares[3200] < 32
    assert problem.quantiles(3)[:, 0].tolist() == pytest.approx([-0.967422, 0.0, 0.967422], abs=1e-4)


def test_parallel_on_an_untrained_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Family([level("xs", data="noise")]).save(tmp_path / "family")
    few = ["--batches", 1, 2, "--rounds", 2, "--blocks", 4, "--midpoints", 4, "--reference", 60, "--device", "cpu"]
    run(parallel, monkeypatch, tmp_path / "family", *few, "--most", 40, "--out", tmp_path / "parallel.json")
    rows = read_json(tmp_path / "parallel.json")["rows"]
    ours = [row for row in rows if row["solver"] == "parallel_midpoint"]
    assert [row["batch"] for row in ours] == [1, 2]
    assert len(rows) > 2
    for row in rows:
        assert row["mse"] <= ours[0]["mse"]
        assert row["ratio"]["lowest"] <= row["ratio"]["median"] <= row["ratio"]["highest"]
    assert all(row["rounds"] < row["calls"] for row in ours)


@pytest.mark.usefixtures("float64")
def test_modes_far_apart_are_told_apart() -> None:
    """The share of exact samples nearest to a mean is its weight: 4 standard errors."""
    for d in (2, 16):
        problem = mixtures.Problem(d, distance=3.0, deviation=0.2, apart=1.0)
        assert problem.weights(problem.exact(20_000, 0)).abs().max() < 4
