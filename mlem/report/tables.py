"""The tables of a report: networks, samplers, and costs at equal error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlem.comparison.equal_error import Advantage
from mlem.comparison.fastest import Measured
from mlem.comparison.row import Row
from mlem.files import damaged, read_object
from mlem.report.advice import fastest_of
from mlem.report.html import Cell, Markup, figure, table, tag
from mlem.report.logs import is_number

__all__ = ["equal_error", "evaluation_rows", "level_table", "rivals", "sampler_table"]


def level_table(folder: Path) -> list[Markup]:
    """The networks of a run folder, smallest first."""
    paths = [folder / "level" / "mlem.json", *sorted(folder.glob("*/level/mlem.json"))]
    rows = sorted((_level_cells(path) for path in paths if path.exists()), key=lambda cells: float(cells[2].value or 0))
    if not rows:
        return []
    columns = ["level", "parameters", "MFLOPs per call", "held-out error", "time per call [ms/image]"]
    columns += ["training steps", "training time [s]", "device"]
    return [table("Networks of the family; click a header to sort", columns, rows)]


def _level_cells(path: Path) -> list[Cell]:
    """The row of one `mlem.json`. Raises ValueError if it is damaged."""
    level = read_object(path)
    with damaged(path):
        measured = dict(level["measured"])
        return [
            _text(level["name"]),
            _number(level["parameters"], ",d"),
            _number(level["flops"] / 1e6, ".1f"),
            _number(measured.get("error"), ".4f"),
            _number(_scaled(measured.get("seconds"), 1e3), ".3f"),
            _number(measured.get("steps"), ",d"),
            _number(measured.get("training_seconds"), ".1f"),
            _text(measured.get("device", "")),
        ]


def evaluation_rows(home: Path) -> tuple[list[Row], str]:
    """The rows of an evaluation, and their caption."""
    path = home / "evaluation.json"
    found = read_object(path)
    with damaged(path):
        return [Row.from_json(plain, str(path)) for plain in found["rows"]], found["caption"]


def sampler_table(home: Path | None) -> list[Markup]:
    """Cost of each sampler and its error to the reference. home: of `evaluation.json`, if there is one."""
    if home is None:
        return []
    found, caption = evaluation_rows(home)
    scores = list(dict.fromkeys(name for row in found for name in row.scores))
    columns = ["level", "sampler", "steps", "target", "calls per level", "calls per image", "rounds"]
    alike = any(math.isfinite(row.ssim) for row in found)  # older evaluations have none
    columns += ["MFLOPs per image", "time [ms/image]", "MSE", "standard error"]
    columns += [*(["PSNR [dB]", "SSIM"] if alike else []), *scores]
    rows = []
    for row in found:
        per_level = " + ".join(f"{count:.4g} {name}" for name, count in row.calls.items() if count)
        rows.append(
            [
                *map(_text, (row.level, row.sampler)),
                _number(row.steps, "d"),
                *map(_text, (row.target, per_level)),
                _number(row.evaluations, ".4g"),
                _number(row.rounds, ".4g"),
                _number(1e-6 * row.flops, ",.4g"),
                _number(1e3 * row.seconds, ".3g"),
                _number(row.mse, ".3g"),
                _number(row.mse_stderr, ".1g"),
                *([_number(row.psnr, ".1f"), _number(row.ssim, ".3f")] * alike),
                *(_number(row.scores.get(name), ".4g") for name in scores),
            ]
        )
    return [table(f"{caption}; click a header to sort", columns, rows)]


def equal_error(folder: Path) -> list[Markup]:
    """Figures and ratios of `sample.py experiment=error_vs_time`."""
    shown = []
    for path in sorted(folder.glob("*/summary.json")):
        found = read_object(path)
        with damaged(path):
            caption, ratios = found["caption"], [Advantage.from_dict(one, str(path)) for one in found["ratios"]]
            rows = [cells for one in ratios if one.known for cells in _ratios(one)]
        for picture in sorted(path.parent.glob("*.png")):
            what = "PSNR and SSIM against time" if picture.name.startswith("sim") else "Error against time and FLOPs"
            words = f"{what} of single levels and of several levels together"
            shown.append(figure(picture.read_bytes(), f"Figure: {words}", f"{words}; {caption}.", "plot wide"))
        columns = ["sampler", "solver", "coins", "MSE", "cost in", "against", "its cost over ours", "95 % interval"]
        if rows:
            shown.append(table(f"{caption}; click a header to sort", columns, rows))
        unreached: dict[str, list[str]] = {}
        for one in ratios:
            if not one.known:
                unreached.setdefault(f"{one.sampler} ({one.coins})", []).append(f"{one.mse:.2g}")
        if unreached:
            listed = "; ".join(f"{name} {', '.join(errors)}" for name, errors in unreached.items())
            shown.append(tag("p", f"No ratio, one side was not measured down to that MSE: {listed}."))
    return shown


def rivals(folder: Path) -> list[Markup]:
    """The figure of `sample.py eval=rivals`, and the time of each rival's fastest run that reaches an error."""
    known = fastest_of(folder)
    if known is None:
        return []
    path, found = known
    with damaged(path):
        caption = str(found.about["caption"])
    picture, shown = path.with_suffix(".png"), list[Markup]()
    if picture.exists():
        words = "Mean squared error to the many-step reference against time per image in milliseconds, of every rival"
        shown.append(figure(picture.read_bytes(), f"Figure: {words}", f"{words}.", "plot first"))
    columns = ["rival", *(f"MSE {target:g}" for target in found.targets)]
    rows = [
        [_text(group), *(_number(_milliseconds(found.best(target, [group])), ".2f") for target in found.targets)]
        for group in found.groups
    ]
    if rows:
        shown.append(table(f"ms/image of the fastest run with an error of at most ..; {caption}", columns, rows))
    return shown


def _milliseconds(row: Measured | None) -> float | None:
    return None if row is None else 1e3 * row.seconds


def _ratios(one: Advantage) -> Iterator[list[Cell]]:
    """A row for each cost and rival."""
    names = {"largest": "the largest level alone", "any": "the best single level"}
    for what, ratio in one.against.items():
        unit, rival = what.split(", ")
        known = math.isfinite(ratio.low) and math.isfinite(ratio.high)
        interval = f"{ratio.low:.2f} to {ratio.high:.2f}" if known else "not reached"
        texts = [_text(value) for value in (one.sampler, one.solver, one.coins)]
        texts += [_number(one.mse, ".2g"), _text(unit), _text(names[rival])]
        yield [*texts, _number(ratio.ratio, ".2f"), Cell(interval, ratio.low if known else None)]


def _text(value: Any) -> Cell:
    return Cell(str(value), str(value))


def _number(value: Any, style: str) -> Cell:
    return Cell(format(value, style), value) if is_number(value) else Cell("–", None)


def _scaled(value: Any, factor: float) -> float | None:
    return value * factor if is_number(value) else None
