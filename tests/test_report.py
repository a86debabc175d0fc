"""report.html: what it says of a run folder, and of one with damaged files. In a browser: test_report_page.py."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mlem.comparison.fastest import Fastest, Measured
from mlem.comparison.recommended import Recommended, renew, source_of
from mlem.family import Family
from mlem.plots import curves
from mlem.provenance import provenance
from mlem.report import write_report
from mlem.report.command import main
from mlem.report.html import Cell, Markup, section, table, tag
from tests.commands import REPOSITORY
from tests.report_run import ADVICE, ROWS, SCORE, advise


def test_rivals_come_first(tmp_path: Path) -> None:
    """Their figure and table; and the recommendation is that for the family that they were run on."""
    (tmp_path / "fastest").mkdir()
    about = {"family": "dead_leaves16", "source": "pretrained:dead_leaves16", "kind": "sde", "batch_size": 64}
    about |= {"caption": "64 images", "machine": {"processor": "2 cores", "threads": 2}}
    rows = [
        Measured("fewer steps", "ddpm", "uniform", 30, "", 0.05, 9e-4, 1e-5, {"l": 30}),
        Measured("recommended", "ddpm", "uniform", 20, "mse 0.001", 0.0127, 8.4e-4, 1e-5, {"xs": 40, "s": 9}),
    ]
    Fastest(about, tuple(rows), ADVICE, (1e-2, 1e-3, 1e-4)).save(tmp_path / "fastest/fastest.json")
    curves({"a": ([1, 2], [1, 2])}, tmp_path / "fastest/fastest.png", "x", "y", "caption")
    advise(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps({"caption": "", "rows": ROWS}))
    text = write_report(tmp_path).read_text()
    assert re.findall("<h2>(.*?)</h2>", text)[0] == "Error and time of every rival"
    for words in (
        "On pretrained:dead_leaves16, run ddpm, 20 steps",
        "family=pretrained:dead_leaves16 sampler.options.kind=sde sampler=auto mse=0.001",
        "Measured: 12.7 ms for 0.00084. The fastest of all others that reach it: fewer steps, 50 ms for 0.0009.",
        ">50.00<",
        "–",  # of what nothing reaches
    ):
        assert words in text


def test_a_family_for_which_nothing_is_recommended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    advise(tmp_path, None, "mse=0.1: nothing reaches it; calibrate: python -m mlem.multilevel calibrate FAMILY")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "train/loss": 1.0}\n')
    assert (
        "Nothing is recommended for this family.</p><p>mse=0.1: nothing reaches" in write_report(tmp_path).read_text()
    )
    (tmp_path / "family/calibration.json").unlink()
    text = write_report(tmp_path).read_text()
    assert "not calibrated. Measure it first:</p>" in text
    assert "python -m mlem.multilevel calibrate family</pre>" in text


def test_it_is_asked_again_only_when_levels_or_calibration_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advise(tmp_path)
    level = tmp_path / "family" / "level_xs" / "mlem.json"

    def asked(folder: Path) -> Family:
        raise ValueError(f"{folder} was read")

    monkeypatch.setattr(Family, "load", asked)
    found = renew(tmp_path)
    assert found is not None
    assert found.advice == ADVICE
    for path, text in ((level, '{"sha256": "of other weights"}'), (tmp_path / "family/calibration.json", '{"a": 1}')):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        with pytest.raises(ValueError, match="family was read"):
            renew(tmp_path)
        known = Recommended.load(tmp_path / "recommendation.json")
        replace(known, source=str(source_of(tmp_path / "family"))).save(tmp_path / "recommendation.json")
        assert renew(tmp_path) is not None


def test_a_real_run_leaves_its_report(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the family and for each level; written again by the command, the same."""
    monkeypatch.chdir(trained)
    for place in ("runs/tiny", "runs/tiny/unet_s"):
        path = trained / place / "report.html"
        text = path.read_text()
        assert json.loads((path.parent / "run.json").read_text())["commit"] in text
        for heading in ("Levels", "Training", "Config"):
            assert f"<h2>{heading}</h2>" in text
        main([place])
        assert path.read_text() == text
    text = (trained / "runs/tiny/report.html").read_text()
    for words in (
        "<h1>digits/evaluation · mlem</h1>",
        "Samples of ddpm, 2 steps; level s",
        "learning_rate: ",
        SCORE[:-2],
    ):
        assert words in text
    assert "http://" not in text
    assert "https://" not in text


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


DAMAGED = {
    "run.json": ["[]", "{"],
    "family/family.json": ["[]", "{}", '{"levels": 3}'],
    "level/mlem.json": ["3", "{}", '{"name": "s", "measured": 3}', '{"name": "s", "measured": {}, "parameters": 1}'],
    "evaluation.json": ["{", "{}", '{"caption": "", "rows": 3}'],
    "recommendation.json": ["[]", "{}", '{"advice": 3, "why_not": "", "calls": []}'],
    "calls.json": [
        "{",
        "{}",
        '{"calls": [{"name": "a", "levels": ["xs"], "times": [1], "runs": [], "probabilities": []}]}',
    ],
    "fastest/fastest.json": ["[]", '{"format": 2}', '{"format": 1, "about": {}, "rows": [3], "recommendation": null}'],
    "cost/summary.json": ["[]", "{}", '{"caption": "", "ratios": [3]}'],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGED.items() for text in texts])
def test_a_damaged_file_is_one_line_that_names_it(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "train/loss": 1.0}\n')
    if name == "recommendation.json":
        advise(tmp_path)
    (tmp_path / name).write_text(text)
    assert main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / name) in line
    assert not (tmp_path / "report.html").exists()


def test_damaged_lines_of_a_log_are_left_out(tmp_path: Path) -> None:
    lines = [b'{"step": 0, "val/error_tx": 1.0}', b'{"step": 1, "train/lo\xff\xfe": 1.0}', b"[" * 100_000]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "config.yaml").write_bytes(b"seed: \xff")
    assert main([str(tmp_path)]) == 0


def test_elements_escape() -> None:
    assert tag("p", "<b>", class_='"') == '<p class="&quot;">&lt;b&gt;</p>'
    assert tag("p", Markup("<b>"), aria_label="x") == '<p aria-label="x"><b></p>'
    assert section("empty") == ""
    assert 'data-value=""' in table("", ["a"], [[Cell("–", None)]])


def test_the_commit_is_that_of_the_checkout() -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("no git checkout")
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no git, or it does not read this checkout")
    assert len(found.stdout.strip()) == 40
    assert provenance.__wrapped__()["commit"].removesuffix("-dirty") == found.stdout.strip()
