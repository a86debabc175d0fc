"""The mean squared error of a plan, predicted from a calibration.

To first order a plan's error is linear in the effects of corrections on a sample: for correction k, the sum over rows
of `d_k(i) q_k(i)`, with `q_k` the calibrated vectors and d the stand-in minus the correction, times the weight `s_i` of
row i. The mean square is a quadratic form in d; its matrix is in `covariance.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mlem.grids import TimeGrid
from mlem.multilevel.alone import Alone, error_alone
from mlem.multilevel.calibration import Calibration
from mlem.multilevel.coins import COINS
from mlem.multilevel.correction import UNKNOWN, Factor, correction, reuse_factor
from mlem.multilevel.covariance import CorrectionCovariance, knot_weights
from mlem.multilevel.estimators import ESTIMATORS
from mlem.multilevel.plan import Plan
from mlem.schedule import NoiseSchedule
from mlem.solvers import GridPoint, Solver, quadrature_weights

__all__ = ["Predictor", "pilot_keys"]


class Predictor:
    """Predictions from a calibration for plans of one solver on one grid; R rows, C corrections of the whole family."""

    def __init__(self, calibration: Calibration, schedule: NoiseSchedule, solver: Solver, grid: TimeGrid) -> None:
        self.calibration, self.solver, self.grid = calibration, solver, grid
        points, entered = GridPoint.of(schedule, grid), list[Tensor]()
        _, rows = quadrature_weights(solver, schedule, points, lambda step, y: entered.append(y))
        kappa = torch.tensor([point.kappa for point in rows], dtype=torch.float64)
        self.evaluations = rows
        """Where the denoiser is evaluated: R points."""
        self.times = -kappa.log()
        """-ln kappa at each row: (R,)."""
        found = calibration.responses[_kind(solver)]
        knots = calibration.log_snr / 2
        # the contribution of a row in a step propagates to the sample from the end of that step
        added = torch.stack(entered)[:, : len(rows)]
        added = added.diff(dim=0, prepend=torch.zeros_like(added[:1]))
        ends = -torch.tensor([point.kappa for point in points[1:]], dtype=torch.float64).log()
        reach = found.gain / torch.sigmoid(-calibration.log_snr).sqrt()  # gain over sigma
        reach = torch.exp(reach.log() @ torch.from_numpy(knot_weights(ends.numpy(), knots.numpy())).T)  # (C, steps)
        self.scale = reach @ added * torch.tensor([point.alpha for point in rows], dtype=torch.float64)
        """Effect on the sample of a unit error in q at each row: (C, R)."""
        self.covariance = CorrectionCovariance(self.times.numpy(), knots.numpy(), found)
        """Mean of `q_k(i) q_l(j)` per pixel."""
        self._at_same_row = torch.from_numpy(self.covariance.at_same_row())

    @property
    def rows(self) -> int:
        """R."""
        return self.scale.shape[1]

    @property
    def discretisation(self) -> float | None:
        """Mean squared error of the largest level at every row; None if this solver and grid were not measured."""
        return self.discretisation_at(self.grid.steps)

    def discretisation_at(self, steps: int) -> float | None:
        """The same for another number of steps on this kind of grid."""
        found = self._alone(steps)
        return None if found is None else found.error

    @property
    def discretisation_spread(self) -> float:
        """Standard error of the logarithm of `discretisation`."""
        found = self._alone(self.grid.steps)
        return UNKNOWN if found is None else found.spread

    def _alone(self, steps: int) -> Alone | None:
        return error_alone(self.calibration, f"{self.solver.name}/{self.grid.name}", steps)

    def error(self, plan: Plan) -> float:
        """Mean squared error per pixel that the plan adds to the solver's, by linear response corrected by pilots."""
        error = self.response_error(plan)
        return error * self._factor(error, plan).factor

    def response_error(self, plan: Plan) -> float:
        """`error` by linear response alone.

        For coins independent between rows, the mean over coins. For systematic ones, of this plan, or, if samples toss
        their own, the mean over 256 of them. Raises ValueError if the first level does not always run.
        """
        if bool((plan.probabilities[:, 0] < 1).any()):
            raise ValueError("only a plan whose first level always runs can be predicted; give it probability 1")
        if plan.coins in COINS and not plan.holds and COINS[plan.coins].independent:
            return self.variance(plan)
        if plan.counts is None:
            tables = COINS[plan.coins].toss(plan.probabilities, plan.seed, torch.arange(256))
            plans = [replace(plan, counts=counts) for counts in tables]
        else:
            plans = [plan]
        return max(0.0, self.energy(torch.stack([self._deviations(one) for one in plans])).mean().item())

    def choice(self, plan: Plan) -> float:
        """The criterion between plans on different levels: for coins the variance, so that no lucky draw wins."""
        return self.response_error(plan) if plan.holds or plan.coins not in COINS else self.variance(plan)

    def _factor(self, error: float, plan: Plan) -> Factor:
        """Measured over predicted, from pilots."""
        if error <= 0:
            return Factor(1.0, 0.0)
        keys, known = pilot_keys(self.solver, plan.estimator, plan.coins), self.calibration.pilots
        own, kind = (known.get(key, []) for key in keys)
        found = correction(own or kind, error, self.grid.steps)
        if (reused := known.get(f"{keys[0]}/reuse")) is None:
            return found
        more = reuse_factor(reused, error)
        return Factor(found.factor * more.factor, math.hypot(found.spread, more.spread))

    def total(self, plan: Plan) -> float:
        """`error` plus `discretisation`. Raises ValueError if that was not measured."""
        discretisation = self.discretisation
        if discretisation is None:
            measured = ", ".join(self.calibration.discretisation)
            name = f"{self.solver.name}/{self.grid.name}"
            raise ValueError(f"the error of {name} was not measured; choose from {measured}")
        return self.error(plan) + discretisation

    def spread(self, plan: Plan | None = None) -> float:
        """Standard error of the logarithm of `total`; None: of the largest level alone."""
        if plan is None or (response := self.response_error(plan)) <= 0:
            return self.discretisation_spread
        factor, alone = self._factor(response, plan), self.discretisation or 0.0
        error = response * factor.factor
        # both were measured on the same images
        return (error * factor.spread + alone * self.discretisation_spread) / (error + alone)

    def variance(self, plan: Plan) -> float:
        """Mean of `response_error` over coins, as if rows were independent, plus the error of missing levels.

        `sum_k Var(count_k / p_k) s^2 V_k`, and twice the covariances of the coins of different levels.
        """
        *groups, missing = self.groups(plan.levels)
        total = self.energy(self._missing(missing)).item()
        coins, p = COINS[plan.coins], plan.probabilities
        for number, corrections in enumerate(groups, 1):
            spread = coins.variance(p[:, number])
            total += (spread * self._products(corrections, corrections)).sum().item()
            for other, others in enumerate(groups[: number - 1], 1):
                spread = coins.covariance(p[:, number], p[:, other])
                total += 2 * (spread * self._products(corrections, others)).sum().item()
        return total

    def allocation(self, levels: Sequence[str], costs: Tensor) -> Tensor:
        """`s sqrt(V_k / c_k)`, unscaled: (R, K), the first column 1. costs: (K,) of all levels of the family."""
        names = self.calibration.names
        own = costs[[names.index(name) for name in levels]]
        both = own[1:] + own[:-1]  # a coin makes both ends of its correction run
        columns = [self.worth(corrections) for corrections in self.groups(levels)[:-1]]
        table = torch.stack([torch.ones(self.scale.shape[1], dtype=torch.float64), *columns], 1)
        table[:, 1:] /= both.sqrt()
        return table

    def worth(self, corrections: Sequence[int]) -> Tensor:
        """Root of the error from missing these corrections at a single row: (R,)."""
        return self._products(corrections, corrections).sqrt()

    def _products(self, corrections: Sequence[int], others: Sequence[int]) -> Tensor:
        """Mean product of the effects of missing these and those corrections at a single row: (R,)."""
        inner = self._at_same_row[list(corrections)][:, list(others)]  # (c, d, R)
        return torch.einsum("cr,cdr,dr->r", self.scale[list(corrections)], inner, self.scale[list(others)])

    def _missing(self, corrections: Sequence[int]) -> Tensor:
        deviations = torch.zeros_like(self.scale)
        deviations[list(corrections)] = -self.scale[list(corrections)]
        return deviations

    def energy(self, deviations: Tensor) -> Tensor:
        """The quadratic form: (.., C, R) -> (..)."""
        return torch.as_tensor(self.covariance.energy(deviations.numpy()))

    def groups(self, levels: Sequence[str]) -> list[list[int]]:
        """The corrections of the family covered by each correction of a plan on `levels`; missing ones come last."""
        places = [self.calibration.names.index(name) for name in levels or self.calibration.names]
        between = [list(range(low, high)) for low, high in itertools.pairwise(places)]
        return [*between, list(range(places[-1], len(self.calibration.names) - 1))]

    def _deviations(self, plan: Plan) -> Tensor:
        """d: (C, R)."""
        *groups, missing = self.groups(plan.levels)
        deviations, estimator = self._missing(missing), ESTIMATORS[plan.estimator]
        for number, corrections in enumerate(groups, 1):
            weights = plan.correction_weights[:, number].numpy()[None]
            for one in corrections:
                scale, times = self.scale[one].numpy(), self.times.numpy()
                deviations[one] = torch.from_numpy(estimator.deviations(weights, scale, times, plan.holding)[0])
        return deviations


def pilot_keys(solver: Solver, estimator: str, coins: str | None) -> tuple[str, str]:
    """The names of pilots of such plans in a calibration: of this solver, and of all of its kind."""
    tossed = [] if coins is None or ESTIMATORS[estimator].searched else [COINS[coins].pilot]
    own, kind = ("/".join([name, estimator, *tossed]) for name in (solver.name, _kind(solver)))
    return own, kind


def _kind(solver: Solver) -> str:
    return "sde" if solver.stochastic else "ode"
