"""A plan: which levels run at each evaluation of the denoiser, and with what weight. Randomness turned into data.

A table of counts says which corrections are evaluated at which row, an evaluation of the denoiser; an estimator (see
`estimators.py`) turns it into a noise estimate. `planner.py` finds plans.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlem.files import check_format, damaged, read_object, write_record
from mlem.multilevel.coins import check_probabilities, coins_called
from mlem.multilevel.estimators import ESTIMATORS, Estimator, collect, estimator_called
from mlem.multilevel.evaluators import Program
from mlem.multilevel.holding import Holding

__all__ = ["Plan"]

FORMAT = 1
_OPTIONS = ("coins", "estimator", "order", "seed", "correlation_length", "about")
_REMEDY = "draw it again: python -m mlem.multilevel memorise FAMILY"


@dataclass(frozen=True, eq=False)
class Plan:
    """Make one with `Plan.draw` (coins) or `Plan.given` (a table of what is measured when).

    Args:
        probabilities: (R, K), the means of the counts; R evaluations, K levels.
        counts: (R, K) int64, or None if every sample tosses its own coins.
        coins: the kind of coins, or "given".
        estimator: "jump", "held", "hindsight", "switch" or "forecast".
        order: of extrapolation of held corrections, 0 or 1; of a forecast, up to 2.
        seed: of the coins.
        levels: names of the levels; empty means all of a family's.
        correlation_length: of held corrections, in `-ln kappa`, > 0; None: they do not fade.
        about: what it was made for, and predictions; plain data.

    Raises:
        ValueError: tables do not fit one another or the estimator.
    """

    probabilities: Tensor
    counts: Tensor | None
    coins: str
    estimator: str = "jump"
    order: int = 1
    seed: int = 0
    levels: tuple[str, ...] = ()
    correlation_length: float | None = None
    about: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        estimator = estimator_called(self.estimator)
        if self.order not in estimator.orders:
            *first, last = map(str, estimator.orders)
            raise ValueError(
                f"order of {estimator.extrapolates} must be {', '.join(first)} or {last}, got {self.order!r}"
            )
        length = self.correlation_length
        if length is not None and not length > 0:
            raise ValueError(f"correlation_length of a held correction must be positive, got {length!r}")
        estimator.check(self.probabilities, self.counts)
        if self.levels and len(self.levels) != self.probabilities.shape[1]:
            raise ValueError(
                f"probabilities have {self.probabilities.shape[1]} columns, but levels are {', '.join(self.levels)}"
            )
        if self.counts is None:
            coins_called(self.coins)
        else:
            self._check_counts(self.counts)

    def _check_counts(self, counts: Tensor) -> None:
        if counts.shape != self.probabilities.shape:
            raise ValueError(
                f"counts and probabilities must have one shape, got {tuple(counts.shape)} and "
                f"{tuple(self.probabilities.shape)}; draw the plan again"
            )
        if counts.dtype != torch.int64 or bool((counts < 0).any()):
            raise ValueError(f"counts must be whole numbers >= 0, got {counts.min().item()} among {counts.dtype}")

    @staticmethod
    def draw(
        probabilities: Tensor,
        coins: str = "systematic",
        seed: int = 0,
        *,
        estimator: str = "jump",
        order: int = 1,
        levels: Sequence[str] = (),
        per_sample: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Toss the coins.

        Args:
            probabilities: (R, K) in (0, 1], one row per evaluation, one column per level.
            coins: "systematic", "bernoulli", "nested" or "poisson".
            seed: of the coins.
            estimator, order, levels, about: see `Plan`.
            per_sample: every sample gets its own coins, keyed by its index, when sampled.

        Raises:
            ValueError: a probability is out of range, or the coins or the estimator are unknown.
        """
        p, kind = check_probabilities(probabilities), coins_called(coins)
        counts = None if per_sample else estimator_called(estimator).tossed(kind.toss(p, seed))
        return Plan(p, counts, coins, estimator, order, seed, tuple(levels), about=dict(about or {}))

    @staticmethod
    def given(
        measured: Tensor,
        *,
        estimator: str = "hindsight",
        order: int = 1,
        levels: Sequence[str] = (),
        correlation_length: float | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Held corrections, measured where `measured` (R, K) is true; the cheapest level runs at every row."""
        counts = torch.as_tensor(measured).bool().long().clone()
        counts[:, 0] = 1
        options = (estimator, order, 0, tuple(levels), correlation_length, dict(about or {}))
        return Plan(counts.double(), counts, "given", *options)

    @staticmethod
    def switching(running: Sequence[int], levels: Sequence[str], about: Mapping[str, Any] | None = None) -> Plan:
        """One level at each evaluation.

        Args:
            running: number of the level, from 0, at each of the R evaluations.
            levels: names, cheapest first.
        """
        counts = (torch.arange(len(levels)) <= torch.tensor(list(running))[:, None]).long()
        return Plan(counts.double(), counts, "given", "switch", levels=tuple(levels), about=dict(about or {}))

    @staticmethod
    def forecast(
        running: Sequence[bool], level: str, *, order: int = 1, about: Mapping[str, Any] | None = None
    ) -> Plan:
        """One level whose outputs are extrapolated where it does not run.

        Args:
            running: whether it runs, at each of the R evaluations; it must at the first.
            level: its name.
            order: of the polynomial in `-ln kappa`, 0 to 2.
        """
        counts = torch.tensor(list(running)).long()[:, None]
        return Plan(counts.double(), counts, "given", "forecast", order, levels=(level,), about=dict(about or {}))

    def begun(self) -> Plan:
        """The same plan with all held corrections measured at the first row."""
        if not self.holds or self.counts is None or bool(self.counts[0].all()):
            return self
        counts = self.counts.clone()
        counts[0] = 1
        return replace(self, counts=counts, probabilities=torch.where(counts > 0, 1.0, self.probabilities))

    def redrawn(self, delta: float = 0.0, seed: int = 0) -> Plan:
        """The plan with coins tossed again and delta added to the logits of all p_k but the first ([J], Fig. 1).

        Certain coins stay certain. Raises ValueError for held corrections, whose rows are chosen, not tossed.
        """
        if self._estimator.searched:
            raise ValueError(f"{self.estimator} has no coins to toss again; use estimator=jump")
        p = torch.sigmoid(torch.logit(self.probabilities) + delta).clamp(min=1e-9)
        p[:, 0] = self.probabilities[:, 0]
        return Plan.draw(p, self.coins, seed, order=self.order, levels=self.levels, per_sample=self.per_sample)

    @property
    def evaluations(self) -> int:
        """R: evaluations of the denoiser per sample."""
        return len(self.probabilities)

    @property
    def holds(self) -> bool:
        """Whether corrections are held between measurements."""
        return self._estimator.holds

    @property
    def moves_state(self) -> bool:
        """Whether the state is moved between evaluations."""
        return self._estimator.moves_state

    @property
    def holding(self) -> Holding:
        """The rules for stand-ins of held corrections."""
        return Holding(self.order, self.correlation_length)

    @property
    def per_sample(self) -> bool:
        """Whether every sample tosses its own coins."""
        return self.counts is None

    @property
    def _estimator(self) -> Estimator:
        return ESTIMATORS[self.estimator]

    @property
    def _shared_counts(self) -> Tensor:
        if self.counts is None:
            raise ValueError("every sample has its own coins: call sample_weights(indices)")
        return self.counts

    @property
    def _measured(self) -> NDArray[np.bool_]:
        return self._shared_counts.bool().numpy()

    @property
    def _weighed(self) -> NDArray[np.bool_]:
        return (self.weights != 0).numpy()

    @cached_property
    def correction_weights(self) -> Tensor:
        """W_k, the weights of the corrections: (R, K) float64."""
        return self._estimator.correction_weights(self._shared_counts, self.probabilities)

    @cached_property
    def weights(self) -> Tensor:
        """The collected weights w_k: (R, K) float64. For held corrections, of what is measured at that row."""
        return collect(self.correction_weights)

    def sample_weights(self, indices: Tensor) -> Tensor:
        """The collected weights of these samples (B,), each with its own coins: (B, R, K)."""
        return collect(coins_called(self.coins).toss(self.probabilities, self.seed, indices) / self.probabilities)

    @cached_property
    def stored(self) -> Tensor:
        """Where a held correction is measured and used again at a later row: (R, K) bool."""
        return torch.from_numpy(self._estimator.stored(self._measured, self.order))

    @cached_property
    def revising(self) -> Tensor:
        """The levels that run to move the state before a row is evaluated: (R, K) bool."""
        return torch.from_numpy(self._estimator.revising(self._measured))

    @cached_property
    def revised(self) -> Tensor:
        """Rows before which the state is moved: (R,) bool."""
        return self.revising.any(1)

    @cached_property
    def evaluated(self) -> Tensor:
        """The levels that run to evaluate a row: (R, K) bool."""
        return torch.from_numpy(self._estimator.evaluated(self._measured, self._weighed, self.order))

    @cached_property
    def program(self) -> Program:
        """The plan as plain lists, for an evaluator."""
        tables = (self.evaluated, self.weights, self._shared_counts.bool(), self.stored, self.revising)
        return Program(*(table.tolist() for table in tables), holding=self.holding)

    @cached_property
    def runs(self) -> Tensor:
        """How often each level is evaluated at each row: (R, K) int64."""
        return torch.from_numpy(self._estimator.runs(self._measured, self._weighed, self.order))

    @cached_property
    def calls(self) -> Tensor:
        """Evaluations of each level per sample: (K,) float64; expected ones if samples toss their own coins."""
        return self.expected_calls if self.counts is None else self.runs.sum(0).double()

    @cached_property
    def expected_calls(self) -> Tensor:
        """Mean of `calls` over the coins: (K,) float64; equal to `calls` if rows are chosen."""
        if self._estimator.searched:
            return self.calls
        p = self.probabilities
        above = torch.cat([p[:, 1:], torch.zeros_like(p[:, :1])], 1)
        return coins_called(self.coins).runs(p, above).sum(0)

    def cost(self, costs: Tensor) -> float:
        """Cost per sample, if one evaluation of each level costs `costs` (K,)."""
        return (self.calls * costs).sum().item()

    def expected_cost(self, costs: Tensor) -> float:
        """`cost` on average over the coins."""
        return (self.expected_calls * costs).sum().item()

    def fingerprint(self, seed: int | None = None) -> str:
        """Identifies the plan, apart from `about`: 64 hexadecimal digits, the same in every version.

        Args:
            seed: replaces the plan's own.
        """
        table = self.to_dict() | {"about": {}, "seed": self.seed if seed is None else seed}
        table["memory"] = table.pop("correlation_length")  # its name when fingerprints were first written to disk
        return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        counts = None if self.counts is None else cast("list[list[int]]", self.counts.tolist())
        plain: dict[str, Any] = {name: getattr(self, name) for name in _OPTIONS}
        tables: dict[str, Any] = {"probabilities": self.probabilities.tolist(), "counts": counts}
        return {"format": FORMAT, "levels": list(self.levels)} | plain | tables

    @staticmethod
    def from_dict(plain: Mapping[str, Any], where: str = "the plan") -> Plan:
        """The plan described by `to_dict`. Raises ValueError naming `where` for other data."""
        check_format(plain, FORMAT, where, _REMEDY)
        if "memory" in plain:  # former name of correlation_length
            plain = {"correlation_length": plain["memory"]} | dict(plain)
        with damaged(where, _REMEDY):
            counts = None if plain["counts"] is None else torch.tensor(plain["counts"])
            options = {name: plain[name] for name in _OPTIONS}
            options |= {"about": dict(plain["about"]), "seed": operator.index(plain["seed"])}
            probabilities = torch.tensor(plain["probabilities"], dtype=torch.float64)
            return Plan(probabilities, counts, levels=tuple(map(str, plain["levels"])), **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        write_record(path, self.to_dict())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan. Raises FileNotFoundError or ValueError with the remedy."""
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is not a plan; make one with: python -m mlem.multilevel memorise FAMILY")
        return Plan.from_dict(read_object(path), os.fspath(path))
