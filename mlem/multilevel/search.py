"""The search for the evaluations at which held corrections are measured, by predicted error.

The planner only calls `search`, so another search can replace this file. Tables say what is measured when: (R, K) bool
for R evaluations and K levels, the first column all true. Arrays are NumPy's: thousands of small ones.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlem.multilevel.covariance import CorrectionCovariance
from mlem.multilevel.estimators import ESTIMATORS
from mlem.multilevel.holding import Holding
from mlem.multilevel.plan import Plan
from mlem.multilevel.predict import Predictor
from mlem.waiting import Waiting

__all__ = ["search"]

POWERS = (0.0, 1 / 3, 2 / 3, 1.0)
"""Powers for the density of measurements: 0 is even; 2/3 is best for corrections as rough as a Brownian path."""
MULTIPLES = (1, 2, 4)
"""How many times as often as the level above it a level may be measured."""
STARTS = (0.0, 0.15, 0.35)
"""Shares of rows before the first measurement: where noise dominates, all levels nearly agree."""
CORRELATION_LENGTHS = (None, 4.0, 2.0, 1.0)
PROMISING = 24
"""Number of candidates tried with all correlation lengths."""
REFINED = 2
"""Number of candidates refined on each set of levels."""
HOPELESS = 10.0
"""Candidates whose error exceeds the best by this factor are not refined: refining gains less."""
SHIFTS = (-4, -2, -1, 1, 2, 4)
"""Distance by which a measurement is moved, in rows."""
PASSES = 4
NEGLIGIBLE = 1e-10
"""Errors below this share of the cheapest level's error are not refined."""

Array = NDArray[np.float64]
Table = NDArray[np.bool_]


def search(
    predictor: Predictor, subsets: Sequence[Sequence[str]], costs: Tensor, order: int, estimator: str, budget: float
) -> Plan | None:
    """The plan with the least predicted error found.

    Args:
        predictor: predicts the error.
        subsets: the sets of levels that a plan may use, each as names, cheapest first.
        costs: (K,), of one evaluation of each level of the family, the largest being 1.
        order: of extrapolation.
        estimator: one that holds corrections.
        budget: largest cost of the plan, in evaluations of the largest level.

    Returns: None if no plan is that cheap.
    """
    found: list[tuple[_Candidate, _Search]] = []
    refined: list[tuple[_Candidate, _Search]] = []
    with Waiting(f"searching for a plan of {predictor.rows} evaluations", (1 + REFINED) * len(subsets)) as waiting:
        for levels in subsets:
            one = _Search(predictor, levels, costs, order, estimator, budget)
            found += [(candidate, one) for candidate in one.candidates()]
            waiting.advance()
        if not found:
            return None
        negligible = NEGLIGIBLE * predictor.energy(-predictor.scale).item()
        hopeless = max(HOPELESS * min(candidate.energy for candidate, _ in found), negligible)
        for candidate, one in found:
            if candidate.energy <= hopeless:
                refined.append((one.refined(candidate, negligible), one))
            waiting.advance()
    best, one = min(refined, key=lambda pair: pair[0].energy)
    return Plan.given(
        torch.from_numpy(best.measured),
        estimator=estimator,
        order=order,
        levels=one.levels,
        correlation_length=best.length,
    )


class _Candidate(NamedTuple):
    """A table, the correlation length of held corrections, and the predicted error."""

    measured: Table
    length: float | None
    energy: float


class _Search:
    """The best rows at which to measure the corrections of `levels`, by predicted error.

    Candidates spread measurements over rows with a density that is a power of a correction's weight there, every level
    a whole number of times as often as the one above, sharing its rows; the best are then refined row by row.
    """

    def __init__(
        self, predictor: Predictor, levels: Sequence[str], costs: Tensor, order: int, estimator: str, budget: float
    ) -> None:
        self.levels = tuple(levels)
        self._covariance, self._order, self._estimator = predictor.covariance, order, ESTIMATORS[estimator]
        self._scale, self._times = predictor.scale.numpy(), predictor.times.numpy()
        self._rows, self._budget = predictor.rows, budget
        names = predictor.calibration.names
        self._costs = costs[[names.index(name) for name in levels]].numpy()
        *self._groups, self._missing = predictor.groups(levels)
        if self._groups:
            worth = predictor.worth(self._groups[0]).numpy()
            self._worth = np.maximum(worth, worth.max() * 1e-6 or 1.0)

    def candidates(self) -> list[_Candidate]:
        """The best spread tables within the budget, each with its best correlation lengths."""
        tables = self._tables()
        if not len(tables):
            return []
        found: list[_Candidate] = []
        for length in CORRELATION_LENGTHS if self._groups else (None,):
            energies = np.array(self._energies(tables, length))
            best = np.argsort(energies, kind="stable")
            found += [_Candidate(tables[one], length, energies[one].item()) for one in best[:REFINED].tolist()]
            tables = tables[best[:PROMISING]]
        return sorted(found, key=lambda one: one.energy)[:REFINED]

    def refined(self, found: _Candidate, negligible: float) -> _Candidate:
        """The candidate with each row's measurements moved to a neighbouring row, as long as that helps.

        Moving a row away from its neighbour may cost more: what follows is held, or revised.
        """
        holding = Holding(self._order, found.length)
        table = found.measured[None]
        deviations, cost = self._deviations(table, holding)[0], self._cost(table).item()
        state = _Moving(found, deviations, cost, self._covariance)
        for _ in range(PASSES):
            if (before := state.energy) <= negligible:
                break
            for row in np.flatnonzero(state.taken).tolist():
                self._move(state, row, holding)
            if state.energy > 0.99 * before:
                break
        return _Candidate(state.measured, found.length, self._energies(state.measured[None], found.length)[0])

    def _tables(self) -> Table:
        """Tables with as many measurements as the budget allows, one per way to spread them: (N, R, K)."""
        if not self._groups:
            alone = np.ones((1, self._rows, 1), dtype=bool)
            return alone[self._fitting(alone)]
        starts = sorted({int(start * self._rows) for start in STARTS})
        kinds = list(itertools.product(POWERS, itertools.product(MULTIPLES, repeat=len(self.levels) - 2), starts))
        most = min(self._rows, int(self._budget / self._costs[-1]))
        low, high = np.zeros(len(kinds), dtype=int), np.full(len(kinds), most)
        while (low < high).any():
            middle = (low + high + 1) // 2
            fits = self._fitting(self._spread(middle, kinds))
            low, high = np.where(fits, middle, low), np.where(fits, high, np.maximum(middle - 1, low))
        return self._spread(low, kinds)[low > 0]

    def _spread(self, counts: NDArray[Any], kinds: Sequence[tuple[float, tuple[int, ...], int]]) -> Table:
        """Tables with these numbers of measurements of the largest level, spread in these ways: (N, R, K)."""
        tables = np.zeros((len(kinds), self._rows, len(self.levels)), dtype=bool)
        tables[:, :, 0] = True
        for table, count, (power, multiples, start) in zip(tables, counts, kinds, strict=True):
            density = _capped(self._worth[start:] ** power, count * math.prod(multiples))
            passed = np.floor(density.cumsum() - density + 1e-9)  # whole numbers passed before each row
            rows = start + np.concatenate([[0], np.flatnonzero(passed[1:] > passed[:-1]) + 1])
            table[start, 1:] = True
            for level, stride in enumerate(itertools.accumulate((1, *multiples), operator.mul), 1):
                table[rows[::stride], level] = True
        return tables

    def _fitting(self, tables: Table) -> NDArray[np.bool_]:
        """Which of these tables (N, R, K) fit the budget: (N,)."""
        return self._cost(tables) <= self._budget

    def _cost(self, tables: Table) -> Array:
        """Costs of these tables (N, R, K): (N,)."""
        weighed = tables.copy()
        weighed[..., :-1] ^= tables[..., 1:]
        runs = self._estimator.runs(tables, weighed, self._order)
        return (runs.sum(1) * self._costs).sum(1)

    def _cost_after(self, state: _Moving, row: int, place: int) -> float:
        """Cost of the table after moving the measurements of a row; rows far from both keep their cost."""
        near = slice(*state.reach(range(len(self.levels)), min(row, place), max(row, place), 3))
        window = state.measured[near]
        before, after = self._cost(np.stack([window, _moved(window, row - near.start, place - near.start)])).tolist()
        return state.cost + after - before

    def _energies(self, tables: Table, length: float | None) -> list[float]:
        """Predicted errors of many tables: (N, R, K) -> N."""
        return self._covariance.energy(self._deviations(tables, Holding(self._order, length))).tolist()

    def _deviations(self, tables: Table, holding: Holding) -> Array:
        """Stand-in minus correction for tables (N, R, K): (N, C, R)."""
        deviations = np.zeros((len(tables), *self._scale.shape))
        for number, corrections in enumerate(self._groups, 1):
            for one in corrections:
                measured = tables[:, :, number]
                deviations[:, one] = self._estimator.deviations(measured, self._scale[one], self._times, holding)
        deviations[:, self._missing] = -self._scale[self._missing]
        return deviations

    def _move(self, state: _Moving, row: int, holding: Holding) -> None:
        """Make the best move of this row's measurements, if one helps and fits the budget."""
        near = [row + shift for shift in SHIFTS if 0 <= row + shift < self._rows]
        places = [place for place in near if not state.taken[place]]
        if not places:
            return
        change = self._change(state, row, places, holding)
        gains = state.gains(change)
        for number in np.argsort(gains, kind="stable").tolist():
            if gains[number] >= 0:
                return
            cost = self._cost_after(state, row, places[number])
            if cost <= self._budget:
                state.accept(_moved(state.measured, row, places[number]), change, number, float(gains[number]), cost)
                return

    def _change(self, state: _Moving, row: int, places: Sequence[int], holding: Holding) -> _Change:
        """Change of the deviations from moving the measurements of a row to these places.

        Nothing changes, or is computed, beyond the second measurement on either side.
        """
        levels = [level for level in range(1, len(self.levels)) if state.measured[row, level]]
        first, end = state.reach(levels, min(row, *places), max(row, *places), 2)
        window = state.measured[first:end]
        tables = np.stack([window, *(_moved(window, row - first, place - first) for place in places)])
        pairs = [(level, one) for level in levels for one in self._groups[level - 1]]
        corrections = np.array([one for _, one in pairs])
        each = tables[..., [level for level, _ in pairs]].swapaxes(1, 2).reshape(-1, end - first)
        scale = np.tile(self._scale[corrections, first:end], (len(tables), 1))
        found = self._estimator.deviations(each, scale, self._times[first:end], holding)
        found = found.reshape(len(tables), len(pairs), -1)
        by = found[1:] - found[0]
        rows = np.flatnonzero(by.any((0, 1)))
        return _Change(corrections, rows + first, by[..., rows])


class _Change(NamedTuple):
    """Changes of the deviations by N moves: of these corrections, at these rows, `by` (N, corrections, rows)."""

    corrections: NDArray[np.intp]
    rows: NDArray[np.intp]
    by: Array


class _Moving:
    """A table whose measurements are moved row by row, with its error.

    measured: the table. taken: (R,), the rows at which a correction is measured. energy, cost: its error and its cost.
    """

    def __init__(self, found: _Candidate, deviations: Array, cost: float, covariance: CorrectionCovariance) -> None:
        self.energy, self.cost, self._covariance, self._deviations = found.energy, cost, covariance, deviations
        self._set(found.measured)

    def _set(self, measured: Table) -> None:
        self.measured = measured
        self.taken = cast("list[bool]", measured[:, 1:].any(1).tolist())
        self._places = [np.flatnonzero(column) for column in measured.T]
        self._slope = 2 * self._covariance.times(self._deviations)

    def reach(self, levels: Sequence[int], low: int, high: int, count: int) -> tuple[int, int]:
        """The rows from `count` measurements of these levels before `low` to `count` after `high`."""
        first, end = low, high + 1
        for places in (self._places[level] for level in levels):
            before, after = np.searchsorted(places, [low, high + 1]).tolist()
            first = min(first, places[before - count] if before >= count else 0)
            end = max(end, places[after + count - 1] + 1 if after + count <= len(places) else len(self.measured))
        return int(first), int(end)

    def gains(self, change: _Change) -> Array:
        """Change of the error by each move: (N,)."""
        block = self._covariance.block(change.corrections, change.rows)
        flat = change.by.reshape(len(change.by), -1)
        slope = self._slope[change.corrections[:, None], change.rows].ravel()
        return flat @ slope + ((flat @ block.reshape(len(slope), -1)) * flat).sum(1)

    def accept(self, measured: Table, change: _Change, number: int, gain: float, cost: float) -> None:
        """Make this move, with the resulting table and cost."""
        self.energy, self.cost = self.energy + gain, cost
        self._deviations[change.corrections[:, None], change.rows] += change.by[number]
        self._set(measured)


def _moved(measured: Table, row: int, place: int) -> Table:
    """The table with the measurements of a row and a place exchanged."""
    moved = measured.copy()
    moved[place], moved[row] = measured[row], measured[place]
    return moved


def _capped(weights: Array, total: float) -> Array:
    """`min(1, c w)` with the c for which the sum is `total`, of weights w > 0: (R,)."""
    falling = np.sort(weights)[::-1]
    left = np.cumsum(falling[::-1])[::-1]  # the sum of each and all smaller ones
    factors = (total - np.arange(len(weights))) / left  # if all larger ones are 1
    fits = factors * falling <= 1
    return np.minimum(1.0, weights * factors[np.argmax(fits)]) if fits.any() else np.ones_like(weights)
