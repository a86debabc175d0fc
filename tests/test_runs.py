"""Listing runs: states, numbers, and thousands of files."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from mlem.files import folder_lock, read_json
from mlem.runs import Run, main, read_run, runs


@pytest.fixture
def unet(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run of level s."""
    return Path(shutil.copytree(trained / "runs/tiny/unet_s", tmp_path / "runs/tiny/unet_s"))


def test_the_runs_of_a_family_are_listed(trained: Path) -> None:
    found = runs(trained / "runs")
    assert [Path(run.path).name for run in found] == ["unet_s", "unet_xs"]
    for run in found:
        measured = read_json(Path(run.path) / "level/mlem.json")["measured"]
        assert (run.state, run.step, run.steps) == ("finished", 4, 4)
        assert run.error is not None
        assert run.error <= measured["error"]
        rows = read_json(Path(run.path) / "evaluation/evaluation.json")["rows"]
        assert run.fid == min(row["fid_random256@5"] for row in rows)
        assert run.fid_name is not None
        assert run.fid_name.endswith(" fid_random256@5")
        files = [path for path in Path(run.path).rglob("*") if path.is_file()]
        assert run.bytes >= sum(path.stat().st_size for path in files)
        assert run.changed == max(path.lstat().st_mtime for path in files)


@pytest.mark.parametrize("name", ["fid_inception-0a1b2c3d@5", "fd_dinov2-l-0a1b2c3d@5"])
def test_distances_are_those_of_any_features(unet: Path, name: str) -> None:
    with open(unet / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"step": 4, f"eval/s/ddpm@2/{name}": 0.5, f"eval/s/ddpm@2/{name}_std": 0.25}) + "\n")
    run = read_run(unet)
    assert (run.fid, run.fid_name) == (0.5, f"s/ddpm@2 {name}")


def test_a_run_without_a_result_is_interrupted_or_training(unet: Path) -> None:
    shutil.rmtree(unet / "level")
    assert read_run(unet).state == "interrupted"
    with folder_lock(unet):
        assert read_run(unet).state == "training"
    assert read_run(unet).state == "interrupted"


def test_half_a_line_and_damaged_settings_stop_nothing(unet: Path) -> None:
    before = read_run(unet)
    with open(unet / "metrics.jsonl", "a") as file:
        file.write('7\n{"step": 99, "val/er')
    with open(unet / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe")
    (unet / "settings.json").write_text("{")
    after = read_run(unet)
    assert (after.step, after.error, after.fid) == (before.step, before.error, before.fid)
    assert after.steps is None


def test_a_run_that_logged_nothing_yet(tmp_path: Path) -> None:
    folder = tmp_path / "unet_m"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "settings.json").write_text('{"model": {"updates": 7}}')
    run = read_run(folder)
    assert run == Run(str(folder), "interrupted", 0, 7, None, None, None, run.bytes, run.changed)


def test_as_a_table_and_as_json(unet: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    root = unet.parents[1]
    assert main([str(root)]) == 0
    printed = capsys.readouterr().out
    for text in ("tiny/unet_s", "finished", "4 of 4", "fid_random256@5"):
        assert text in printed
    assert main([str(root), "--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert Run(**line) == read_run(unet)
    assert main([str(unet / "level")]) == 0
    assert "no runs" in capsys.readouterr().out
    assert main([str(root / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_thousands_of_files_are_no_burden(unet: Path) -> None:
    for folder in ("evaluation/many", "../samples/ddpm_200"):
        (unet / folder).mkdir(parents=True)
        for number in range(3000):
            (unet / folder / f"{number:08d}.png").touch()
    (unet / "../samples/ddpm_200/settings.json").write_text("{}")
    begin = time.process_time()
    assert len(runs(unet.parents[1])) == 1
    assert time.process_time() - begin < 2
