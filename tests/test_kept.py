"""Plans are found once for what is asked, and kept in memory and beside the family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlem.family import Family
from mlem.multilevel import identity
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.kept import MOST, KeptPlans
from mlem.multilevel.plan import Plan
from mlem.sampling import Sampler
from mlem.solvers import GridPoint, make_solver
from tests.problems import level

BUDGET = {"budget": 0.6, "cost": "flops"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated family of two small networks."""
    family = Family([level("xs"), level("s", seed=1)])
    family.fitted = Fitted(calibrate(family, images=2, times=4, batch_sizes=[2]))
    family.save(folder := tmp_path_factory.mktemp("kept") / "family")
    return folder


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The solvers of the plans that were found, not kept."""
    made, found = identity.make_plan, list[str]()

    def counted(spec: Any, family: Any, solver: Any, grid: Any) -> Plan:
        found.append(solver.name)
        return made(spec, family, solver, grid)

    monkeypatch.setattr(identity, "make_plan", counted)
    return found


def planned(family: Family, solver: str = "ddpm", steps: int = 8, grid: str | None = None, **options: Any) -> Plan:
    plan = Sampler(family, solver=solver, steps=steps, grid=grid, plan=family.plan(**BUDGET | options)).plan
    assert plan is not None
    return plan


def test_a_plan_is_found_once(folder: Path, searches: list[str]) -> None:
    """In one process and in the next, which reads it from the folder."""
    family = Family.load(folder)
    first, again = planned(family), planned(family)
    other = planned(Family.load(folder))
    assert searches == ["ddpm"]
    assert first.to_dict() == again.to_dict() == other.to_dict()
    files = list((folder / "found").iterdir())
    assert len(files) == 1
    files[0].write_text(files[0].read_text()[:-20])  # damaged: it is found and written again
    assert planned(Family.load(folder)).to_dict() == first.to_dict()
    assert searches == ["ddpm", "ddpm"]
    assert json.loads(files[0].read_text())


@pytest.mark.parametrize(
    "other",
    [{"solver": "ddim"}, {"steps": 9}, {"budget": 0.7}, {"order": 1}, {"grid": "log_snr"}],
    ids=str,
)
def test_another_question_is_another_plan(folder: Path, searches: list[str], other: dict[str, Any]) -> None:
    family = Family.load(folder)
    planned(family, **{"steps": 10})
    before = len(searches)
    planned(family, **{"steps": 10} | other)
    assert len(searches) == before + 1


def test_solvers_differ_by_what_their_parts_hold(folder: Path) -> None:
    """Numbers, tables, tensors and objects; what holds itself is no endless tale."""
    family, found = Family.load(folder), set[str]()
    parts = [1, 2, [1, 2], torch.ones(2), torch.zeros(2), SimpleNamespace(a=1), SimpleNamespace(a=2)]
    parts[-1].itself = parts[-1]  # type: ignore[union-attr]
    for part in parts:
        solver = make_solver("ddim")
        solver.part = part  # type: ignore[attr-defined]
        points = GridPoint.of(family.schedule, solver.grid(family.schedule, 4))
        found.add(identity.identity(family, solver, points)["settings"])
    assert len(found) == len(parts)


def test_another_calibration_is_another_plan(folder: Path, searches: list[str]) -> None:
    family = Family.load(folder)
    planned(family, steps=7)
    family.fitted = Fitted(calibrate(family, images=2, times=4, batch_sizes=[2], seed=1))
    planned(family, steps=7)
    assert len(searches) == 2


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(folder: Path, searches: list[str]) -> None:
    family = Family.load(folder)
    family.kept = KeptPlans(folder / "family.json")  # below a file no folder can be made
    planned(family, steps=6)
    planned(family, steps=6)
    assert len(searches) == 1


def test_the_oldest_plans_go(tmp_path: Path) -> None:
    kept, plan = KeptPlans(tmp_path), Plan.given(torch.ones(2, 2))

    def asked(number: int, find: Callable[[], Plan] = lambda: plan) -> Plan:
        return kept.plan({"number": number}, find, on_disk=True)

    for number in range(MOST + 3):
        asked(number)
    assert len(list((tmp_path / "found").iterdir())) == MOST
    found: list[int] = []
    for number in (MOST + 2, 0):
        asked(number, lambda number=number: found.append(number) or plan)
    assert found == [0]
