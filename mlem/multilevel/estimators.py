"""Estimators: stand-ins for levels that are not evaluated. Each kind is a class; names are in `ESTIMATORS`.

`f^1 .. f^K` are the levels of a plan, cheapest first, `g^k = f^k - f^(k-1)` their corrections (`g^1 = f^1`). A table
of counts says which corrections are evaluated at which row.

- jump: `F = sum_k (count_k / p_k) g^k`, unbiased ([J], arXiv:2603.24594);
- held: a correction that is evaluated is measured; between two measurements it is extrapolated from the last one
  (order 0) or the last two (order 1, linearly in `-ln kappa`): see `holding.py`. Biased but smooth, so multistep
  solvers work. If not measured at the first row, it is 0 there;
- hindsight: held, and when a correction is measured again, the state is moved by the extrapolation error, as given by
  interpolation between measurements (ours; like the corrector of a multistep method, for the correction alone, in the
  mode PEC: no level is evaluated again after the move);
- switch: one level runs at each row, and no correction above it counts (T-Stitch, arXiv:2402.14167; a searched sequence
  is OMS-DPM's, arXiv:2306.08860). The larger levels' corrections are lost;
- forecast: a single level whose outputs are extrapolated where it does not run (TaylorSeer, arXiv:2503.06923, applied
  to the output).

Weights are collected before anything is evaluated: `F = sum_k w_k f^k` with `w_k = W_k - W_(k+1)`, W_k being that of
`g^k`; and a level of weight zero is not run, unless a held correction has to be measured.

Here is which levels run, the predicted error, and the choice of evaluator for a trajectory. The evaluators themselves
are in `evaluators.py`. Tables are (R, K): R evaluations, K levels. Tables of levels that run may be stacked,
(.., R, K), and are NumPy's, as a search needs thousands of small ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlem.denoiser import Denoiser
from mlem.multilevel import choices
from mlem.multilevel.coins import check_probabilities
from mlem.multilevel.evaluators import (
    Evaluator,
    ForecastEvaluator,
    HeldEvaluator,
    HindsightEvaluator,
    JumpEvaluator,
    Program,
)
from mlem.multilevel.holding import Holding
from mlem.schedule import NoiseSchedule

__all__ = ["ESTIMATORS", "Estimator", "Forecast", "Held", "Hindsight", "Jump", "Switch", "collect", "estimator_called"]

Levels = Sequence[Denoiser]
Quadrature = Sequence[float] | None
Array = NDArray[Any]
Table = NDArray[np.bool_]


class Estimator(ABC):
    """How an evaluation is made, its cost, and its error relative to the largest level."""

    name: ClassVar[str]
    extrapolates: ClassVar[str] = "a held correction"

    @property
    def orders(self) -> tuple[int, ...]:
        """Allowed orders of extrapolation."""
        return choices.ESTIMATORS[self.name].orders

    @property
    def holds(self) -> bool:
        """Whether corrections are held between measurements, so that one plan serves all samples."""
        return choices.ESTIMATORS[self.name].holds

    @property
    def moves_state(self) -> bool:
        """Whether the state is moved between evaluations."""
        return choices.ESTIMATORS[self.name].moves_state

    @property
    def searched(self) -> bool:
        """Whether a plan's rows are chosen, without coins."""
        return choices.ESTIMATORS[self.name].searched

    @abstractmethod
    def check(self, probabilities: Tensor, counts: Tensor | None) -> None:
        """Raise ValueError for tables that this estimator cannot use; counts: None if samples have their own."""

    def tossed(self, counts: Tensor) -> Tensor:
        """The counts used, from those of the coins."""
        return counts

    @abstractmethod
    def correction_weights(self, counts: Tensor, probabilities: Tensor) -> Tensor:
        """W_k, the weights of the corrections: float64."""

    def stored(self, measured: Table, order: int) -> Table:
        """Where a correction is measured and used again at a later row."""
        return np.zeros_like(measured)

    def revising(self, measured: Table) -> Table:
        """The levels that run to move the state before a row; they do not run again to evaluate it."""
        return np.zeros_like(measured)

    def evaluated(self, measured: Table, weighed: Table, order: int) -> Table:
        """The levels that run at each evaluation; weighed: levels with a nonzero collected weight."""
        return weighed

    def runs(self, measured: Table, weighed: Table, order: int) -> NDArray[np.int64]:
        """How often each level is evaluated at each row."""
        return self.evaluated(measured, weighed, order).astype(np.int64) + self.revising(measured)

    @abstractmethod
    def deviations(self, weights: Array, scale: Array, times: Array, holding: Holding) -> Array:
        """Stand-in minus correction, for N plans, as coefficients of the correction.

        Args:
            weights: (N, R), its `correction_weights`.
            scale: (R,), or (N, R), weight of an error at each row.
            times: (R,), `-ln kappa` of each row.
            holding: the rules for stand-ins.

        Returns: (N, R); the error of a plan is the sum over rows of these times the correction.
        """

    @abstractmethod
    def evaluator(self, levels: Levels, schedule: NoiseSchedule, program: Program, quadrature: Quadrature) -> Evaluator:
        """The evaluator of one trajectory.

        Args:
            levels: denoisers, cheapest first.
            schedule: of the denoisers.
            program: the plan, with coins shared by all samples.
            quadrature: weight of each evaluation in the end of a trajectory, if the state is moved.

        Raises:
            ValueError: quadrature is missing.
        """


class Jump(Estimator):
    """A correction counts `count / p` times where its coin fell, and 0 elsewhere: unbiased at every row."""

    name = "jump"

    def check(self, probabilities: Tensor, counts: Tensor | None) -> None:
        check_probabilities(probabilities)

    def correction_weights(self, counts: Tensor, probabilities: Tensor) -> Tensor:
        return (counts / probabilities).double()

    def deviations(self, weights: Array, scale: Array, times: Array, holding: Holding) -> Array:
        return scale * (weights - 1)

    def evaluator(self, levels: Levels, schedule: NoiseSchedule, program: Program, quadrature: Quadrature) -> Evaluator:
        return JumpEvaluator(levels, program)


class Switch(Jump):
    """One level at each evaluation; corrections of larger levels are lost."""

    name = "switch"

    def check(self, probabilities: Tensor, counts: Tensor | None) -> None:
        table = probabilities if counts is None else counts
        fits = table.dim() == 2 and table.numel() > 0 and bool(((table == 0) | (table == 1)).all())
        if counts is None or not fits or bool((table[:, 1:] > table[:, :-1]).any() or (table[:, 0] != 1).any()):
            raise ValueError("a switching plan runs one level at each evaluation: make it with Plan.switching")

    def correction_weights(self, counts: Tensor, probabilities: Tensor) -> Tensor:
        return counts.double()


class Held(Estimator):
    """The last measured correction, kept or extrapolated, until the next measurement."""

    name = "held"

    def check(self, probabilities: Tensor, counts: Tensor | None) -> None:
        p = probabilities
        if p.dim() != 2 or p.numel() == 0 or not bool(((p >= 0) & (p <= 1)).all()):  # 0 if rows are chosen
            raise ValueError(
                f"probabilities must be a table (evaluations, levels) of numbers in [0, 1], got shape {tuple(p.shape)}"
            )
        if counts is None:
            raise ValueError("held corrections need one plan for all samples; leave out per_sample, or estimator=jump")
        if counts.shape == p.shape and not bool(counts[:, 0].all() and counts.any(0).all()):
            raise ValueError("held corrections must be measured at some row, and the cheapest level at every row")

    def tossed(self, counts: Tensor) -> Tensor:
        counts = counts.clone()
        counts[:, 0] = counts[0] = 1  # the cheapest level always runs, and at the first row nothing is held yet
        return counts

    def correction_weights(self, counts: Tensor, probabilities: Tensor) -> Tensor:
        return counts.bool().double()  # measured or not, however often its coin fell

    def stored(self, measured: Table, order: int) -> Table:
        later = _next(measured)
        last = measured.shape[-2] - 1
        gap = measured & (later > np.arange(1, last + 2)[:, None])
        if order == 0:
            return gap
        # a straight line needs the last two
        return gap | (measured & (later <= last) & np.take_along_axis(gap, np.minimum(later, last), -2))

    def evaluated(self, measured: Table, weighed: Table, order: int) -> Table:
        stored = self.stored(measured, order)
        return weighed | stored | _level_above(stored)

    def deviations(self, weights: Array, scale: Array, times: Array, holding: Holding) -> Array:
        return holding.deviations(weights != 0, scale, times, hindsight=self.moves_state)

    def evaluator(self, levels: Levels, schedule: NoiseSchedule, program: Program, quadrature: Quadrature) -> Evaluator:
        return HeldEvaluator(levels, schedule, program)


class Hindsight(Held):
    """`Held`; a new measurement also moves the state by the extrapolation error, found by interpolation."""

    name = "hindsight"

    def revising(self, measured: Table) -> Table:
        return _revised(measured)[..., None] & (measured | _level_above(measured))

    def evaluated(self, measured: Table, weighed: Table, order: int) -> Table:
        return super().evaluated(measured, weighed, order) & ~_revised(measured)[..., None]

    def evaluator(self, levels: Levels, schedule: NoiseSchedule, program: Program, quadrature: Quadrature) -> Evaluator:
        if quadrature is None:
            raise ValueError(
                "hindsight moves the state between calls, which only sample() supports; use estimator=held"
            )
        return HindsightEvaluator(levels, schedule, program, quadrature)


class Forecast(Estimator):
    """The output of one level, extrapolated until it runs again."""

    name, extrapolates = "forecast", "a forecast"

    def check(self, probabilities: Tensor, counts: Tensor | None) -> None:
        fits = counts is not None and counts.dim() == 2 and counts.shape[1] == 1 and len(counts) > 0
        if counts is None or not fits or bool(((counts != 0) & (counts != 1)).any()) or counts[0] != 1:
            raise ValueError("a forecast has one level, which runs at the first evaluation; use Plan.forecast")

    def correction_weights(self, counts: Tensor, probabilities: Tensor) -> Tensor:
        return counts.double()

    def deviations(self, weights: Array, scale: Array, times: Array, holding: Holding) -> Array:
        raise ValueError("the error of a forecast cannot be predicted: sample with it and measure")

    def evaluator(self, levels: Levels, schedule: NoiseSchedule, program: Program, quadrature: Quadrature) -> Evaluator:
        return ForecastEvaluator(levels, schedule, program)


ESTIMATORS: dict[str, Estimator] = {one.name: one for one in (Jump(), Held(), Hindsight(), Switch(), Forecast())}
"""Name -> estimator."""


def estimator_called(name: str) -> Estimator:
    """The estimator of this name. Raises ValueError listing the names."""
    choices.check_choice("estimator", name, tuple(choices.ESTIMATORS))
    return ESTIMATORS[name]


def _next(measured: Table) -> NDArray[np.intp]:
    """For each row, the next row after it at which a level is measured; R if there is none."""
    rows = measured.shape[-2]
    number = np.full(measured.shape, rows)
    later = np.where(measured, np.arange(rows)[:, None], rows)[..., :0:-1, :]
    number[..., :-1, :] = np.minimum.accumulate(later, axis=-2)[..., ::-1, :]
    return number


def _revised(measured: Table) -> Table:
    """Rows at which a correction is measured after a gap: (.., R)."""
    again = measured.copy()
    again[..., 1:, :] &= ~measured[..., :-1, :]
    again[..., :2, :] = False  # at the first row, all is known
    return np.logical_or.reduce(again[..., 1:], axis=-1)


def _level_above(table: Table) -> Table:
    """For each level, the entry of the level above it."""
    above = np.zeros_like(table)
    above[..., :-1] = table[..., 1:]
    return above


def collect(weights: Tensor) -> Tensor:
    """Weights of levels from weights of corrections: (.., K) -> (.., K), `w_k = W_k - W_(k+1)`."""
    return weights - torch.cat([weights[..., 1:], torch.zeros_like(weights[..., :1])], -1)
