"""Which levels run along a trajectory under a plan, and with what probability: numbers, words and figures.

Reading them back needs no torch.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlem.files import damaged, read_object, write_record
from mlem.plots import level_rates, trajectory_strips

if TYPE_CHECKING:
    from mlem.multilevel.plan import Plan
    from mlem.solvers import GridPoints, Solver

__all__ = ["CALLS", "FIGURES", "Calls", "draw_calls", "read_calls", "write_calls"]

CALLS = "calls.json"
FIGURES = ("calls_along_trajectory", "plan_probabilities")
"""Names of the figures made by `draw_calls`."""


@dataclass(frozen=True)
class Calls:
    """The calls of one plan; R evaluations of the denoiser, from noise to image, K levels.

    Args:
        name: of the sampler, in words.
        levels: names, cheapest first.
        times: (R,), t of each evaluation, in [0, 1].
        runs: (R, K), how often each level is called.
        probabilities: (R, K), p_k; without coins, one over the distance between two measurements of a correction.
    """

    name: str
    levels: tuple[str, ...]
    times: tuple[float, ...]
    runs: tuple[tuple[int, ...], ...]
    probabilities: tuple[tuple[float, ...], ...]

    @staticmethod
    def of(name: str, plan: Plan, names: Sequence[str], solver: Solver, points: GridPoints) -> Calls | None:
        """The calls of a plan; None if every sample tosses its own coins.

        Args:
            name: in words.
            plan: for this solver and these points.
            names: of the family's levels.
            solver, points: of sampling.
        """
        from mlem.solvers import quadrature_weights

        if plan.counts is None:
            return None
        _, asked = quadrature_weights(solver, points.schedule, points)
        p = plan.probabilities.tolist() if plan.coins != "given" else _rates(plan.counts.bool().tolist())
        times = tuple(point.t for point in asked)
        return Calls(name, plan.levels or tuple(names), times, _tuples(plan.runs.tolist()), _tuples(p))

    @property
    def text(self) -> str:
        """Text alternative of the figure: where each level is called, evaluations counted from 1."""
        return f"{self.name}: " + "; ".join(self._level(*one) for one in enumerate(self.levels))

    def _level(self, number: int, name: str) -> str:
        at = [row for row, runs in enumerate(self.runs, 1) if runs[number]]
        if len(at) in (0, len(self.runs)):
            return f"{name} {'at all' if at else 'at none of'} {len(self.runs)} evaluations"
        return f"{name} at {len(at)}: {', '.join(_ranges(at))}"

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> Calls:
        """Calls from the result of `asdict`. Raises KeyError, TypeError or ValueError for other data."""
        found = Calls(
            str(plain["name"]),
            tuple(map(str, plain["levels"])),
            tuple(map(float, plain["times"])),
            tuple(tuple(map(int, row)) for row in plain["runs"]),
            tuple(tuple(map(float, row)) for row in plain["probabilities"]),
        )
        rows, columns = len(found.times), len(found.levels)
        for table in (found.runs, found.probabilities):
            if len(table) != rows or any(len(row) != columns for row in table):
                raise ValueError(f"tables of {found.name} are not {rows} x {columns}")
        return found


def _rates(measured: Sequence[Sequence[bool]]) -> list[list[float]]:
    """One over the distance to the next measurement, starting at each; 0 before the first."""
    columns = []
    for column in zip(*measured, strict=True):
        at = [row for row, here in enumerate(column) if here]
        gaps = [later - row for row, later in itertools.pairwise([*at, len(column)])]
        before = [0.0] * (at[0] if at else len(column))
        columns.append([*before, *(1 / gap for gap in gaps for _ in range(gap))])
    return [list(row) for row in zip(*columns, strict=True)]


def _tuples(table: Sequence[Sequence[Any]]) -> tuple[tuple[Any, ...], ...]:
    return tuple(map(tuple, table))


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    """1, 2, 3, 7 as "1 to 3" and "7"."""
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        yield f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0])


def write_calls(path: str | os.PathLike[str], calls: Sequence[Calls]) -> None:
    """Write them as JSON."""
    write_record(path, {"calls": [asdict(one) for one in calls]})


def read_calls(path: Path) -> list[Calls]:
    """Calls written by `write_calls`; empty without a file. Raises ValueError naming a damaged one."""
    if not path.exists():
        return []
    found = read_object(path)
    with damaged(path):
        return [Calls.from_json(one) for one in found["calls"]]


def draw_calls(calls: Sequence[Calls], folder: Path) -> None:
    """Draw strips of calls and p_k(t) of these plans, in this order, as FIGURES in a folder."""
    strips, rates = (folder / f"{name}.png" for name in FIGURES)
    trajectory_strips([(one.name, _columns(one, one.runs)) for one in calls], strips)
    level_rates([(one.name, one.times, _columns(one, one.probabilities)) for one in calls], rates)


def _columns(calls: Calls, table: Sequence[Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
    """By level."""
    return dict(zip(calls.levels, zip(*table, strict=True), strict=True))
