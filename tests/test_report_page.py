"""report.html in a real browser: on a laptop and a phone, by day and by night, with names that are markup."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import by_budget
import pytest
import torch

from mlem.comparison.calls import write_calls
from mlem.comparison.row import Row
from mlem.images import image_grid
from mlem.plots import curves
from mlem.report import write_report
from tests.report_run import ADVICE, EVIL, HINDSIGHT, ROWS, advise


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
    """The report of a run, or another page."""
    shown = run if run.suffix else run / "report.html"
    with browser.new_context(viewport=viewport, color_scheme=scheme) as context:
        context.set_default_timeout(120_000)  # milliseconds, for a busy machine
        page = context.new_page()
        page.asked, page.errors = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda message: page.errors.append(message.text))
        page.goto(shown.as_uri(), wait_until="load")
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
    assert first == f"Run {ADVICE.text}: 12.5 ms per image for a mean squared error of at most 0.001."
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


def test_the_figure_of_budgets_shows_what_the_slider_says(browser: Any) -> None:
    """And all of them where no JavaScript runs."""
    with visited(browser, by_budget.PAGE, width=390, height=400) as page:
        for number in (by_budget.FIRST, 0, len(by_budget.BUDGETS) - 1):
            page.locator("#budget").fill(str(number))
            shown = page.locator("figure:visible").evaluate_all("all => all.map(e => e.dataset.budget)")
            assert shown == [f"{100 * by_budget.BUDGETS[number]:.0f} percent"]
            assert page.locator("#budget").get_attribute("aria-valuetext") == shown[0]
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert (page.asked, page.errors) == ([by_budget.PAGE.as_uri()], [])
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(by_budget.PAGE.as_uri())
        assert page.locator("figure:visible").count() == len(by_budget.BUDGETS)
        assert not page.locator("#budget").is_visible()
