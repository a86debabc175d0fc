"""Figures of plans: which levels run along a trajectory, and p_k(t)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from mlem.comparison.calls import CALLS, FIGURES, Calls, draw_calls, read_calls
from mlem.comparison.recommended import NAME, Recommended
from mlem.report.html import Markup, figure, tag

__all__ = ["plan_figures", "plan_pictures"]


def plan_pictures(folder: Path, home: Path) -> dict[str, bytes]:
    """Name of a figure -> PNG, of the recommended plans and those in the evaluation; empty without plans.

    Args:
        folder: of the run.
        home: of the evaluation.
    """
    calls = _calls(folder, home)
    return dict(zip(FIGURES, _drawn(calls), strict=True)) if calls else {}


def plan_figures(folder: Path, home: Path) -> list[Markup]:
    """The same as figures of the page, with text alternatives."""
    pictures = plan_pictures(folder, home)
    if not pictures:
        return []
    calls = _calls(folder, home)
    strips, rates = (pictures[name] for name in FIGURES)
    words = tag("details", tag("summary", "The same in words"), tag("ul", *(tag("li", one.text) for one in calls)))
    names = ", ".join(one.name for one in calls)
    seen = "Which levels run along a trajectory: one row per level, one column per evaluation."
    p = "p_k(t): the probability of each level; without coins, one over the distance between its evaluations."
    return [
        figure(strips, f"Figure: calls along a trajectory. {'. '.join(one.text for one in calls)}", seen),
        figure(rates, f"Figure: p_k(t), from noise to image, of {names}", p),
        words,
    ]


def _calls(folder: Path, home: Path) -> tuple[Calls, ...]:
    known = folder / NAME
    recommended = Recommended.load(known).calls if known.exists() else ()
    return (*recommended, *read_calls(home / CALLS))


@lru_cache(8)
def _drawn(calls: tuple[Calls, ...]) -> tuple[bytes, ...]:
    """The PNG of each figure, cached: a command shows them more than once."""
    with TemporaryDirectory() as folder:
        draw_calls(calls, Path(folder))
        return tuple((Path(folder) / f"{name}.png").read_bytes() for name in FIGURES)
