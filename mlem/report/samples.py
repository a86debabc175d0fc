"""Samples of all samplers, aligned: the same indices from the same noise, in the same columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlem.comparison.row import Row
from mlem.report.html import Markup, figure, join, tag
from mlem.report.tables import evaluation_rows

__all__ = ["sample_strips"]

_ALIGNED = (
    "Every strip shows the same indices in the same places, from the same noise. First is the many-step run that the "
    "others are measured against; last are those, if any, that share only its distribution."
)


def sample_strips(home: Path | None) -> list[Markup]:
    """A strip for each sampler, under its reference; smaller levels alone are collapsed.

    home: of `evaluation.json`, if there is one.
    """
    rows = [] if home is None else evaluation_rows(home)[0]
    largest = next((row.level for row in reversed(rows) if not row.shared), "")
    main = [row for row in rows if row.shared or row.level == largest]
    smaller = [row for row in rows if row not in main]
    shown, folded = (_strips(home, some) for some in (main, smaller)) if home is not None else ([], [])
    if not shown and not folded:
        return []
    parts = [tag("p", _ALIGNED), *shown]
    if folded:
        parts.append(tag("details", tag("summary", "Smaller levels alone"), *folded))
    return [join(parts)]


def _strips(home: Path, rows: Sequence[Row]) -> list[Markup]:
    """One block per reference."""
    blocks = []
    for reference in sorted(dict.fromkeys(row.reference for row in rows), key=lambda one: not one):
        own = [row for row in rows if row.reference == reference]
        first = _strip(home, f"reference_{reference}", f"the reference, many steps of {reference}", "reference")
        shown = [first, *(_strip(home, row.picture, _words(row), "strip") for row in own)]
        if found := [one for one in shown if one]:
            blocks.append(tag("div", *found, class_="strips"))
    return blocks


def _words(row: Row) -> str:
    level = "several levels" if row.shared else f"level {row.level}"
    return f"{row.sampler}, {row.steps} steps{f', {row.target}' if row.target else ''}; {level}"


def _strip(home: Path, name: str, words: str, kind: str) -> Markup:
    """The strip; the whole grid if an older evaluation left no strips; nothing if there is neither."""
    for folder in ("strips", "grids"):
        path = home / folder / f"{name}.png"
        if path.exists():
            return figure(path.read_bytes(), f"Samples of {words}", words, kind)
    return Markup()
