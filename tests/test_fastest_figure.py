"""benchmarks/fastest_figure.py: envelopes, recommendations, a panel for each kind of solver."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fastest_figure
import pytest
from matplotlib.figure import Figure
from PIL import Image


def row(*key: Any, ms: float, error: float) -> dict[str, Any]:
    return {"key": key, "seconds": [ms / 1e3], "calls": {"xl": 1.0}, "mse": error, "image_mse": [error, error]}


ROWS = [
    row("fewer steps", 8, ms=10, error=1e-2),
    row("fewer steps", 9, ms=12, error=2e-2),  # beaten in both
    row("fewer steps", 16, ms=20, error=1e-3),
    row("something new", 1, ms=15, error=5e-3),
    row("switch", 16, 0.4, ms=5, error=1e-2),
    row("recommended", 1e-2, ms=5, error=7e-3),
]


def test_a_line_is_the_envelope_of_its_kind_and_a_star_what_was_recommended() -> None:
    axes = Figure().add_subplot()
    looks = fastest_figure.looks(["fewer steps", "something new", "switch"])
    fastest_figure.draw(axes, ROWS, looks)
    plain, new, ours, star = axes.get_lines()
    assert plain.get_xdata() == pytest.approx([10, 20])
    assert plain.get_ydata() == pytest.approx([1e-2, 1e-3])
    assert (new.get_label(), ours.get_label()) == ("something new", "searched sequence (switch)")
    assert len({line.get_marker() for line in (plain, new, ours, star)}) == 4  # told apart in grey
    assert [text.get_text() for text in axes.texts] == ["1e-2"]
    assert star.get_ydata() == [7e-3]


def test_each_file_of_rows_has_a_panel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fastest_figure.main(["--rows", str(tmp_path)])
    assert "has no fastest_ode.json and no fastest_sde.json: run fastest.py" in capsys.readouterr().err
    about = {"family": "dead_leaves16", "images": 2, "machine": "2 cores", "reference": ["ddpm", 500]}
    for kind, width in (("ode", 1125), ("sde", 1800)):
        (tmp_path / f"fastest_{kind}.json").write_text(json.dumps({"about": about, "rows": ROWS}))
        fastest_figure.main(["--rows", str(tmp_path), "--out", str(tmp_path / "figure.png")])
        with Image.open(tmp_path / "figure.png") as image:
            assert image.width == width
