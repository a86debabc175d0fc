"""`benchmarks/unchanged.py`: what its two hashes see, and what they leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import unchanged
from unchanged_files import Page, attempt, load, number, run

ITEM = {"gain": [0.5, None], "steps": 3, "seconds": 1.25, "x": torch.arange(3.0)}


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        (ITEM | {"seconds": 2.5}, "yes"),
        ({("share" if key == "gain" else key): value for key, value in ITEM.items()}, "same numbers, other text"),
        (ITEM | {"gain": [0.5, 1.0]}, "other numbers"),
        (ITEM | {"gain": [0.5 + 1e-16, None]}, "other numbers"),
        (ITEM | {"x": torch.arange(3.0).nextafter(torch.ones(3))}, "other numbers"),
        (ITEM | {"x": torch.arange(3.0).double()}, "same numbers, other text"),
        (ITEM | {"x": torch.tensor([0.0, 2.0, 1.0])}, "other numbers"),
    ],
)
def test_kinds_of_differences(other: Any, kind: str) -> None:
    before, now = (unchanged._hashes({"item": item})["item"] for item in (ITEM, other))
    assert unchanged._kind(before, now) == kind


def test_what_is_missing_or_new_or_failed() -> None:
    hashes = unchanged._hashes({"item": ITEM})["item"]
    assert [unchanged._kind(hashes, None), unchanged._kind(None, hashes)] == ["missing", "new"]
    failed = attempt(run, Path.cwd(), "-c", "raise SystemExit('two\\nlines')")
    assert failed.startswith("failed: RuntimeError: python -c ")
    assert failed.endswith(": lines")
    assert unchanged._why("other numbers", torch.zeros(2), failed) == failed


def test_a_difference_is_measured() -> None:
    before = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert unchanged._why("other numbers", before, [1.0, 2.25]) == "other numbers: by 0.25 at most"
    assert unchanged._why("other numbers", before, [1.0]) == "other numbers: 2 then, 1 now"


def test_files(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("name,steps,image_mse,delta\nddpm,4,0.1 0.25,\n")
    assert load(tmp_path / "rows.csv") == [{"name": "ddpm", "steps": 4.0, "image_mse": [0.1, 0.25], "delta": ""}]
    assert [number(text) for text in ("1,500", "4 xs", "–")] == [1500.0, "4 xs", "–"]
    text = "<style>p</style><p>begun 2026-01-02 10:00, 0.1.0</p><td>0.5</td><td>ddpm</td>"
    (tmp_path / "page.html").write_text(text)
    page = Page(tmp_path / "page.html")
    assert (page.words, page.cells) == (["begun  ", "0.5", "ddpm"], [0.5, "ddpm"])
