"""Alternating predictor and corrector (Algorithm 3, arXiv:2406.00924, and its parallel form).

Stretches of randomized-midpoint steps, each followed by underdamped Langevin dynamics at the noise level reached; on
the paper's grid (`ou_halving`) the last stretch has halving steps. The step to kappa = 0 has no correction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mlem.brownian import NoisePath
from mlem.solvers.base import GridPoint, GridPoints, NoiseEstimate, Solver
from mlem.solvers.lipschitz import Lipschitz
from mlem.solvers.parallel_midpoint import ParallelMidpoint
from mlem.solvers.randomized_midpoint import RandomizedMidpoint
from mlem.solvers.underdamped_langevin import UnderdampedLangevin

__all__ = ["CORRECTIONS", "PREDICTORS", "PredictorCorrector"]

PREDICTORS = ("randomized_midpoint", "parallel_midpoint")
"""Names of the solvers that may predict."""
CORRECTIONS = 5
"""Default number of corrections when no Lipschitz constant sets the length of a stretch."""


class _State(NamedTuple):
    predictor: Any
    step: int
    corrected: frozenset[int]
    """Steps that are followed by a correction."""
    indices: Tensor
    seed: int


class PredictorCorrector(Solver):
    """`steps` predictor steps with corrections in between.

    predictor: randomized_midpoint or parallel_midpoint, with its clock. corrector: underdamped, midpoint or parallel;
    time, step, friction and rounds: see `UnderdampedLangevin`. lipschitz: of the score of x_t, a number for all t or a
    table (t, L) as from `estimate_lipschitz`; None: 1 / sigma_t^2. It sets the corrector's step sizes and, if a
    number, stretches of OU time 1 / L. every: steps per stretch, set by hand; with neither, five corrections.
    Raises ValueError for options out of range.
    """

    name = "predictor_corrector"
    order = 1.5
    stochastic = True
    reference = "dpm_solver_pp"
    coupled = False
    linear = False

    def __init__(
        self,
        predictor: str = "randomized_midpoint",
        corrector: str = "underdamped",
        every: int | None = None,
        lipschitz: float | Sequence[tuple[float, float]] | None = None,
        time: float = 1.0,
        step: float = 0.25,
        friction: float = 2.0,
        rounds: int = 4,
        clock: str = "kappa",
    ) -> None:
        if predictor not in PREDICTORS:
            raise ValueError(f"predictor must be one of {', '.join(PREDICTORS)}, got {predictor!r}")
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f"every must be a whole number of steps >= 1, got {every!r}")
        self.predictor: Solver = RandomizedMidpoint(clock)
        if predictor == "parallel_midpoint":
            self.predictor = ParallelMidpoint(clock=clock)
            self.sequential = False
        self.corrector = UnderdampedLangevin(time, step, friction, corrector, rounds)
        if corrector == "parallel":
            self.sequential = False
        self.every, self.lipschitz = every, Lipschitz.of(lipschitz)
        self.default_grid = self.predictor.default_grid

    def evaluations(self, points: GridPoints) -> int:
        """Per sample; an upper bound if a parallel predictor stops by tolerance."""
        corrections = len(self._corrected([point.kappa for point in points]))
        return self.predictor.evaluations(points) + corrections * self.corrector.evaluations

    def init(self, points: GridPoints, indices: Tensor, seed: int) -> _State:
        corrected = frozenset(self._corrected([point.kappa for point in points]))
        return _State(self.predictor.init(points, indices, seed), 0, corrected, indices, seed)

    def step(
        self, eps: NoiseEstimate, y: Tensor, state: _State, here: GridPoint, there: GridPoint, path: NoisePath
    ) -> tuple[Tensor, _State]:
        y, predictor = self.predictor.step(eps, y, state.predictor, here, there, path)
        if state.step in state.corrected:
            lipschitz = self.lipschitz.scaled(there)
            y = self.corrector.correct(eps, y, there, lipschitz, state.indices, state.seed, state.step)
        return y, state._replace(predictor=predictor, step=state.step + 1)

    def _corrected(self, kappas: Sequence[float]) -> list[int]:
        """Steps followed by a correction: the last of every stretch, and the last that ends with noise."""
        noisy = [i for i, kappa in enumerate(kappas[1:]) if kappa > 0]
        if self.every is None and self.lipschitz.number is not None:
            stretches = [0.5 * math.log1p(kappa**2) * self.lipschitz.number for kappa in kappas]
            ends = [
                i
                for i in noisy
                if math.floor(stretches[0] - stretches[i + 1]) > math.floor(stretches[0] - stretches[i])
            ]
        else:
            every = self.every or -(-(len(kappas) - 1) // CORRECTIONS)
            ends = noisy[every - 1 :: every]
        return sorted({*ends, *noisy[-1:]})
