"""benchmarks/gpu.py in its small form: all pieces on a CPU, cut and gone on with; CUDA graphs by their buffers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu
import gpu_figures
import gpu_pieces
import pytest
import torch
from gpu_modes import Graphs, Mode, running
from gpu_rows import Clock, Job, OutOfTime, Rows
from gpu_samplers import LARGE

from mlem.cli.main import job_of
from mlem.cli.schema import Networks, Train
from mlem.networks import SIZES
from mlem.provenance import machine, processor, provenance
from mlem.sampling import Sampler
from tests.problems import level


def small(folder: Path, *options: str) -> int:
    return gpu.main(["--small", "--out", str(folder), "--root", str(folder / "root"), *options])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "gpu.json").read_text())["rows"]


def test_all_pieces_after_two_cuts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small(tmp_path, "--minutes", "0") == gpu.MORE_TO_DO
    assert "time is up" in capsys.readouterr().out
    (first,) = rows_of(tmp_path)  # what is first is always measured

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gpu_pieces, "_reference", killed)
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path)
    cut = rows_of(tmp_path)
    assert cut[0] == first
    assert {row["piece"] for row in cut} == {"levels", "training", "folder", "family"}

    assert small(tmp_path) == 0
    found = rows_of(tmp_path)
    assert found[: len(cut)] == cut
    keys = [(row["piece"], *row["key"]) for row in found]
    assert len(set(keys)) == len(keys)
    assert not [row for row in found if "failed" in row]
    pieces = {"reference", "errors", "seconds", "equal error", "parallel", "fid"}
    assert {row["piece"] for row in found[len(cut) :]} == pieces
    check_values({(row["piece"], *row["key"]): row for row in found})
    assert {row["commit"] for row in found} == {provenance()["commit"]}
    about = json.loads((tmp_path / "gpu.json").read_text())["about"]
    assert about["machine"]["processor"] == processor() == machine()["processor"]
    for name in ("levels", "error_SDE_bf16_graphs", "error_ODE_bf16_graphs", "fid", "parallel"):
        assert (tmp_path / f"gpu_{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="holds other measurements"):
        small(tmp_path, "--experiment", "celeba64")


def check_values(found: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    mode = "bf16, graphs"
    assert len(found["levels", mode, 2]["seconds"]) == 2
    assert found["training", "fp32", "xs"]["images_per_second"]["median"] > 0
    top = found["seconds", mode, 2, "ddpm", "", 8]["flops"] / 8
    plan = found["seconds", mode, 2, "hindsight ddpm", "budget0.5_flops", 8]
    assert plan["flops"] <= 0.5 * 8 * top
    assert 0 < plan["outside_percent"] < 100
    # errors of one level alone are those of every batch and mode of this precision
    few, many = (found["errors", "bf16", 0, "ddpm", "", steps]["mse"] for steps in (4, 8))
    assert found["reference", "ddpm"]["bf16_mse"] < many < few
    assert found["fid", mode, 2, "ddpm", "", 4]["scores"].keys() == {"fid_random256@2"}
    solvers = {one["solver"]: one["mse"] for one in found["parallel", mode, 1]["solvers"]}
    assert max(solvers.values()) == solvers["parallel_midpoint"]


def test_without_a_gpu_there_is_the_small_form_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--small"):
        gpu.main(["--out", str(tmp_path)])


def test_graphs_copy_in_and_out() -> None:
    calls: list[int] = []

    def network(x: torch.Tensor, time: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return 2 * x + time[:, None] + shift

    graphs = Graphs(network)
    given = {n: [torch.randn(n, 3), torch.rand(n), torch.randn(n, 3)] for n in (2, 4)}
    outputs = {n: graphs(x, t, shift=s) for n, (x, t, s) in given.items()}
    again = graphs(given[2][0] + 1, given[2][1], shift=given[2][2])
    for n, (x, t, s) in given.items():
        assert torch.equal(outputs[n], network(x, t, s))
    assert torch.equal(again, network(given[2][0] + 1, *given[2][1:]))


@pytest.mark.parametrize("mode", [Mode("bf16", graphs=True), Mode(graphs=True)])
def test_samples_are_those_without_graphs(mode: Mode) -> None:
    one = level("xs", data="noise")
    sampler = Sampler(one, solver="dpm_solver_pp", steps=4, precision=mode.precision)
    plain = sampler.run(range(2)).x
    with running([one], mode):
        assert isinstance(vars(one.network)["forward"], Graphs)
        assert torch.equal(sampler.run(range(2)).x, plain)
    assert "forward" not in vars(one.network)


def test_a_row_that_fails_is_kept_and_the_next_is_measured(tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("out of memory\nand more")

    jobs = [Job("levels", (1,), fails), Job("levels", (2,), lambda: {"seconds": 1.0})]
    rows = Rows(tmp_path / "gpu.json", {})
    rows.measure(jobs, Clock(None))
    assert [row["failed"] for row in rows.failed] == ["RuntimeError: out of memory"]
    again = Rows(tmp_path / "gpu.json", {})
    again.measure(jobs, Clock(0))  # nothing is left to do
    assert again.rows == rows.rows
    assert [row["key"] for row in again.of("levels")] == [[2]]


def test_what_takes_longer_than_there_is_time_is_not_begun(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "gpu.json", {})
    rows.rows = [{"piece": "fid", "key": [0], "took": 90.0}]
    jobs = [Job("errors", (1,), dict), Job("fid", (1,), dict)]
    with pytest.raises(OutOfTime):
        rows.measure(jobs, Clock(1))
    assert rows.find("errors", (1,)) is not None
    rows.measure(jobs, Clock(2))
    assert rows.find("fid", (1,)) is not None


def test_the_training_is_that_of_the_experiment() -> None:
    job = job_of("train", gpu.training_options("dead_leaves64"))
    assert isinstance(job, Train)
    assert isinstance(job.model, Networks)
    assert (*job.model.levels,) == LARGE.levels == (*SIZES,)
    assert (job.data.options["size"], job.trainer.accelerator, job.training.steps) == (64, "gpu", 20000)


@pytest.mark.parametrize(("body", "expected"), [("sleep 30 & wait", OutOfTime), ("exit 2", SystemExit)])
def test_a_training_ends_in_its_time_and_says_when_it_fails(
    body: str, expected: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/sh\ntrap 'echo \"$2\" > {tmp_path}/saved; kill $!; exit 143' TERM\n{body}\n")
    stub.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(stub))
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    monkeypatch.setattr(gpu, "SAVING", 0.1)
    with pytest.raises(expected):
        gpu.train("dead_leaves64", Clock(0))
    assert (tmp_path / "saved").exists() == (expected is OutOfTime)


def test_advantages(tmp_path: Path) -> None:
    """Levels together that cost half at every error: a ratio of 2; in another mode, with other plans, of 1."""
    rows = Rows(tmp_path / "gpu.json", {})
    settings = [("bf16", "", 2.0, 1.0), ("bf16", "budget0.5", 1.0, 1.0), ("bf16, graphs", "budget0.5", 1.0, 2.0)]
    for steps in (4, 8, 16):
        for mode, target, cost, error in settings:
            name = ["hindsight ddpm" if target else "ddpm", target, steps]
            errors = {"mse": error / steps, "images": [0.9 * error / steps, 1.1 * error / steps], "reference": "ddpm"}
            rows.rows.append({"piece": "errors", "key": [mode, 64 if target else 0, *name], **errors})
            costs = {"seconds": {"median": cost * steps}, "outside_percent": 1.0, "flops": 3 * cost * steps}
            modes = (mode,) if target else ("bf16", "bf16, graphs")
            rows.rows += [{"piece": "seconds", "key": [one, 64, *name], **costs} for one in modes]
    table = gpu_figures.advantages(rows)
    assert {(one["batch"], one["kind"], one["sampler"]) for one in table} == {(64, "SDE", "hindsight ddpm")}
    assert [one["mode"] for one in table] == 3 * ["bf16"] + 3 * ["bf16, graphs"]
    for one in table:
        for cost in ("time", "flops"):
            assert one[cost]["ratio"] == pytest.approx(2 if one["mode"] == "bf16" else 1)
