"""A spec: how to make a plan for whatever solver and steps come. `family.plan(budget=0.25)` gives one.

Probabilities are calibrated (`p_k = min(1, C s sqrt(V_k / c_k))`, Giles' allocation, with the measured weight s of
an error at that time), learned (`Coefficients`), fixed numbers, or the theorem's law in the cost (`p_k ~ c_k^-(1/2 +
1/gamma)`). One dial sets how much is spent: budget, mse or delta. Held corrections with calibrated probabilities toss
no coins: the rows at which they are measured are searched for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.multilevel.calibration import UNITS, Calibration
from mlem.multilevel.coefficients import Coefficients
from mlem.multilevel.coins import COINS, check_coins
from mlem.multilevel.plan import ESTIMATORS, Plan
from mlem.multilevel.predict import Predictor, Search
from mlem.solvers import SOLVERS, GridPoint, Solver, quadrature_weights

PROBABILITIES = ("calibrated", "learned", "theory")
_OPTIONS = ("budget", "mse", "delta", "probabilities", "coins", "estimator", "order", "levels", "cost", "batch_size")
_OPTIONS += ("seed", "per_sample")


@dataclass(frozen=True)
class PlanSpec:
    """See the module docstring; `Family.plan` says what the fields mean."""

    budget: float | None = None
    mse: float | None = None
    delta: float | None = None
    probabilities: str | tuple[float, ...] = "calibrated"
    coins: str | None = None
    estimator: str = "hindsight"
    order: int | None = None
    levels: tuple[str, ...] | None = None
    gamma: float = 2.5
    cost: str = "seconds"
    batch_size: int = 64
    seed: int = 0
    per_sample: bool = False

    def __post_init__(self) -> None:
        dials = [name for name in ("budget", "mse", "delta") if getattr(self, name) is not None]
        if len(dials) > 1:
            raise ValueError(f"give one of budget, mse and delta, got {' and '.join(dials)}")
        for name in dials:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"budget must be in (0, 1], a share of the largest level's cost, got {self.budget}")
        if self.mse is not None and not 0 < self.mse < math.inf:
            raise ValueError(f"mse must be positive, got {self.mse}")
        if self.delta is not None and not math.isfinite(self.delta):
            raise ValueError(f"delta must be finite, got {self.delta}")
        if isinstance(self.probabilities, str) and self.probabilities not in PROBABILITIES:
            choices = ", ".join(PROBABILITIES)
            raise ValueError(f"probabilities must be {choices} or numbers, got {self.probabilities!r}")
        if not isinstance(self.probabilities, (str, tuple, list)):
            raise ValueError(f"probabilities must be one number for each level, got {self.probabilities!r}")
        for p in self.probabilities if not isinstance(self.probabilities, str) else ():
            if not isinstance(p, (int, float)) or not 0 < p <= 1:
                raise ValueError(f"probabilities must be in (0, 1], got {', '.join(map(str, self.probabilities))}")
        if self.coins is not None:
            check_coins(self.coins)
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {self.estimator!r}")
        if self.per_sample not in (False, True) or (self.per_sample and self.estimator != "jump"):
            raise ValueError(
                f"per_sample must be true or false, and true only with estimator=jump, got {self.per_sample!r} with "
                f"{self.estimator}; leave it out, for one plan for all samples"
            )
        if self.levels is not None and (isinstance(self.levels, str) or not self.levels):
            raise ValueError(f"levels must be a list of names, as in levels=[xs,s], got {self.levels!r}")
        if self.cost not in UNITS:
            raise ValueError(f"cost must be {' or '.join(UNITS)}, got {self.cost!r}")
        for name in ("gamma", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.probabilities in ("calibrated", "theory") and not dials:
            raise ValueError(f"{self.probabilities} probabilities need budget= or mse=, such as budget=0.25")
        if self.delta is not None and self.probabilities != "learned":
            raise ValueError("delta shifts learned coefficients; say probabilities=learned, or give budget=")

    @staticmethod
    def from_options(options: Mapping[str, Any], prefix: str) -> PlanSpec:
        """The spec with these options, null ones left out. Raises ValueError that begins with `prefix`."""
        given = {key: value for key, value in options.items() if value is not None}
        if unknown := sorted(given.keys() - set(_OPTIONS)):
            raise ValueError(f"{prefix}{unknown[0]}: there is no such option; there are {', '.join(_OPTIONS)}")
        for key in ("levels", "probabilities"):
            if isinstance(given.get(key), list):
                given[key] = tuple(given[key])
        try:
            return PlanSpec(**given)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{prefix}{error}") from error

    @property
    def searched(self) -> bool:
        """Whether rows are searched for: no coin is tossed, and every seed gives the same plan."""
        return self.estimator != "jump" and self.probabilities == "calibrated" and self.coins is None

    def check(self, family: Family, solver: Solver, grid: TimeGrid) -> None:
        """Raise ValueError for what does not fit these levels, whatever a calibration will find of them."""
        levels = self.levels or tuple(family.names)
        refuse_levels(levels, family)
        if not isinstance(self.probabilities, str):
            refuse_count(self.probabilities, levels)
        if self.budget is None or self.cost != "flops" or self.probabilities == "learned":
            return
        least = min(self._least(names, family, solver.evaluations(grid)) for names in self._subsets(levels))
        if self.budget < least:
            raise ValueError(
                f"budget={self.budget} is too small for {grid.steps} steps of {', '.join(levels)}: no plan costs less "
                f"than {math.ceil(1000 * least) / 1000:g} of the largest level by FLOPs; raise it, or take more steps"
            )

    def _subsets(self, levels: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Of these levels, those that a plan may take."""
        if self.levels is not None or not isinstance(self.probabilities, str):
            return [levels]
        below = [part for size in range(len(levels)) for part in itertools.combinations(levels[:-1], size)]
        return [(*part, levels[-1]) for part in below]

    def _least(self, levels: tuple[str, ...], family: Family, rows: int) -> float:
        """The share of the largest level's cost, by FLOPs, that no plan on these levels undercuts."""
        costs = torch.tensor([family.level(name).flops / family.level().flops for name in levels], dtype=torch.float64)
        if not self.searched:  # the first level runs at every row, the others perhaps never
            first = 1.0 if isinstance(self.probabilities, str) else self.probabilities[0]
            return costs[0].item() * first
        measured = torch.zeros(rows, len(levels), dtype=torch.bool)
        measured[0] = measured[:, 0] = True
        return Plan.given(measured, estimator=self.estimator, levels=levels).cost(costs) / rows

    def plan(self, family: Family, solver: Solver, grid: TimeGrid) -> Plan:
        """The plan for this family, solver and grid.

        Raises ValueError where the family was not fitted for it, or the solver could not follow it.
        """
        check_estimator(solver, grid, self.estimator)
        return _Planner(self, family, solver, grid).plan()


class _Planner:
    """A spec with all that it needs."""

    def __init__(self, spec: PlanSpec, family: Family, solver: Solver, grid: TimeGrid) -> None:
        self.spec, self.family, self.solver, self.grid = spec, family, solver, grid
        coefficients, self.points = quadrature_weights(solver, family.schedule, GridPoint.of(family.schedule, grid))
        self.rows = len(coefficients)
        # the corrections of an SDE are rough: extrapolating them makes it worse
        self.order = (0 if solver.stochastic else 1) if spec.order is None else spec.order
        refuse_levels(spec.levels or (), family)
        calibrated = "calibration" in family.fitted
        if calibrated or spec.probabilities == "calibrated" or spec.mse is not None:
            calibration = Calibration.of(family)
            self.predictor = Predictor(calibration, family.schedule, solver, grid)
            self.costs, self.unit = calibration.costs(spec.cost, spec.batch_size), spec.cost
        else:
            self.predictor = None
            flops = torch.tensor([level.flops for level in family.levels], dtype=torch.float64)
            self.costs, self.unit = flops / flops[-1], "flops"  # seconds are known of calibrated families only

    def plan(self) -> Plan:
        """The plan, with what is predicted of it in `about`."""
        if self.spec.mse is not None:
            plan = self._for_error(self.spec.mse)
        elif self.spec.budget is not None:
            plan = self._for_budget(self.spec.budget * self.rows)
        else:
            plan = self._draw(self._levels()[-1], 1.0)
        return replace(plan, about=self._about(plan))

    def _about(self, plan: Plan) -> dict[str, object]:
        costs = self._costs_of(plan.levels)
        about: dict[str, object] = {"solver": self.solver.name, "steps": self.grid.steps, "grid": self.grid.name}
        about |= {"cost": plan.cost(costs), "expected_cost": plan.expected_cost(costs), "cost_unit": self.unit}
        if self.predictor is not None and bool((plan.probabilities[:, 0] == 1).all()):
            about["predicted_mse_of_plan"] = self.predictor.error(plan)
            if self.predictor.discretisation is not None:
                about["predicted_mse"] = self.predictor.total(plan)
        return about

    def _costs_of(self, levels: Sequence[str]) -> Tensor:
        return self.costs[[self.family.names.index(name) for name in levels]]

    def _levels(self) -> list[tuple[str, ...]]:
        """Subsets of the levels that come into question, the given one alone or all with the largest."""
        if self.spec.levels is not None:
            return [self.spec.levels]
        names = tuple(self.family.names)
        if self.spec.probabilities == "learned":
            return [Coefficients.of(self.family).levels or names]
        if self.predictor is None or not isinstance(self.spec.probabilities, str):
            return [names]
        return self.spec._subsets(names)

    def _for_budget(self, budget: float) -> Plan:
        plans = [plan for levels in self._levels() if (plan := self._best(levels, budget)) is not None]
        if not plans:
            raise ValueError(
                f"budget={self.spec.budget} of {self.rows} evaluations is {budget:.3g} evaluations of the largest "
                "level: no plan costs so little; raise it, or take fewer steps"
            )
        if self.predictor is None or len(plans) == 1:
            return plans[-1]
        return min(plans, key=self.predictor.choice)

    def _best(self, levels: tuple[str, ...], budget: float) -> Plan | None:
        """The plan on these levels that spends at most `budget`, in evaluations of the largest level."""
        spec = self.spec
        if spec.searched:
            assert self.predictor is not None
            return Search(self.predictor, levels, self.costs, self.order, spec.estimator).plan(budget)
        costs = self._costs_of(levels)

        def spent(dial: float) -> float:
            return self._draw(levels, dial).expected_cost(costs)

        low, high = 1e-9, 1e9
        if spent(low) > budget:
            return None
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if spent(middle) <= budget else (low, middle)
        return self._draw(levels, low)

    def _draw(self, levels: tuple[str, ...], dial: float) -> Plan:
        spec = self.spec
        p = self._probabilities(levels, dial)
        coins = spec.coins or COINS[0]
        options = {"estimator": spec.estimator, "order": self.order, "per_sample": spec.per_sample}
        return Plan.draw(p, coins, spec.seed, levels=levels, **options)  # type: ignore[arg-type]

    def _probabilities(self, levels: tuple[str, ...], dial: float) -> Tensor:
        """(R, K): p_k, the dial scaling all but the first level's; for learned coefficients it is e^delta."""
        spec = self.spec
        if spec.probabilities == "learned":
            delta = spec.delta if spec.delta is not None else math.log(dial)
            learned = Coefficients.of(self.family)
            fitted = learned.levels or tuple(self.family.names)
            if tuple(levels) != fitted:
                raise ValueError(f"learned coefficients are of {', '.join(fitted)}, got levels={', '.join(levels)}")
            return learned.probabilities(self.family.schedule, [point.t for point in self.points], delta)
        if spec.probabilities == "calibrated":
            assert self.predictor is not None
            table = self.predictor.allocation(levels, self.costs)
        elif spec.probabilities == "theory":
            costs = self._costs_of(levels)
            table = ((costs / costs[0]) ** -(0.5 + 1 / spec.gamma)).expand(self.rows, -1)
        else:
            table = torch.tensor(spec.probabilities, dtype=torch.float64).expand(self.rows, -1)
            refuse_count(table[0].tolist(), levels)
        p = (table * dial).clamp(1e-9, 1.0)
        p[:, 0] = table[:, 0].clamp(max=1.0) if not isinstance(spec.probabilities, str) else 1.0
        return p

    def _for_error(self, mse: float) -> Plan:
        predictor = self.predictor
        assert predictor is not None
        discretisation = predictor.discretisation
        if discretisation is None or discretisation >= mse:
            found = "was not measured" if discretisation is None else f"is {discretisation:.2g}"
            raise ValueError(
                f"mse={mse:g}: the error of {self.solver.name} in {self.grid.steps} steps on the {self.grid.name} grid "
                f"alone {found}; take more steps, or another solver"
            )

        def error(share: float) -> float:
            try:
                plan = self._for_budget(share * self.rows)
            except ValueError:
                return math.inf
            return predictor.total(plan)

        if (best := error(1.0)) > mse:  # levels= without the largest
            names = ", ".join(self._levels()[-1])
            raise ValueError(
                f"mse={mse:g}: the levels {names} come to {best:.2g} at every step; add a larger level to levels=, or "
                "leave it out"
            )
        low, high = 1.0 / self.rows * self.costs[0].item(), 1.0
        for _ in range(12):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if error(middle) <= mse else (middle, high)
        return self._for_budget(high * self.rows)


def check_estimator(solver: Solver, grid: TimeGrid, estimator: str) -> None:
    """Raise ValueError where this solver cannot follow a plan, or not one of this estimator."""
    if not solver.sequential:
        raise ValueError(f"{solver.name} evaluates many times at once, a plan once a row; leave plan= out")
    if estimator == "hindsight" and (solver.name not in SOLVERS or solver.evaluations(grid) != grid.steps):
        raise ValueError(
            f"hindsight needs a solver of mlem's that evaluates once a step, not {solver.name}; use estimator=held"
        )


def refuse_levels(levels: Sequence[str], family: Family) -> None:
    """Raise ValueError unless these are levels of the family, the cheapest first."""
    places = [family.names.index(family.level(name).name) for name in levels]
    if places != sorted(set(places)):
        raise ValueError(
            f"levels must be different and the cheapest first, as in {', '.join(family.names)}; got {', '.join(levels)}"
        )


def refuse_count(probabilities: Sequence[float], levels: Sequence[str]) -> None:
    """Raise ValueError unless there is a number for each level."""
    if len(probabilities) != len(levels):
        raise ValueError(
            f"probabilities= must be {len(levels)} numbers, for {', '.join(levels)}, got {len(probabilities)}"
        )


def stored_plan(family: Family, name: str) -> Plan:
    """The plan kept with the family under this name. Raises ValueError with the names there are."""
    plans = family.fitted.get("plans", {})
    if name not in plans:
        kept = f"there are {', '.join(plans)}" if plans else "there are none"
        raise ValueError(f"plan={name}: {kept}; memorise one with: python -m mlem.multilevel memorise FAMILY")
    plan = Plan.from_dict(plans[name], f"plans/{name}.json")
    if plan.about.get("weights") not in (None, family.weights_hash):
        raise ValueError(f"plan={name} was memorised for other weights: python -m mlem.multilevel memorise FAMILY")
    return plan
