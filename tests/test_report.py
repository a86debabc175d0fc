"""report.html: what it says, and how it behaves in a real browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mlem.comparison.row import Row
from mlem.images import image_grid
from mlem.plots import curves
from mlem.provenance import provenance
from mlem.report import write_report
from mlem.report.command import main
from mlem.report.html import Cell, Markup, section, table, tag
from tests.commands import REPOSITORY

EVIL = "<script>document.title = 'taken'</script>\"'&"
SCORE = "fid_random256@8"


def row(
    level: str, sampler: str, steps: int, mse: float | None, calls: dict[str, float], **more: Any
) -> dict[str, Any]:
    found = {"level": level, "sampler": sampler, "steps": steps, "dial": "", "calls": calls}
    found |= {"evaluations": sum(calls.values()), "rounds": float(steps), "flops_per_image": 1e6 * steps}
    return (
        found | {"seconds_per_image": steps / 1e4, "mse": mse, "mse_stderr": mse and mse / 10, SCORE: 30 / steps} | more
    )


ROWS = [
    row("xs", "ddpm", 9, 0.02, {"xs": 9}, psnr=23.456, psnr_stderr=0.25, ssim=0.98765, ssim_stderr=0.0012),
    row("xs", EVIL, 100, 0.3, {"xs": 100}),
    row("s", "a_sampler_with_a_name_that_goes_on_and_on_beyond_all_measure_and_reason", 10, None, {"s": 10}),
    row("mlem", "ddpm_hindsight", 20, 0.001, {"xs": 40, "s": 9.5}, dial="budget0.6"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with everything in it, and markup in its names."""
    folder = tmp_path_factory.mktemp("run")
    write = {"run.json": {"name": EVIL, "commit": "0123abc", "version": "1"}}
    write |= {"evaluation.json": {"caption": f"digits & {EVIL}", "rows": ROWS}}
    for name, value in write.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "config.yaml").write_text(f"name: {EVIL}\nlong: {'x' * 500}\n")
    for name, metrics in (
        ("unet_xs", ("train/loss", "val/error", "val/error_t0.25", "val/error_t0.75", "system/memory_gib")),
        ("coefficients", ("alpha/s", "beta/s", "p/s/t0.5", "objective")),
    ):
        (folder / name).mkdir()
        lines = [{"step": step, **dict.fromkeys(metrics, 1 / (1 + step))} for step in range(3)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name / "metrics.jsonl").write_text(text + '{"step": 3, "train')
    curves({"a": ([1, 2], [1, 2])}, folder / "error_vs_time.png", "x", "y", "caption")
    (folder / "error_vs_time").mkdir()
    curves({"a": ([1, 2], [1, 2])}, folder / "error_vs_time" / "error_vs_time.png", "x", "y", "caption")
    curves({"a": ([1, 2], [1, 2])}, folder / "error_vs_time" / "similarity_vs_time.png", "x", "y", "caption")
    against = {
        "time, largest": {"ratio": 2.5, "low": 2.0, "high": 3.0},
        "FLOPs, any": dict.fromkeys(("ratio", "low", "high")),
    }
    ratio = {"sampler": EVIL, "solver": "ddpm", "coins": "mean", "mse": 1e-3, "against": against}
    beyond = ratio | {"mse": 1e-5, "against": dict.fromkeys(against, against["FLOPs, any"])}
    found = {"caption": "32 images", "ratios": [ratio, beyond]}
    (folder / "error_vs_time" / "summary.json").write_text(json.dumps(found))
    (folder / "grids").mkdir()
    for one in ROWS:
        if "/" not in one["sampler"]:
            image_grid(torch.zeros(4, 1, 8, 8)).save(folder / "grids" / f"{Row.from_json(one).picture}.png")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; `.ci/run` installs it."""
    program = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
    )
    if not program:
        pytest.skip("no Chromium here: install it (apt-get install chromium) to open reports in a browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=120_000)
        yield opened
        opened.close()


@pytest.fixture
def opened(browser: Any, run: Path) -> Iterator[Any]:
    """The report on a laptop, with everything that it asks for and complains of."""
    with browser.new_context(viewport={"width": 1280, "height": 800}) as context:
        context.set_default_timeout(120_000)  # milliseconds, for a busy machine
        page = context.new_page()
        page.asked, page.errors = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda message: page.errors.append(message.text))
        page.goto((run / "report.html").as_uri(), wait_until="load")
        yield page


def test_it_asks_for_nothing_and_all_pictures_load(opened: Any, run: Path) -> None:
    assert [url for url in opened.asked if not url.startswith("data:")] == [(run / "report.html").as_uri()]
    assert opened.errors == []
    pictures = opened.evaluate("[...document.images].map(one => [one.naturalWidth, one.alt])")
    assert len(pictures) == 1 + 2 + 3 + 4 + 1 + 3
    assert all(width > 0 and len(alt) > 10 for width, alt in pictures)


def test_it_fits_a_laptop(opened: Any) -> None:
    assert opened.evaluate("document.documentElement.scrollWidth") <= 1280
    # nor is anything to be scrolled inside it
    assert (
        opened.evaluate(
            "[...document.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth + 1 && "
            "getComputedStyle(e).overflowX === 'auto').length"
        )
        == 0
    )


def test_names_with_markup_stay_text(opened: Any) -> None:
    assert opened.title() == f"{EVIL} · mlem"
    assert opened.locator("h1").inner_text() == f"{EVIL} · mlem"
    assert opened.locator("script").count() == 1
    assert "0123abc" in opened.locator("dl").inner_text()
    assert EVIL in opened.locator("pre").inner_text()


def test_a_press_on_a_header_sorts(opened: Any) -> None:
    """Numbers as numbers, texts as texts, nothing always last; by keyboard as well."""

    def column(number: int) -> list[str]:
        return opened.locator(f"table >> nth=0 >> tbody td:nth-child({number})").all_inner_texts()

    def states() -> list[str]:
        return opened.locator("table >> nth=0 >> th").evaluate_all("all => all.map(th => th.ariaSort)")

    header = opened.get_by_role("button", name="steps", exact=True)
    assert column(3) == ["9", "100", "10", "20"]
    header.click()
    assert column(3) == ["9", "10", "20", "100"]
    assert states()[2] == "ascending"
    header.click()
    assert column(3) == ["100", "20", "10", "9"]
    assert states().count("none") == len(states()) - 1
    assert states()[2] == "descending"
    error = opened.get_by_role("button", name="MSE", exact=True).first
    error.focus()
    opened.keyboard.press("Enter")
    assert column(10) == ["0.001", "0.02", "0.3", "–"]
    opened.keyboard.press("Enter")
    assert column(10) == ["0.3", "0.02", "0.001", "–"]
    opened.get_by_role("button", name="level", exact=True).first.click()
    assert column(1) == ["mlem", "s", "xs", "xs"]


def test_similarity_stands_beside_the_error(run: Path, tmp_path: Path) -> None:
    text = (run / "report.html").read_text()
    assert ">23.5<" in text
    assert ">0.988<" in text
    assert "PSNR and SSIM against time of single levels" in text
    (tmp_path / "evaluation.json").write_text(json.dumps({"caption": "", "rows": ROWS[1:]}))
    assert ">PSNR [dB]<" not in write_report(tmp_path).read_text()  # of a version that had none


def test_ratios_at_equal_error_are_told(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert "<h2>Samplers at equal error</h2>" in text
    for words in (
        "32 images",
        "the largest level alone",
        ">2.50<",
        "2.00 to 3.00",
        "the best single level",
        "No ratio, one side was not measured down to that MSE: ",
        " (mean) 1e-05.",
    ):
        assert words in text
    assert text.count("not reached") == 1  # of the entry that has a ratio for another cost


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
    "cost/summary.json": ["[]", "{}", '{"caption": "", "ratios": [3]}'],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGED.items() for text in texts])
def test_a_damaged_file_is_one_line_that_names_it(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "train/loss": 1.0}\n')
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
