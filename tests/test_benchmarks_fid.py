"""benchmarks/fid_at_seconds.py: of each way the best within the time is sampled, once."""

from __future__ import annotations

import json
from pathlib import Path

import fid_at_seconds
import pytest

from mlem.family import Family
from mlem.files import read_json
from mlem.sampling import Sampler


@pytest.mark.filterwarnings("ignore::mlem.metrics.FewImagesWarning")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
def test_a_small_run(made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid_at_seconds, "SAMPLES", 16)
    monkeypatch.setattr(fid_at_seconds, "BATCH", 8)
    monkeypatch.setattr(fid_at_seconds, "BLOCKS", 2)
    monkeypatch.setattr(fid_at_seconds, "MANY", {"ode": ("unipc", 2)})
    folder = made[0] / "runs/digits/family"
    measured = [
        {"key": ["fewer steps", "unipc", "uniform", 4], "seconds": [0.01, 0.02], "mse": 0.2},
        {"key": ["fewer steps", "unipc", "uniform", 6], "seconds": [0.04], "mse": 0.1},
        {"key": ["T-Stitch", "unipc", "uniform", 8, "xs", 0.25], "seconds": [0.02], "mse": 0.3},
    ]
    rows, out = tmp_path / "rows.json", tmp_path / "fid.json"
    rows.write_text(json.dumps({"about": {"weights": "others"}, "rows": measured}))
    options = [str(folder), "--data", str(made[0] / "data/digits"), "--seconds", "0.025"]
    options += ["--rows", str(rows), "--out", str(out)]
    with pytest.raises(SystemExit):
        fid_at_seconds.main(options)
    rows.write_text(json.dumps({"about": {"weights": Family.load(folder).weights_hash}, "rows": measured}))
    fid_at_seconds.main(options)
    found = read_json(out)["rows"]
    assert [(row["way"], row["key"][3]) for row in found] == [("many steps", 2), ("fewer steps", 4), ("T-Stitch", 8)]
    assert found[1]["taken"] == pytest.approx(0.015)
    measure = fid_at_seconds.reference(made[0] / "data/digits")
    again = fid_at_seconds.score(Sampler(Family.load(folder), solver="unipc", steps=4, grid="uniform"), measure)
    assert {name: found[1][name] for name in again} == pytest.approx(again)
    monkeypatch.setattr(fid_at_seconds, "score", lambda *_: pytest.fail("sampled again"))
    fid_at_seconds.main(options)
    assert read_json(out)["rows"] == found
