"""The small version of `benchmarks/faults.py`: kills and damage at random, from a fixed seed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faults_damage import GOOD, damages

from mlem.multilevel.command import main as multilevel
from tests.commands import REPOSITORY, execute_code, run_here, run_in

SAMPLES = ("root=runs/tiny", "trainer=cpu", "level=xs", "steps=2", "seeds=0-7", "out=samples")


@pytest.fixture(scope="module")
def whole(made: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that is damaged: data, runs/tiny with a calibrated family and a plan, and samples."""
    folder = tmp_path_factory.mktemp("faults")
    shutil.copytree(made[0] / "data", folder / "data")
    shutil.copytree(made[0] / "runs/digits", folder / "runs/tiny")
    words = ("--steps", "8", "--draws", "2", "--images", "2", "--reference-steps", "8", "--budget", "0.6")
    assert multilevel(["memorise", str(folder / "runs/tiny/family"), *words]) == 0
    run_in(folder, lambda: run_here("sample", *SAMPLES))
    return folder


def test_damage_is_named_or_harmless(whole: Path) -> None:
    outcomes = [*damages(whole, flips=44, cuts=22, seed=5)]
    assert len(outcomes) == 66
    assert [one for one in outcomes if one[1] not in GOOD] == []
    assert {outcome for _, outcome, _ in outcomes} == {"named", "harmless"}


def test_what_was_killed_ends_as_if_it_had_not_been(whole: Path, tmp_path: Path) -> None:
    """In a process of its own, which forks the commands."""
    code = f"""
    import sys
    from pathlib import Path
    sys.path.insert(0, {str(REPOSITORY / "benchmarks")!r})
    from faults_kills import kills
    for outcome in kills(Path(sys.argv[1]), Path(sys.argv[2]), 2, 0, ("preparing", "sampling")):
        print(*outcome)
    """
    done = execute_code(code, str(whole), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["preparing", "equal"], ["sampling", "equal"]]
