"""Settings of a run folder against those of now: what counts as a change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlem.cli.resume import changes
from mlem.files import write_json


@pytest.mark.parametrize(
    ("old", "new", "differs"),
    [
        ({"start": [[0.25, -8.1e-18]]}, {"start": [[0.25, -4.6e-18]]}, False),  # a fit, computed again
        ({"start": [0.1 + 0.2]}, {"start": [0.3]}, False),
        ({"start": [0.25, 0.5]}, {"start": [0.25]}, True),
        ({"rate": 1e-3}, {"rate": 1.001e-3}, True),
        ({"rate": 0.0}, {"rate": 1e-6}, True),
        ({"seed": 1}, {"seed": 2}, True),
        ({"size": "xs"}, {"size": None}, True),
    ],
)
def test_computed_numbers_may_differ_by_rounding_and_nothing_else(
    old: dict[str, Any], new: dict[str, Any], differs: bool, tmp_path: Path
) -> None:
    write_json(tmp_path / "settings.json", old)
    assert bool(changes("force", tmp_path, new)) == differs
