"""report.html: what it says, and how it behaves in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mlem.comparison.calls import Calls, write_calls
from mlem.comparison.fastest import Advice, Alternative, Fastest, Measured
from mlem.comparison.recommended import Recommended, source_of
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
    row(
        "xs",
        "ddpm",
        9,
        0.02,
        {"xs": 9},
        reference="ddpm",
        psnr=23.456,
        psnr_stderr=0.25,
        ssim=0.98765,
        ssim_stderr=0.0012,
    ),
    row("xs", EVIL, 100, 0.3, {"xs": 100}),
    row("s", "a_sampler_with_a_name_that_goes_on_and_on_beyond_all_measure_and_reason", 10, None, {"s": 10}),
    row("mlem", "ddpm_hindsight", 20, 0.001, {"xs": 40, "s": 9.5}, dial="budget0.6", reference="ddpm"),
]
ADVICE = Advice(
    text=f"ddpm, 20 steps on the uniform grid, hindsight of xs, s{EVIL}",
    mse=0.0008,
    interval=(0.0006, 0.001),
    seconds=0.0125,
    target=0.001,
    why="3 times as fast as s alone",
    options={"solver": "ddpm", "steps": 20, "grid": "uniform"},
    alternatives=(Alternative("ddim, 12 steps on the uniform grid, s", 0.0009, (0.0005, 0.0015), 0.04),),
)
HINDSIGHT = Calls(
    name=f"recommended: {ADVICE.text}",
    levels=("xs", "s"),
    times=(1.0, 0.75, 0.5, 0.25),
    runs=((1, 1), (1, 0), (2, 1), (1, 0)),
    probabilities=((1.0, 0.5), (1.0, 0.5), (1.0, 0.5), (1.0, 0.5)),
)


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
    (folder / "strips").mkdir()
    for name in ("reference_ddpm", "mlem_ddpm_hindsight_20_budget0.6"):
        image_grid(torch.zeros(8, 1, 8, 8), 8).save(folder / "strips" / f"{name}.png")
    advise(folder)
    write_calls(folder / "calls.json", [replace(HINDSIGHT, name="ddpm_hindsight, 4 steps, budget0.6")])
    write_report(folder)
    return folder


def advise(folder: Path, advice: Advice | None = ADVICE, why_not: str = "") -> None:
    """A family that says no more than the report needs, and what was recommended for it."""
    (folder / "family").mkdir()
    (folder / "family" / "family.json").write_text('{"levels": ["xs", "s"]}')
    (folder / "family" / "calibration.json").write_text("{}")
    source = source_of(folder / "family")
    assert source is not None
    Recommended(advice, why_not, (HINDSIGHT,), source, "2 cores").save(folder / "recommendation.json")


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
    with visited(browser, run, width=1280, height=800) as page:
        yield page


@contextmanager
def visited(browser: Any, run: Path, scheme: str = "light", **viewport: int) -> Iterator[Any]:
    with browser.new_context(viewport=viewport, color_scheme=scheme) as context:
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
    assert len(pictures) == 1 + 2 + 3 + 4 + 1 + 3 + 2 + 2  # of plans, and the reference twice
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


def test_it_fits_a_phone(browser: Any, run: Path) -> None:
    """The page is as wide as the screen; tables and figures that are wider scroll in boxes of their own."""
    with visited(browser, run, width=390, height=844) as page:
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        boxes = page.locator(".table").evaluate_all("all => all.map(e => [e.scrollWidth > e.clientWidth, e.tabIndex])")
        assert [True, 0] in boxes  # that of samplers
        # whatever goes beyond the screen can be scrolled to
        assert (
            page.evaluate(
                "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 391 && "
                "!e.closest('.table, figure.plot')).map(e => e.outerHTML.slice(0, 80))"
            )
            == []
        )
        assert page.locator("figure.plot img").first.bounding_box()["width"] >= 640  # its letters are to be read


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_read_by_day_and_by_night(browser: Any, run: Path, scheme: str) -> None:
    """Text stands out from what is behind it: 4.5 times as bright or dark, as WCAG asks."""
    with visited(browser, run, scheme, width=1280, height=800) as page:
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        pairs = page.evaluate(
            """names => names.map(name => {
              const one = document.querySelector(name), colours = [getComputedStyle(one).color];
              for (let at = one; at && colours.length < 2; at = at.parentElement) {
                const back = getComputedStyle(at).backgroundColor;
                if (back !== 'rgba(0, 0, 0, 0)') colours.push(back);
              }
              return colours;
            })""",
            ["body", ".first", "dt", "summary", "figcaption", "caption", "td", "th button", "pre"],
        )
    for text, back in pairs:
        bright, dim = sorted((luminance(text), luminance(back)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5
    assert (luminance(pairs[0][1]) < 0.1) == (scheme == "dark")


def luminance(colour: str) -> float:
    """Of "rgb(r, g, b)", as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_it_begins_with_what_to_run(opened: Any) -> None:
    lines = opened.locator("main").inner_text().splitlines()
    first, second = [line for line in lines if line][1:3]  # below the title
    assert first == f"Run {ADVICE.text}: 12.5 ms an image for a mean squared error of at most 0.001."
    assert second.startswith("python sample.py family=")
    assert second.endswith("/family sampler=auto mse=0.001")
    head = opened.locator(".advice")
    assert "Why: 3 times as fast as s alone." in head.inner_text()
    assert "(95 percent: 0.0006 to 0.001)" in head.inner_text()
    assert not head.get_by_text("ddim, 12 steps on the uniform grid, s").is_visible()
    head.locator("summary").click()
    assert head.get_by_text("ddim, 12 steps on the uniform grid, s").is_visible()


def test_samples_stand_in_columns(opened: Any) -> None:
    """Under their reference, which is as wide and as high: a column is an index."""
    strips = opened.locator(".strips >> nth=0 >> img")
    alts = strips.evaluate_all("all => all.map(one => one.alt)")
    assert alts[:1] == ["Samples of the reference, many steps of ddpm"]
    assert "ddpm_hindsight, 20 steps, budget0.6" in alts[-1]
    sizes = strips.evaluate_all("all => all.map(one => [one.width, one.height, one.naturalWidth])")
    assert sizes[0] == sizes[-1]
    assert not opened.get_by_alt_text("Samples of ddpm, 9 steps; level xs").is_visible()  # a smaller level, folded up


def test_calls_are_told_in_words(opened: Any) -> None:
    words = "xs at all 4 evaluations; s at 2: 1, 3"
    assert words in opened.get_by_alt_text("Figure: calls along a trajectory").get_attribute("alt")
    opened.get_by_text("The same in words").click()
    assert opened.get_by_role("listitem").all_inner_texts() == [
        f"{HINDSIGHT.name}: {words}",
        f"ddpm_hindsight, 4 steps, budget0.6: {words}",
    ]


def test_names_with_markup_stay_text(opened: Any) -> None:
    assert opened.title() == f"{EVIL} · mlem"
    assert opened.locator("h1").inner_text() == f"{EVIL} · mlem"
    assert opened.locator("script").count() == 1
    assert "0123abc" in opened.locator("dl").inner_text()
    assert EVIL in opened.locator("pre").last.inner_text()


def test_a_press_on_a_header_sorts(opened: Any) -> None:
    """Numbers as numbers, texts as texts, nothing always last; by keyboard as well."""

    def column(number: int) -> list[str]:
        return opened.locator(f"table >> nth=1 >> tbody td:nth-child({number})").all_inner_texts()

    def states() -> list[str]:
        return opened.locator("table >> nth=1 >> th").evaluate_all("all => all.map(th => th.ariaSort)")

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
