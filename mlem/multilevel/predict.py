"""The mean squared error of a plan, predicted from a calibration.

To first order a plan's error is linear in what the corrections add to a sample: for correction k, the sum over rows of
`d_k(i) q_k(i)`, with `q_k` the calibrated vectors and d what stands in for the correction, less the correction
itself, times the weight `s_i` of row i. The mean square is a quadratic form in d; its matrix stands in `covariance.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mlem.grids import TimeGrid
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
    """What a calibration says of plans for one solver on one grid; R rows, C corrections of the whole family."""

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
        # what a row's noise estimate adds in a step reaches the sample from the end of that step on
        added = torch.stack(entered)[:, : len(rows)]
        added = added.diff(dim=0, prepend=torch.zeros_like(added[:1]))
        ends = -torch.tensor([point.kappa for point in points[1:]], dtype=torch.float64).log()
        reach = found.gain / torch.sigmoid(-calibration.log_snr).sqrt()  # gain over sigma
        reach = torch.exp(reach.log() @ torch.from_numpy(knot_weights(ends.numpy(), knots.numpy())).T)  # (C, steps)
        self.scale = reach @ added * torch.tensor([point.alpha for point in rows], dtype=torch.float64)
        """How a unit of error in q at each row reaches the sample: (C, R)."""
        self.covariance = CorrectionCovariance(self.times.numpy(), knots.numpy(), found)
        """Mean of `q_k(i) q_l(j)` per pixel."""
        self._at_same_row = torch.from_numpy(self.covariance.at_same_row())

    @property
    def rows(self) -> int:
        """R."""
        return self.scale.shape[1]

    @property
    def discretisation(self) -> float | None:
        """Mean squared error of the largest level at every row, by a power law between the measured step counts."""
        return self.discretisation_at(self.grid.steps)

    def discretisation_at(self, steps: int) -> float | None:
        """The same for another number of steps on this kind of grid."""
        found = self.calibration.discretisation.get(f"{self.solver.name}/{self.grid.name}")
        return None if found is None else _power_law(found, steps)

    @property
    def discretisation_spread(self) -> float:
        """Standard error of the logarithm of `discretisation`, over the images that it was measured on."""
        name = f"{self.solver.name}/{self.grid.name}"
        found, stderr = self.calibration.discretisation.get(name, {}), self.calibration.stderr.get(name)
        if not stderr:
            return UNKNOWN
        near = min(stderr, key=lambda steps: abs(math.log(steps / self.grid.steps)))
        return stderr[near] / found[near]

    def error(self, plan: Plan) -> float:
        """Mean squared error per pixel that the plan adds to the solver's: linear response, corrected by pilots."""
        error = self.response_error(plan)
        return error * self._factor(error, plan).factor

    def response_error(self, plan: Plan) -> float:
        """`error` by linear response alone.

        Coins that rows toss independently: on average over them. Systematic ones: of this plan, and where samples toss
        their own on average over 256 of them. Raises ValueError where the first level does not always run.
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
        """What to compare plans on different levels by: coins by their variance, so that no lucky draw wins."""
        return self.response_error(plan) if plan.holds or plan.coins not in COINS else self.variance(plan)

    def _factor(self, error: float, plan: Plan) -> Factor:
        """Measured over predicted, as pilots say."""
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
        """`error` plus `discretisation`. Raises ValueError where that was not measured."""
        discretisation = self.discretisation
        if discretisation is None:
            measured = ", ".join(self.calibration.discretisation)
            raise ValueError(f"the error of {self.solver.name}/{self.grid.name} was not measured; choose of {measured}")
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
        """`response_error` on average over coins, as if rows tossed independently, plus what missing levels cost.

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
        """`s sqrt(V_k / c_k)`, to be scaled: (R, K), the first column 1. costs: (K,) of all levels of the family."""
        names = self.calibration.names
        own = costs[[names.index(name) for name in levels]]
        both = own[1:] + own[:-1]  # a coin makes both ends of its correction run
        columns = [self.worth(corrections) for corrections in self.groups(levels)[:-1]]
        table = torch.stack([torch.ones(self.scale.shape[1], dtype=torch.float64), *columns], 1)
        table[:, 1:] /= both.sqrt()
        return table

    def worth(self, corrections: Sequence[int]) -> Tensor:
        """Root of what missing these corrections at one row alone would cost: (R,)."""
        return self._products(corrections, corrections).sqrt()

    def _products(self, corrections: Sequence[int], others: Sequence[int]) -> Tensor:
        """Mean product of what missing these and those corrections at one row alone does to a sample: (R,)."""
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
        """Which corrections of the family each one of a plan on `levels` stands for; those it lacks come last."""
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
    """The names under which a calibration keeps pilots of such plans: of this solver, and of all of its kind."""
    tossed = [] if coins is None or ESTIMATORS[estimator].searched else [COINS[coins].pilot]
    own, kind = ("/".join([name, estimator, *tossed]) for name in (solver.name, _kind(solver)))
    return own, kind


def _kind(solver: Solver) -> str:
    return "sde" if solver.stochastic else "ode"


def _power_law(points: dict[int, float], steps: int) -> float:
    """Between two measured step counts, and beyond them, a straight line in the logarithms."""
    counts = sorted(points)
    high = min(max(1, sum(count < steps for count in counts)), len(counts) - 1)
    a, b = counts[high - 1], counts[high]
    slope = math.log(points[b] / points[a]) / math.log(b / a)
    return points[a] * (steps / a) ** slope
