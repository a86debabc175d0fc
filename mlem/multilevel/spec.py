"""The specification of a plan: checked options, before any family, solver or step count is known.

All options of plans are here; help, choices, defaults and checks derive from the fields of `PlanSpec`. Free of torch,
so that the command line can read it immediately. `planner.py` makes the plan.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

from mlem.arguments import nearest
from mlem.multilevel.choices import COINS, ESTIMATORS, PROBABILITIES, UNITS, check_choice

__all__ = ["TARGETS", "PlanSpec"]

TARGETS = ("budget", "mse", "delta")
"""The options that set the cost; at most one of them is given."""
_ESTIMATORS = tuple(name for name, traits in ESTIMATORS.items() if traits.specified)


def _about(help: str, value: str, choices: Sequence[str] = ()) -> dict[str, Any]:
    """Metadata of an option: one line of help, what a value must be, and its choices."""
    return {"help": help, "value": value, "choices": tuple(choices)}


@dataclass(frozen=True)
class PlanSpec:
    """How evaluations are distributed over levels: `sample(family, ..., plan=family.plan(budget=0.25))`.

    A specification fits any solver and any number of steps; the plan is made when these are known.

    Args:
        budget: target: share of the largest level's cost at every evaluation, in (0, 1].
        mse: target: mean squared error to the many-step run, > 0; needs a calibration with pilots.
        delta: target: added to every beta of learned coefficients but the first.
        probabilities: "calibrated" (`p_k = min(1, C s sqrt(V_k / c_k))`, Giles' allocation, with the measured weight s
            of an error at that time), "learned" (`Coefficients`), "theory" (the theorem's law in the cost,
            `p_k ~ c_k^-(1/2 + 1/gamma)`), or one number in (0, 1] per level.
        coins: "systematic", "bernoulli", "nested" or "poisson". By default systematic; but for held corrections with
            calibrated probabilities no coins are tossed: the evaluations at which corrections are measured are searched
            for, to minimise the predicted error.
        estimator: stand-in for levels that are not evaluated: "hindsight", "held" or "jump"; or "switch": one level
            runs at each evaluation, without stand-ins for larger ones.
        order: of the extrapolation of a held correction, 0 or 1; by default 0 for SDEs and 1 for ODEs.
        levels: names of the levels, cheapest first; by default the best subset.
        gamma: of the theorem, for theory probabilities, > 0.
        cost: "seconds" or "flops": the unit in which the budget is counted.
        batch_size: the batch size whose measured seconds are used, > 0.
        seed: of the coins.
        per_sample: whether every sample tosses its own coins; only with estimator="jump".

    Raises:
        ValueError: an option is out of range. `sample` raises it if the family is not calibrated or fitted.
    """

    budget: float | None = field(
        default=None, metadata=_about("share of the largest level's cost at every step", "in (0, 1]")
    )
    mse: float | None = field(default=None, metadata=_about("mean squared error to the many-step run", "> 0"))
    delta: float | None = field(default=None, metadata=_about("shift of the learned logits", "a finite number"))
    probabilities: str | Sequence[float] = field(
        default="calibrated",
        metadata=_about("law of the probabilities", "a law, or one number in (0, 1] per level", PROBABILITIES),
    )
    coins: str | None = field(default=None, metadata=_about("kind of coins", "a kind", COINS))
    estimator: str = field(
        default="hindsight",
        metadata=_about("stand-in for levels that are not evaluated", "an estimator", _ESTIMATORS),
    )
    order: int | None = field(default=None, metadata=_about("order of extrapolation of held corrections", "0 or 1"))
    levels: Sequence[str] | None = field(
        default=None, metadata=_about("names of the levels, cheapest first", "a list of names")
    )
    gamma: float = field(default=2.5, metadata=_about("gamma of the theorem, for theory probabilities", "> 0"))
    cost: str = field(default="seconds", metadata=_about("unit of the budget", "a unit", UNITS))
    batch_size: int = field(default=64, metadata=_about("batch size whose seconds are used", "> 0"))
    seed: int = field(default=0, metadata=_about("seed of the coins", "a whole number"))
    per_sample: bool = field(
        default=False, metadata=_about("own coins for every sample, with estimator=jump", "true or false")
    )

    def __post_init__(self) -> None:
        for name in ("probabilities", "levels"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(cast("list[Any]", value)))
        self._check_targets()
        self._check_probabilities()
        self._check_names()
        self._check_per_sample()
        self._check_numbers()
        self._check_target_of_law()

    @property
    def targets(self) -> list[str]:
        """The names of the targets that are given."""
        return [name for name in TARGETS if getattr(self, name) is not None]

    @property
    def chooses_levels(self) -> bool:
        """Whether any set of levels may be used, even without the largest if nothing else fits."""
        return self.levels is None and self.probabilities == "calibrated"

    @property
    def searched(self) -> bool:
        """Whether the evaluations that measure are searched for: no coins, and every seed gives the same plan."""
        return ESTIMATORS[self.estimator].searched and self.probabilities == "calibrated" and self.coins is None

    @staticmethod
    def from_options(options: Mapping[str, Any], where: str = "") -> PlanSpec:
        """The specification with these options, from a config or JSON; None means unset.

        Args:
            options: by field name; lists may replace tuples.
            where: prefix of errors, such as "evaluation.samplers[0].plan: ".

        Raises:
            ValueError: an option is unknown (suggests the nearest) or out of range.
        """
        known = [one.name for one in fields(PlanSpec)]
        given = {name: value for name, value in options.items() if value is not None}
        if unknown := sorted(given.keys() - set(known)):
            raise ValueError(f"{where}{unknown[0]}: there is no such option; {nearest(unknown[0], known)}")
        try:
            return PlanSpec(**given)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error

    def _check_targets(self) -> None:
        if len(self.targets) > 1:
            raise ValueError(f"give only one of budget, mse and delta, got {' and '.join(self.targets)}")
        for name in self.targets:
            _check_number(name, getattr(self, name))
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"budget must be in (0, 1], a share of the largest level's cost, got {self.budget}")
        if self.mse is not None and not 0 < self.mse < math.inf:
            raise ValueError(f"mse must be positive, got {self.mse}")
        if self.delta is not None and not math.isfinite(self.delta):
            raise ValueError(f"delta must be finite, got {self.delta}")

    def _check_probabilities(self) -> None:
        value: object = self.probabilities
        if isinstance(value, str):
            if value not in PROBABILITIES:
                raise ValueError(f"probabilities must be {', '.join(PROBABILITIES)} or numbers, got {value!r}")
        elif not isinstance(value, tuple):
            raise ValueError(f"probabilities must be one number per level, got {value!r}")
        else:
            ones = cast("tuple[object, ...]", value)
            if not all(isinstance(p, (int, float)) and 0 < p <= 1 for p in ones):
                raise ValueError(f"probabilities must be in (0, 1], got {', '.join(map(str, ones))}")

    def _check_names(self) -> None:
        if self.coins is not None:
            check_choice("coins", self.coins, COINS)
        check_choice("estimator", self.estimator, _ESTIMATORS)
        if self.estimator == "switch" and not self.searched:
            raise ValueError(
                "estimator=switch tosses no coins: leave out coins= and probabilities=, or use estimator=jump"
            )
        levels: object = self.levels
        if levels is not None and (not isinstance(levels, tuple) or not levels):
            raise ValueError(f"levels must be a list of names, as in levels=[xs,s], got {levels!r}")
        if self.cost not in UNITS:
            raise ValueError(f"cost must be {' or '.join(UNITS)}, got {self.cost!r}")

    def _check_per_sample(self) -> None:
        if self.per_sample not in (False, True) or (self.per_sample and ESTIMATORS[self.estimator].searched):
            raise ValueError(
                f"per_sample must be true or false, and true only with estimator=jump, got {self.per_sample!r} with "
                f"{self.estimator}; leave it out, for one plan for all samples"
            )

    def _check_numbers(self) -> None:
        for name in ("gamma", "batch_size"):
            _check_number(name, value := getattr(self, name))
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.order not in (None, 0, 1):
            raise ValueError(f"order of a held correction must be 0 or 1, got {self.order!r}")
        try:
            operator.index(self.seed)
        except TypeError as error:
            raise ValueError(f"seed must be a whole number, got {self.seed!r}") from error

    def _check_target_of_law(self) -> None:
        if self.probabilities in ("calibrated", "theory") and not self.targets:
            raise ValueError(f"{self.probabilities} probabilities need budget= or mse=, such as budget=0.25")
        if self.delta is not None and self.probabilities != "learned":
            raise ValueError("delta shifts learned coefficients; add probabilities=learned, or use budget=")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
