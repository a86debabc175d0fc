"""The figures: valid files, numbers with units, one-line refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mlem.comparison.figures import coupled_errors, error_vs_time, quality_vs_evaluations, similarity_vs_time
from mlem.comparison.row import MULTILEVEL, Row
from mlem.plots import error_by_noise_level, lines, probabilities, scaling_law, style

ROWS = [
    Row(sampler, steps, level, seconds=steps / 1e4, mse=1 / steps, mse_stderr=1e-3)
    for level in ("xs", "m")
    for sampler in ("ddpm", "ddim")
    for steps in (25, 100)
]


def curves():
    log_snr = np.linspace(-5, 5, 7)
    return {"xs": (log_snr, np.exp(-log_snr)), "m": (log_snr, np.exp(-log_snr) / 2)}


def laws():
    cost, line = np.array([1.0, 4.0, 16.0]), np.geomspace(1, 16, 9)
    fitted = {"line_cost": line, "line": 1 / line, "low": 0.9 / line, "high": 1.1 / line}
    error = {"cost": cost, "value": 1 / cost, **fitted, "gamma": 2.0, "interval": (1.8, 2.25)}
    return {"error - floor": error, "level difference": {**error, "value": 2 / cost, "gamma": 3.0}}


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: error_vs_time(ROWS, path, "digits, 64 samples, reference of 2000 steps, seed 0, CPU"),
        lambda path: error_by_noise_level(curves(), path, "digits"),
        lambda path: scaling_law(laws(), path, "digits"),
    ],
    ids=["error_vs_time", "error_by_noise_level", "scaling_law"],
)
def test_figures_are_whole_pngs_and_nothing_else(draw, tmp_path):
    draw(tmp_path / "new" / "figure.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["figure.png"]
    with Image.open(tmp_path / "new" / "figure.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert round(picture.info["dpi"][0]) == 150
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10  # something was drawn


def figure_of(monkeypatch, draw):
    """The Figure that `draw` would save."""
    figures = []
    for module in ("mlem.plots.lines", "mlem.plots.law", "mlem.comparison.figures"):
        monkeypatch.setattr(f"{module}.save", lambda figure, path: figures.append(figure))
    draw()
    return figures[0]


@pytest.mark.parametrize(("seconds", "mse"), [(0.0133383956673, 0.00510820720), (0.69, 0.0145), (0.000157, 0.146)])
def test_one_point_alone_has_axes_with_room(seconds, mse, tmp_path, monkeypatch):
    row = replace(ROWS[0], seconds=seconds, mse=mse, mse_stderr=0.01 * mse)
    saved, savefig = [], Figure.savefig

    def save(figure, *args, **options):
        saved.append(figure)
        savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    error_vs_time([row], tmp_path / "a.png", "one")  # a warning of the layout is an error here
    axes = saved[0].axes[0]
    for (low, high), value in ((axes.get_xlim(), 1e3 * seconds), (axes.get_ylim(), mse)):
        assert 1.4 * low < value < high / 1.4


def test_error_vs_time_shows_the_numbers_with_units(monkeypatch):
    caption = "digits, 64 samples"
    axes = figure_of(monkeypatch, lambda: error_vs_time(ROWS[::-1], "x.png", caption)).axes[0]
    assert axes.get_xlabel() == "time per image [ms]"
    assert axes.get_ylabel() == "mean squared error to the reference"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_title(loc="left") == caption
    lines = [container.lines[0] for container in axes.containers]
    assert len(lines) == 4
    np.testing.assert_allclose(np.asarray(lines[0].get_xdata(), float), [2.5, 10.0])  # sorted by steps, in milliseconds
    np.testing.assert_allclose(np.asarray(lines[0].get_ydata(), float), [1 / 25, 1 / 100])
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == 4
    assert len({line.get_color() for line in lines}) == 2


def test_quality_is_of_the_largest_level_that_runs_alone(monkeypatch, tmp_path):
    alone = [replace(row, evaluations=float(row.steps)) for row in ROWS]
    shared = [replace(row, level=MULTILEVEL, sampler="ddpm_jump_probabilities-learned") for row in alone[:2]]
    figure = figure_of(monkeypatch, lambda: quality_vs_evaluations([*alone, *shared], "x.png", "digits"))
    assert figure.axes[0].get_title(loc="left") == "level m; digits"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ddpm", "ddim"]
    with pytest.raises(ValueError, match="nothing to draw: no level runs alone"):
        quality_vs_evaluations(shared, tmp_path / "x.png", "digits")
    assert not list(tmp_path.iterdir())


def test_similarity_and_distance_stand_beside_the_error_where_they_were_measured(monkeypatch):
    alone = [replace(row, evaluations=float(row.steps), psnr=30.0, ssim=0.75) for row in ROWS]
    exact = replace(alone[-1], mse=0.0, psnr=math.inf, ssim=1.0)  # the reference itself
    rows = [replace(row, scores={"fd_dinov2-s-0a@7": 2.0, "fd_dinov2-s-0a@7_std": 9.0}) for row in [*alone[:-1], exact]]
    panels = figure_of(monkeypatch, lambda: quality_vs_evaluations(rows, "x.png", "digits")).axes
    shown = ["mean squared error to the reference", "1 - SSIM to the reference"]
    assert [axes.get_ylabel() for axes in panels] == [*shown, "fd_dinov2-s-0a@7"]
    assert {axes.get_yscale() for axes in panels} == {"log"}
    for axes, (value, count) in zip(panels[1:], ((0.25, 3), (2.0, 4)), strict=True):
        lines = [container.lines[0] for container in axes.containers]
        assert [y for line in lines for y in line.get_ydata()] == [value] * count


def test_a_predicted_curve_leaves_the_axes_to_what_was_measured(monkeypatch):
    rows = [replace(row, flops=1e6 * row.steps) for row in ROWS[:2]]

    def drawn(curves):
        return figure_of(monkeypatch, lambda: coupled_errors(rows, [], "x.png", "digits", {}, curves))

    without, figure = drawn(None).axes[1], drawn({"predicted": ([1e6, 1e9], [1e3, 1e-9])})
    axes = figure.axes[1]
    assert (axes.get_xlim(), axes.get_ylim()) == (without.get_xlim(), without.get_ylim())
    assert [list(values) for values in axes.lines[-1].get_data()] == [[1.0, 1000.0], [1e3, 1e-9]]
    assert "predicted" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_similarity_against_time(monkeypatch, tmp_path):
    alone = [replace(row, psnr=30.0 + row.steps, psnr_stderr=1.0, ssim=0.75, ssim_stderr=0.1) for row in ROWS[:2]]
    shared = replace(alone[0], level=MULTILEVEL, psnr=50.0)
    rows = [*alone, shared, replace(alone[0], psnr=math.inf, ssim=1.0)]
    figure = figure_of(monkeypatch, lambda: similarity_vs_time(rows, [shared], "x.png", "digits"))
    psnr, ssim = figure.axes
    assert (psnr.get_ylabel(), psnr.get_yscale()) == ("PSNR to the reference [dB]", "linear")
    assert (ssim.get_ylabel(), ssim.get_yscale()) == ("1 - SSIM to the reference", "log")
    assert list(psnr.containers[0].lines[0].get_ydata()) == [55.0, 130.0]
    assert [list(line.get_ydata()) for line in psnr.lines[-2:]] == [[50.0], [50.0]]
    assert {y for line in ssim.lines for y in line.get_ydata()} == {0.25}
    with pytest.raises(ValueError, match="similarity_vs_time has nothing to draw"):
        similarity_vs_time(ROWS, [], tmp_path / "x.png", "")


def test_scaling_law_shows_points_lines_bands_and_gamma(monkeypatch):
    figure = figure_of(monkeypatch, lambda: scaling_law(laws(), "x.png", "digits", unit="FLOPs per image"))
    axes = figure.axes[0]
    assert axes.get_xlabel() == "cost [FLOPs per image]"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    fit, points = axes.lines[:2]
    np.testing.assert_allclose(fit.get_ydata(), 1 / np.geomspace(1, 16, 9))
    np.testing.assert_allclose(points.get_xydata(), [(1, 1), (4, 1 / 4), (16, 1 / 16)])
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.9 / 16, 1.1))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        r"error - floor: $\gamma$ = 2.00 (1.80 to 2.25)",
        r"level difference: $\gamma$ = 3.00 (1.80 to 2.25)",
    ]


def test_nothing_to_draw_is_refused(tmp_path):
    path = tmp_path / "figure.png"
    with pytest.raises(ValueError, match="error_vs_time has nothing to draw"):
        error_vs_time([], path, "")
    with pytest.raises(ValueError, match="error_by_noise_level has nothing to draw"):
        error_by_noise_level({}, path, "")
    with pytest.raises(ValueError, match="scaling_law has nothing to draw"):
        scaling_law({}, path, "")
    assert not list(tmp_path.iterdir())


def test_bad_numbers_are_refused(tmp_path):
    path = tmp_path / "figure.png"
    for mse in (0.0, math.nan):  # NaN: not measured
        with pytest.raises(ValueError, match="above 0 and a standard error"):
            error_vs_time([replace(ROWS[0], mse=mse)], path, "")
    with pytest.raises(ValueError, match=r"curve 'xs' .* log_snr \(3,\), error \(2,\)"):
        error_by_noise_level({"xs": ([0, 1, 2], [1, 1])}, path, "")
    law = laws()["error - floor"]
    with pytest.raises(ValueError, match="gamma is missing"):
        scaling_law({"a": {key: value for key, value in law.items() if key != "gamma"}}, path, "")
    for bad in ({"value": [1.0, 2.0, 0.0]}, {"cost": [1.0, 2.0]}):
        with pytest.raises(ValueError, match="curve 'a' needs cost, value of equal length and above 0"):
            scaling_law({"a": {**law, **bad}}, path, "")
    with pytest.raises(ValueError, match="curve 'a' needs line_cost, line, low, high of equal length"):
        scaling_law({"a": {**law, "low": -law["low"]}}, path, "")
    with pytest.raises(ValueError, match="figures are PNG files"):
        error_by_noise_level(curves(), tmp_path / "figure.txt", "")
    assert not list(tmp_path.iterdir())


def test_probabilities_before_and_after(monkeypatch, tmp_path):
    log_snr, curves = [3, -1, 1], {"s": ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]), "m": ([1, 0, 1], [0, 1, 0])}
    lines = figure_of(monkeypatch, lambda: probabilities(log_snr, curves, "x.png", "digits")).axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["--", "-", "--", "-"]
    assert len({line.get_color() for line in lines}) == 2
    np.testing.assert_allclose(lines[1].get_xdata(), [-1, 1, 3])
    np.testing.assert_allclose(lines[1].get_ydata(), [0.5, 0.6, 0.4])
    monkeypatch.undo()
    probabilities(log_snr, curves, tmp_path / "p.png", "digits")
    with Image.open(tmp_path / "p.png") as picture:
        picture.load()
    for bad in ({}, {"s": ([0.1], [0.4])}, {"s": ([0.1, 0.2, 0.3], [0.4, 0.5, 1.1])}):
        with pytest.raises(ValueError, match="nothing to draw" if not bad else "curve 's' needs values in"):
            probabilities(log_snr, bad, tmp_path / "q.png", "")


@pytest.mark.parametrize(("losses", "label", "minor"), [([3.0, 4e-5], "10⁻²", False), ([0.3, 0.5], "4×10⁻¹", True)])
def test_powers_of_ten_are_text_that_needs_no_parsing(losses, label, minor, tmp_path, monkeypatch):
    losses = {"xs": ([1.0, 2.0], losses)}
    figure = figure_of(monkeypatch, lambda: lines.curves(losses, "x.png", "step", "loss", "digits", logarithmic=True))
    style.save(figure, tmp_path / "x.png")
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels(minor=minor)]
    assert label in labels
    assert not any("$" in text for text in labels)
