"""The search for the evaluations at which held corrections are measured, by predicted error.

`search` is all that the planner calls: another search replaces this file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from mlem.multilevel.estimators import ESTIMATORS
from mlem.multilevel.holding import Holding
from mlem.multilevel.plan import Plan
from mlem.multilevel.predict import Predictor

__all__ = ["search"]

POWERS = (0.0, 1 / 3, 2 / 3, 1.0)
"""Powers of the density of measurements: 0 is even; 2/3 is best for corrections as rough as a Brownian path."""
MULTIPLES = (1, 2, 4)
"""How many times as often as the level above a level may be measured."""
CORRELATION_LENGTHS = (None, 4.0, 2.0, 1.0)
REFINED = 2
"""How many of the candidates are refined."""


def search(
    predictor: Predictor, levels: Sequence[str], costs: Tensor, order: int, estimator: str, budget: float
) -> Plan | None:
    """The plan of least predicted error that was found.

    Args:
        predictor: what predicts the error.
        levels: names of the levels of the plan, cheapest first.
        costs: (K,), of one evaluation of each level of the family, the largest being 1.
        order: of extrapolation.
        estimator: one that holds corrections.
        budget: the cost that the plan may have, in evaluations of the largest level.

    Returns: None where no plan costs so little.
    """
    return _Search(predictor, levels, costs, order, estimator).plan(budget)


class _Search:
    """The best rows to measure the corrections of `levels` at, by predicted error.

    Candidates are spread over the rows with a density that is a power of what a correction is worth there, every level
    a whole number of times as often as the one above, at rows shared with it; the best is then refined row by row.
    """

    def __init__(self, predictor: Predictor, levels: Sequence[str], costs: Tensor, order: int, estimator: str) -> None:
        self._predictor, self._order, self._estimator = predictor, order, estimator
        *self._groups, self._missing = predictor.groups(levels)
        names = predictor.calibration.names
        self._levels = tuple(levels)
        self._costs = costs[[names.index(name) for name in levels]]
        self._rows = predictor.scale.shape[1]

    def plan(self, budget: float) -> Plan | None:
        """The plan found for a cost of at most `budget` (in evaluations of the largest level), or None."""
        tables = [table for table in self._candidates(budget) if table is not None]
        if not tables:
            return None
        stacked = torch.stack(tables)
        found: list[tuple[float, int, float | None]] = []
        for length in CORRELATION_LENGTHS:
            energies = cast("list[float]", self._energies(stacked, length).tolist())
            found += [(energy, i, length) for i, energy in enumerate(energies)]
        best = sorted(found, key=lambda one: one[0])[:REFINED]
        refined = [(*self._refine(tables[i], length, budget), length) for _, i, length in best]
        table, _, length = min(refined, key=lambda one: one[1])
        return self._plan(table, length)

    def _candidates(self, budget: float) -> list[Tensor | None]:
        if len(self._levels) == 1:
            alone = torch.ones(self._rows, 1, dtype=torch.bool)
            return [alone if self._fits(alone, budget) else None]
        multiples = list(itertools.product(MULTIPLES, repeat=len(self._levels) - 2))
        return [self._largest(budget, power, each) for power in POWERS for each in multiples]

    def _largest(self, budget: float, power: float, multiples: Sequence[int]) -> Tensor | None:
        """The table with as many measurements as the budget allows."""
        low, high = 0, self._rows
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._fits(self._spread(middle, power, multiples), budget)
            low, high = (middle, high) if fits else (low, middle - 1)
        return self._spread(low, power, multiples) if low else None

    def _spread(self, count: int, power: float, multiples: Sequence[int]) -> Tensor:
        """`count` measurements of the largest level: (R, K) bool."""
        table = torch.zeros(self._rows, len(self._levels), dtype=torch.bool)
        table[0] = table[:, 0] = True
        often = count * math.prod(multiples)
        worth = self._predictor.worth(self._groups[0])
        density = worth.clamp(min=worth.max() * 1e-6) ** power
        density = density / density.sum() * often
        for _ in range(20):  # no row is measured more than once: what exceeds it goes to the others
            free = density < 1
            density = torch.where(free, density * (often - (~free).sum()).clamp(min=0) / density[free].sum(), 1.0)
        passed = torch.floor(density.cumsum(0) - density + 1e-9)  # whole numbers passed before each row
        rows = passed.diff(prepend=torch.full((1,), -1.0)).nonzero().flatten()
        stride = 1
        for level in range(1, len(self._levels)):
            table[rows[::stride], level] = True
            stride *= multiples[level - 1] if level - 1 < len(multiples) else 1
        return table

    def _fits(self, measured: Tensor, budget: float) -> bool:
        return self._plan(measured).cost(self._costs) <= budget

    def _plan(self, measured: Tensor, length: float | None = None) -> Plan:
        return Plan.given(
            measured, estimator=self._estimator, order=self._order, levels=self._levels, correlation_length=length
        )

    def _energies(self, tables: Tensor, length: float | None) -> Tensor:
        """Predicted errors of many tables: (N, R, K) bool -> (N,)."""
        predictor, estimator, holding = self._predictor, ESTIMATORS[self._estimator], Holding(self._order, length)
        deviations = torch.zeros(len(tables), *predictor.scale.shape, dtype=torch.float64)
        for number, corrections in enumerate(self._groups, 1):
            for one in corrections:
                scale = predictor.scale[one]
                deviations[:, one] = estimator.deviations(tables[:, :, number], scale, predictor.times, holding)
        for one in self._missing:
            deviations[:, one] = -predictor.scale[one]
        return predictor.energy(deviations)

    def _refine(self, measured: Tensor, length: float | None, budget: float) -> tuple[Tensor, float]:
        """Move each row's measurements to a neighbouring row, as long as that helps; the table and its error.

        A row that is moved away from its neighbour may cost more: what comes after it is held, or revised.
        """
        energy = self._energies(measured[None], length).item()
        for _ in range(4):
            before = energy
            rows = cast("list[int]", measured[:, 1:].any(1).nonzero().flatten().tolist())
            for row in rows[1:]:
                measured, energy = self._moved(measured, energy, row, length, budget)
            if energy > 0.99 * before:
                break
        return measured, energy

    def _moved(
        self, measured: Tensor, energy: float, row: int, length: float | None, budget: float
    ) -> tuple[Tensor, float]:
        """The table and its error after the best move of this row's measurements, or the same where none helps."""
        near = [row + shift for shift in (-4, -2, -1, 1, 2, 4) if 0 < row + shift < self._rows]
        places = torch.tensor([place for place in near if not measured[place, 1:].any()], dtype=torch.int64)
        if not len(places):
            return measured, energy
        tables = measured.repeat(len(places), 1, 1)
        tables[torch.arange(len(places)), places, 1:] = measured[row, 1:]
        tables[:, row, 1:] = False
        energies = cast("list[float]", self._energies(tables, length).tolist())
        for place in sorted(range(len(energies)), key=energies.__getitem__):
            if energies[place] >= energy:
                break
            if self._fits(tables[place], budget):
                return tables[place], energies[place]
        return measured, energy
