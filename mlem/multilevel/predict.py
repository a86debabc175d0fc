"""The mean squared error of a plan, predicted from a calibration, and the best held plan by that prediction.

To first order a plan's error is linear in what the corrections add to a sample: for correction k, the sum over rows of
`d_k(i) q_k(i)`, with `q_k` the calibrated vectors and d what the plan says in the place of the correction, less the
correction itself, times the weight `s_i` of row i. The mean square is a quadratic form in d. Between calibrated times q
is a straight line plus, as far as it was found to be rough, a Brownian bridge.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlem.grids import TimeGrid
from mlem.multilevel.calibration import Calibration
from mlem.multilevel.coins import toss
from mlem.multilevel.plan import Plan
from mlem.schedule import NoiseSchedule
from mlem.solvers import GridPoint, Solver, quadrature_weights


class Predictor:
    """What a calibration says of plans for one solver on one grid; R rows, C corrections of the whole family."""

    def __init__(self, calibration: Calibration, schedule: NoiseSchedule, solver: Solver, grid: TimeGrid) -> None:
        self.calibration, self.solver, self.grid = calibration, solver, grid
        points, entered = GridPoint.of(schedule, grid), []
        _, rows = quadrature_weights(solver, schedule, points, lambda step, y: entered.append(y))
        kappa = torch.tensor([point.kappa for point in rows], dtype=torch.float64)
        self.times = -kappa.log()
        """-ln kappa at each row: (R,)."""
        found = calibration.responses["sde" if solver.stochastic else "ode"]
        knots = calibration.log_snr / 2
        place = _Place(self.times, knots)
        # what a row's noise estimate adds in a step reaches the sample from the end of that step on
        added = torch.stack(entered)[:, : len(rows)]
        added = added.diff(dim=0, prepend=torch.zeros_like(added[:1]))
        ends = -torch.tensor([point.kappa for point in points[1:]], dtype=torch.float64).log()
        reach = found.gain / torch.sigmoid(-calibration.log_snr).sqrt()  # gain over sigma
        reach = torch.exp(reach.log() @ _Place(ends, knots).matrix.T)  # (C, steps)
        self.scale = reach @ added * torch.tensor([point.alpha for point in rows], dtype=torch.float64)
        """How a unit of error in q at each row reaches the sample: (C, R)."""
        self.covariance = place.covariance(found)
        """Mean of `q_k(i) q_l(j)` per pixel: (C, R, C, R)."""

    @property
    def discretisation(self) -> float | None:
        """Mean squared error of the largest level at every row, by a power law between the measured step counts."""
        return self.discretisation_at(self.grid.steps)

    def discretisation_at(self, steps: int) -> float | None:
        """The same for another number of steps on this kind of grid."""
        found = self.calibration.discretisation.get(f"{self.solver.name}/{self.grid.name}")
        return None if found is None else _power_law(found, steps)

    def error(self, plan: Plan) -> float:
        """Mean squared error per pixel that the plan adds to the solver's: linear response, corrected by pilots."""
        return self._corrected(self.response_error(plan), plan)

    def response_error(self, plan: Plan) -> float:
        """`error` by linear response alone.

        Coins that rows toss independently: on average over them. Systematic ones: of this plan, and where samples toss
        their own on average over 256 of them. Raises ValueError where the first level does not always run.
        """
        if bool((plan.probabilities[:, 0] < 1).any()):
            raise ValueError("only a plan whose first level always runs can be predicted; give it probability 1")
        if plan.estimator == "jump" and plan.coins in ("bernoulli", "poisson", "nested"):
            return self.variance(plan)
        if plan.counts is None:
            tables = toss(plan.coins, plan.probabilities, plan.seed, torch.arange(256))
            plans = [replace(plan, counts=counts) for counts in tables]
        else:
            plans = [plan]
        return max(0.0, self.energy(torch.stack([self._deviations(one) for one in plans])).mean().item())

    def choice(self, plan: Plan) -> float:
        """What to compare plans on different levels by: coins by their variance, so that no lucky draw wins."""
        return self.response_error(plan) if plan.holds else self.variance(plan)

    def _corrected(self, error: float, plan: Plan) -> float:
        """Times measured over predicted, of the pilots nearest to that error on either side."""
        kind = "sde" if self.solver.stochastic else "ode"
        coins = [plan.coins if plan.coins == "systematic" else "bernoulli"] if plan.estimator == "jump" else []
        pilots = self.calibration.pilots.get("/".join([kind, plan.estimator, *coins]))
        if not pilots or error <= 0:
            return error
        predicted, measured = torch.tensor(pilots, dtype=torch.float64).log().T
        ratio = np.interp(math.log(error), predicted, measured - predicted)
        return error * math.exp(ratio)

    def total(self, plan: Plan) -> float:
        """`error` plus `discretisation`. Raises ValueError where that was not measured."""
        discretisation = self.discretisation
        if discretisation is None:
            measured = ", ".join(self.calibration.discretisation)
            raise ValueError(f"the error of {self.solver.name}/{self.grid.name} was not measured; choose of {measured}")
        return self.error(plan) + discretisation

    def variance(self, plan: Plan) -> float:
        """`response_error` on average over coins, as if rows tossed independently, plus what missing levels cost.

        `sum_k Var(count/p) s^2 V`, the variance being 1/p of Poisson counts and 1/p - 1 of the others, 0 where p = 1.
        Nested coins of two levels have the covariance `1/max(p, p') - 1`.
        """
        *groups, missing = self.groups(plan.levels)
        total = self.energy(self._missing(missing)).item()
        p = plan.probabilities
        for number, corrections in enumerate(groups, 1):
            chances = p[:, number]
            spread = 1 / chances - 1 if plan.coins != "poisson" else torch.where(chances < 1, 1 / chances, 0.0)
            total += (spread * self._products(corrections, corrections)).sum().item()
            for other, others in enumerate(groups[: number - 1], 1) if plan.coins == "nested" else ():
                spread = 1 / torch.maximum(chances, p[:, other]) - 1
                total += 2 * (spread * self._products(corrections, others)).sum().item()
        return total

    def allocation(self, levels: Sequence[str], costs: Tensor) -> Tensor:
        """`s sqrt(V_k / c_k)`, to be scaled: (R, K), the first column 1. costs: (K,) of all levels of the family."""
        names = self.calibration.names
        own = costs[[names.index(name) for name in levels]]
        paid = own[1:] + own[:-1]  # a coin makes both ends of its correction run
        columns = [self.worth(corrections) for corrections in self.groups(levels)[:-1]]
        table = torch.stack([torch.ones(self.scale.shape[1], dtype=torch.float64), *columns], 1)
        table[:, 1:] /= paid.sqrt()
        return table

    def worth(self, corrections: Sequence[int]) -> Tensor:
        """Root of what missing these corrections at one row alone would cost: (R,)."""
        return self._products(corrections, corrections).sqrt()

    def _products(self, corrections: Sequence[int], others: Sequence[int]) -> Tensor:
        """Mean product of what missing these and those corrections at one row alone does to a sample: (R,)."""
        rows = torch.arange(self.scale.shape[1])
        one, other = torch.tensor(corrections), torch.tensor(others)
        inner = self.covariance[one[:, None, None], rows, other[None, :, None], rows]  # (c, d, R)
        return torch.einsum("cr,cdr,dr->r", self.scale[one], inner, self.scale[other])

    def _missing(self, corrections: Sequence[int]) -> Tensor:
        deviations = torch.zeros_like(self.scale)
        deviations[list(corrections)] = -self.scale[list(corrections)]
        return deviations

    def energy(self, deviations: Tensor) -> Tensor:
        """The quadratic form: (.., C, R) -> (..)."""
        flat = deviations.flatten(-2)
        size = flat.shape[-1]
        return ((flat @ self.covariance.reshape(size, size)) * flat).sum(-1)

    def groups(self, levels: Sequence[str]) -> list[list[int]]:
        """Which corrections of the family each one of a plan on `levels` stands for; those it lacks come last."""
        places = [self.calibration.names.index(name) for name in levels or self.calibration.names]
        between = [list(range(low, high)) for low, high in itertools.pairwise(places)]
        return [*between, list(range(places[-1], len(self.calibration.names) - 1))]

    def _deviations(self, plan: Plan) -> Tensor:
        """d: (C, R)."""
        assert plan.counts is not None
        *held, missing = self.groups(plan.levels)
        deviations = self._missing(missing)
        for number, corrections in enumerate(held, 1):
            counts = plan.counts[:, number]
            for correction in corrections:
                scale = self.scale[correction]
                if plan.holds:
                    how = {"order": plan.order, "estimator": plan.estimator, "memory": plan.memory}
                    said = held_deviation(counts.bool()[None], scale, self.times, **how)[0]
                else:
                    said = scale * (counts / plan.probabilities[:, number] - 1)
                deviations[correction] = said
        return deviations


class _Place:
    """Where rows lie among the calibrated times."""

    def __init__(self, times: Tensor, knots: Tensor) -> None:
        inside = times.clamp(knots[0], knots[-1])
        self._cell = (torch.searchsorted(knots, inside, right=True) - 1).clamp(0, len(knots) - 2)
        self._share = (inside - knots[self._cell]) / (knots[self._cell + 1] - knots[self._cell])
        rows = torch.arange(len(times))
        self.matrix = torch.zeros(len(times), len(knots), dtype=torch.float64)
        self.matrix[rows, self._cell] = 1 - self._share
        self.matrix[rows, self._cell + 1] = self._share

    def covariance(self, found: object) -> Tensor:
        """Straight lines between the calibrated times, and bridges: (C, R, C, R)."""
        inner, roughness = found.inner, found.roughness  # type: ignore[attr-defined]
        straight = torch.einsum("it,ktls,js->kilj", self.matrix, inner, self.matrix)
        change = inner.diff(dim=1).diff(dim=3).diagonal(dim1=1, dim2=3)  # (C, C, T-1)
        change = change * (roughness[:, None] * roughness).sqrt()[..., None]
        same = self._cell[:, None] == self._cell
        bridge = (torch.minimum(self._share[:, None], self._share) - self._share[:, None] * self._share) * same
        return straight + (change[:, :, self._cell][..., None] * bridge).permute(0, 2, 1, 3)


def held_deviation(
    measured: Tensor, scale: Tensor, times: Tensor, *, order: int, estimator: str, memory: float | None
) -> Tensor:
    """d of corrections measured where `measured` (N, R) is true, in N plans at once: (N, R). scale, times: (R,)."""
    rows = measured.shape[1]
    number = torch.arange(rows).expand_as(measured)
    last = torch.where(measured, number, 0).cummax(1).values
    before = torch.cat([torch.zeros_like(last[:, :1]), last[:, :-1]], 1).gather(1, last)  # the one before the last
    later = torch.where(measured, number, rows).flip(1).cummin(1).values.flip(1)
    between = (later < rows) if estimator == "hindsight" else torch.zeros_like(measured)
    second = torch.where(between, later.clamp(max=rows - 1), before if order else last)
    passed, span = times - times[last], times[second] - times[last]
    slope = torch.where(span != 0, passed / torch.where(span != 0, span, 1.0), 0.0)
    first = 1 - slope
    if memory is not None:
        bridge = torch.sinh(span.clamp(min=1e-9) / memory)
        first = torch.where(between, torch.sinh((span - passed) / memory) / bridge, first)
        slope = torch.where(between, torch.sinh(passed / memory) / bridge, slope)
        first = torch.where(second == last, torch.exp(-passed / memory), first)
    first, slope = torch.where(measured, 1.0, first), torch.where(measured, 0.0, slope)
    said = torch.zeros(measured.shape, dtype=torch.float64)
    said.scatter_add_(1, last, scale * first)
    said.scatter_add_(1, second, scale * slope)
    return said - scale


def _power_law(points: dict[int, float], steps: int) -> float:
    """Between two measured step counts, and beyond them, a straight line in the logarithms."""
    counts = sorted(points)
    high = min(max(1, sum(count < steps for count in counts)), len(counts) - 1)
    a, b = counts[high - 1], counts[high]
    slope = math.log(points[b] / points[a]) / math.log(b / a)
    return points[a] * (steps / a) ** slope


class Search:
    """The best rows to measure the corrections of `levels` at, by predicted error.

    Candidates are spread over the rows with a density that is a power of what a correction is worth there, every level
    a whole number of times as often as the one above, at rows shared with it; the best is then refined row by row.
    """

    powers = (0.0, 1 / 3, 2 / 3, 1.0)
    """0 is even; 2/3 is best for corrections as rough as a Brownian path."""
    multiples = (1, 2, 4)
    memories = (None, 4.0, 2.0, 1.0)
    refined = 2
    """How many of the candidates are refined."""

    def __init__(self, predictor: Predictor, levels: Sequence[str], costs: Tensor, order: int, estimator: str) -> None:
        """costs: (K,) of all levels of the family."""
        self._predictor = predictor
        self._how: dict[str, Any] = {"order": order, "estimator": estimator}
        *self._groups, self._missing = predictor.groups(levels)
        names = predictor.calibration.names
        self.levels = tuple(levels)
        self._costs = costs[[names.index(name) for name in levels]]
        self._rows = predictor.scale.shape[1]

    def plan(self, budget: float) -> Plan | None:
        """The plan found for a cost of at most `budget` (in evaluations of the largest level), or None."""
        tables = [table for table in self._candidates(budget) if table is not None]
        if not tables:
            return None
        stacked = torch.stack(tables)
        found = [(energy, i, m) for m in self.memories for i, energy in enumerate(self._energies(stacked, m).tolist())]
        refined = [
            (*self._refine(tables[i], m, budget), m)
            for _, i, m in sorted(found, key=lambda one: one[0])[: self.refined]
        ]
        table, _, memory = min(refined, key=lambda one: one[1])
        return self._plan(table, memory)

    def _candidates(self, budget: float) -> list[Tensor | None]:
        if len(self.levels) == 1:
            alone = torch.ones(self._rows, 1, dtype=torch.bool)
            return [alone if self._fits(alone, budget) else None]
        multiples = list(itertools.product(self.multiples, repeat=len(self.levels) - 2))
        return [self._largest(budget, power, each) for power in self.powers for each in multiples]

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
        table = torch.zeros(self._rows, len(self.levels), dtype=torch.bool)
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
        for level in range(1, len(self.levels)):
            table[rows[::stride], level] = True
            stride *= multiples[level - 1] if level - 1 < len(multiples) else 1
        return table

    def _fits(self, measured: Tensor, budget: float) -> bool:
        return self._plan(measured).cost(self._costs) <= budget

    def _plan(self, measured: Tensor, memory: float | None = None) -> Plan:
        return Plan.given(measured, **self._how, memory=memory, levels=self.levels)

    def _energies(self, tables: Tensor, memory: float | None) -> Tensor:
        """Predicted errors of many tables: (N, R, K) bool -> (N,)."""
        predictor = self._predictor
        deviations = torch.zeros(len(tables), *predictor.scale.shape, dtype=torch.float64)
        for number, corrections in enumerate(self._groups, 1):
            for one in corrections:
                scale = predictor.scale[one]
                said = held_deviation(tables[:, :, number], scale, predictor.times, **self._how, memory=memory)
                deviations[:, one] = said
        for one in self._missing:
            deviations[:, one] = -predictor.scale[one]
        return predictor.energy(deviations)

    def _refine(self, measured: Tensor, memory: float | None, budget: float) -> tuple[Tensor, float]:
        """Move each row's measurements to a neighbouring row, as long as that helps; the table and its error.

        A row that is moved away from its neighbour may cost more: what comes after it is held, or revised.
        """
        energy = self._energies(measured[None], memory).item()
        for _ in range(4):
            before = energy
            for row in measured[:, 1:].any(1).nonzero().flatten().tolist()[1:]:
                shifts = [row + shift for shift in (-4, -2, -1, 1, 2, 4) if 0 < row + shift < self._rows]
                places = torch.tensor([place for place in shifts if not measured[place, 1:].any()], dtype=torch.int64)
                if not len(places):
                    continue
                tables = measured.repeat(len(places), 1, 1)
                tables[torch.arange(len(places)), places, 1:] = measured[row, 1:]
                tables[:, row, 1:] = False
                energies = self._energies(tables, memory).tolist()
                for place in sorted(range(len(energies)), key=energies.__getitem__):
                    if energies[place] >= energy:
                        break
                    if self._fits(tables[place], budget):
                        measured, energy = tables[place], energies[place]
                        break
            if energy > 0.99 * before:
                break
        return measured, energy
