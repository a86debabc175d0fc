"""The notebooks of examples/: every cell runs, in order. The one that needs a trained family runs in test_demo.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib import pyplot

from mlem import Family

EXAMPLES = Path(__file__).parents[1] / "examples"


def cells(name: str) -> list[dict[str, Any]]:
    """The cells of code."""
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(name: str, training: int = 0) -> dict[str, Any]:
    """Run all cells in one namespace, with fewer steps of training; return what they defined."""
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for cell in cells(name):
            source = "".join(cell["source"]).replace("steps: int = 800", f"steps: int = {training}")
            exec(compile(source, name, "exec"), names)
    pyplot.close("all")
    return names


def test_a_family_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    names = execute("bring_your_own_family", training=40)
    assert capsys.readouterr().out.count("\n") == 6
    modules = {level.name: level.network for level in names["family"].levels}
    assert Family.load("spiral", networks=modules).fitted.has("calibration")


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.ipynb")))
def test_what_stands_in_a_notebook_was_run_from_top_to_bottom(name: str) -> None:
    assert [cell["execution_count"] for cell in cells(name)] == list(range(1, len(cells(name)) + 1))
    drawn = [cell for cell in cells(name) if any("image/png" in one.get("data", {}) for one in cell["outputs"])]
    assert drawn
    assert all(cell["metadata"]["alt"] for cell in drawn)
