"""A plan: which levels run at each evaluation of the denoiser, and with what weight. Chance turned into data.

`f^1 .. f^K` are the levels of the plan, cheapest first, `g^k = f^k - f^(k-1)` their corrections (`g^1 = f^1`). A table
of counts says which corrections are paid for at which row. Two estimators turn it into a noise estimate:

- jump: `F = sum_k (count_k / p_k) g^k`, unbiased ([J], arXiv:2603.24594);
- held: a correction that is paid for is measured; between two measurements it is extrapolated from the last one
  (order 0) or the last two (order 1, linearly in `-ln kappa`). Biased, but smooth: multistep solvers work on it. With
  a memory, a correction is forgotten as `exp(-distance / memory)`, as the best linear guess of a process would be.
- hindsight: held, and when a correction is measured again, the state is moved by what interpolation between the two
  measurements says that extrapolation got wrong (ours; the corrector of a multistep method, for the correction alone).

Weights are collected before anything is evaluated: `F = sum_k w_k f^k` with `w_k = W_k - W_(k+1)`, and a level of
weight zero is not run, unless a held correction has to be measured.
"""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mlem.files import check_format, damaged, read_object, write_json
from mlem.multilevel.coins import check_coins, check_probabilities, toss

FORMAT = 1
_OPTIONS = ("coins", "estimator", "order", "seed", "memory", "about")
_REMEDY = "draw it again: python -m mlem.multilevel memorise FAMILY"
ESTIMATORS = ("jump", "held", "hindsight")


@dataclass(frozen=True, eq=False)
class Plan:
    """Make one with `Plan.draw` (coins) or `Plan.given` (a table of what is measured when).

    probabilities: (R, K), the means of the counts; R evaluations, K levels. counts: (R, K), or None where every sample
    tosses its own coins. levels: names of the levels; empty means all of a family's. memory: correlation length of
    held corrections, in `-ln kappa`; None: they do not fade. about: what it was made for, what was predicted.
    """

    probabilities: Tensor
    counts: Tensor | None
    coins: str
    estimator: str = "jump"
    order: int = 1
    seed: int = 0
    levels: tuple[str, ...] = ()
    memory: float | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {self.estimator!r}")
        if self.order not in (0, 1):
            raise ValueError(f"order of a held correction must be 0 or 1, got {self.order!r}")
        if self.memory is not None and not self.memory > 0:
            raise ValueError(f"memory of a held correction must be positive, got {self.memory!r}")
        self._check_probabilities()
        if self.levels and len(self.levels) != self.probabilities.shape[1]:
            raise ValueError(
                f"probabilities have {self.probabilities.shape[1]} columns, but levels are {', '.join(self.levels)}"
            )
        if self.holds and self.counts is None:
            raise ValueError("held corrections need one plan for all samples; leave per_sample out, or estimator=jump")
        if self.counts is None:
            check_coins(self.coins)
        else:
            self._check_counts(self.counts)

    def _check_probabilities(self) -> None:
        p = self.probabilities
        if not self.holds:
            check_probabilities(p)
        elif p.dim() != 2 or p.numel() == 0 or not bool(((p >= 0) & (p <= 1)).all()):  # 0 where rows are chosen
            raise ValueError(
                f"probabilities must be a table (evaluations, levels) of numbers in [0, 1], got shape {tuple(p.shape)}"
            )

    def _check_counts(self, counts: Tensor) -> None:
        if counts.shape != self.probabilities.shape:
            raise ValueError(
                f"counts and probabilities must be of one shape, got {tuple(counts.shape)} and "
                f"{tuple(self.probabilities.shape)}; draw the plan again"
            )
        if counts.dtype != torch.int64 or bool((counts < 0).any()):
            raise ValueError(f"counts must be whole numbers >= 0, got {counts.min().item()} among {counts.dtype}")
        if self.holds and not bool(counts[0].all() and counts[:, 0].all()):
            raise ValueError("held corrections must all be measured at the first row, the cheapest level at every row")

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
        about: dict[str, Any] | None = None,
    ) -> Plan:
        """Toss the coins. probabilities: (R, K) in (0, 1], a row for each evaluation, a column for each level.

        per_sample: every sample gets coins of its own, keyed by its index, when it is sampled.
        Raises ValueError for other probabilities and unknown coins.
        """
        p = check_probabilities(probabilities)
        counts = None if per_sample else toss(coins, p, seed)
        if estimator != "jump" and counts is not None:
            counts[:, 0] = counts[0] = 1  # the cheapest level always runs, and the first row has nothing to hold
        return Plan(p, counts, check_coins(coins), estimator, order, seed, tuple(levels), about=dict(about or {}))

    @staticmethod
    def given(
        measured: Tensor,
        *,
        estimator: str = "hindsight",
        order: int = 1,
        levels: Sequence[str] = (),
        memory: float | None = None,
        about: dict[str, Any] | None = None,
    ) -> Plan:
        """Held corrections, measured where `measured` (R, K) is true; everything is at the first row."""
        counts = torch.as_tensor(measured).bool().long().clone()
        counts[:, 0] = counts[0] = 1
        return Plan(counts.double(), counts, "given", estimator, order, 0, tuple(levels), memory, dict(about or {}))

    def redrawn(self, delta: float = 0.0, seed: int = 0) -> Plan:
        """The coins tossed again, with delta added to the logits of all p_k but the first ([J], Fig. 1).

        What is certain stays certain. Raises ValueError for held corrections, whose rows are chosen, not tossed.
        """
        if self.holds:
            raise ValueError(f"{self.estimator} tosses no coins again; use estimator=jump")
        p = torch.sigmoid(torch.logit(self.probabilities) + delta).clamp(min=1e-9)
        p[:, 0] = self.probabilities[:, 0]
        return Plan.draw(p, self.coins, seed, order=self.order, levels=self.levels, per_sample=self.per_sample)

    @property
    def evaluations(self) -> int:
        """R: how often the denoiser is called for a sample."""
        return len(self.probabilities)

    @property
    def holds(self) -> bool:
        """Whether corrections are held between measurements."""
        return self.estimator != "jump"

    @property
    def per_sample(self) -> bool:
        """Whether every sample tosses its own coins."""
        return self.counts is None

    @cached_property
    def weights(self) -> Tensor:
        """The collected weights w_k: (R, K) float64. For held corrections, those of what is measured at that row."""
        if self.counts is None:
            raise ValueError("every sample has its own coins: ask sample_weights(indices)")
        # a held correction is measured or not, however often its coin fell
        paid = self.counts.bool() if self.holds else self.counts / self.probabilities
        return collect(paid.double())

    def sample_weights(self, indices: Tensor) -> Tensor:
        """The collected weights of these samples (B,), where each has its own coins: (B, R, K)."""
        return collect(toss(self.coins, self.probabilities, self.seed, indices) / self.probabilities)

    @cached_property
    def stored(self) -> Tensor:
        """Where a held correction is measured and used again at a later row: (R, K) bool."""
        stored = torch.zeros_like(self.probabilities, dtype=torch.bool)
        for level, measured in self._measurements():
            gaps = [later - row > 1 for row, later in itertools.pairwise(measured)]
            for number, row in enumerate(measured[:-1]):
                stored[row, level] = any(gaps[number : number + self.order + 1])
        return stored

    @cached_property
    def revised(self) -> Tensor:
        """Rows at which hindsight moves the state, and the cheapest level is evaluated once more: (R,) bool."""
        revised = torch.zeros(self.evaluations, dtype=torch.bool)
        for _, measured in self._measurements() if self.estimator == "hindsight" else ():
            for row, later in itertools.pairwise(measured[:-1]):
                revised[later] |= later - row > 1
        return revised

    def _measurements(self) -> list[tuple[int, list[int]]]:
        """For each held level the rows at which it is measured, and R."""
        if not self.holds or self.counts is None:
            return []
        levels = range(1, self.probabilities.shape[1])
        return [(k, [*self.counts[:, k].nonzero().flatten().tolist(), self.evaluations]) for k in levels]

    @cached_property
    def runs(self) -> Tensor:
        """How often each level is evaluated at each row: (R, K) int64."""
        above = torch.cat([self.stored[:, 1:], torch.zeros_like(self.stored[:, :1])], 1)
        # a revision goes on from a new state: there the newest measurements are added to the cheapest level
        measured = self.counts.bool() if self.counts is not None else torch.zeros_like(above)
        below = torch.cat([measured[:, 1:], torch.zeros_like(measured[:, :1])], 1)
        needed = torch.where(self.revised[:, None], measured | below, (self.weights != 0) | self.stored | above)
        runs = needed.long()
        runs[:, 0] += self.revised
        return runs

    @property
    def calls(self) -> Tensor:
        """Evaluations of each level for one sample: (K,) float64; the expected ones, where samples toss their own."""
        return self.expected_calls if self.counts is None else self.runs.sum(0).double()

    @property
    def expected_calls(self) -> Tensor:
        """What `calls` is on average over the coins: (K,) float64. Of held corrections that are given: `calls`."""
        if self.holds:
            return self.calls
        p, q = (
            self.probabilities,
            torch.cat([self.probabilities[:, 1:], torch.zeros_like(self.probabilities[:, :1])], 1),
        )
        return (_paid(self.coins, p, q) - _cancels(self.coins, p, q)).sum(0)

    def cost(self, costs: Tensor) -> float:
        """Cost for one sample, when one evaluation of each level costs `costs` (K,)."""
        return (self.calls * costs).sum().item()

    def expected_cost(self, costs: Tensor) -> float:
        """`cost` on average over the coins."""
        return (self.expected_calls * costs).sum().item()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        counts = None if self.counts is None else self.counts.tolist()
        plain = {name: getattr(self, name) for name in _OPTIONS}
        tables = {"probabilities": self.probabilities.tolist(), "counts": counts}
        return {"format": FORMAT, "levels": list(self.levels)} | plain | tables

    @staticmethod
    def from_dict(plain: dict[str, Any], where: str = "the plan") -> Plan:
        """The plan that `to_dict` described. Raises ValueError, which names `where`, for other data."""
        check_format(plain, FORMAT, where, _REMEDY)
        with damaged(where, _REMEDY):
            counts = None if plain["counts"] is None else torch.tensor(plain["counts"])
            options = {name: plain[name] for name in _OPTIONS}
            options |= {"about": dict(plain["about"]), "seed": operator.index(plain["seed"])}
            probabilities = torch.tensor(plain["probabilities"], dtype=torch.float64)
            return Plan(probabilities, counts, levels=tuple(map(str, plain["levels"])), **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        write_json(path, self.to_dict())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan. Raises FileNotFoundError or ValueError with the remedy."""
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is no plan; make one with: python -m mlem.multilevel memorise FAMILY")
        return Plan.from_dict(read_object(path), os.fspath(path))


def collect(paid: Tensor) -> Tensor:
    """Weights of the levels, from those of the corrections: (.., K) -> (.., K), `w_k = W_k - W_(k+1)`."""
    return paid - torch.cat([paid[..., 1:], torch.zeros_like(paid[..., :1])], -1)


def _paid(coins: str, p: Tensor, q: Tensor) -> Tensor:
    """Probability that coin p or coin q falls, neighbours in one row."""
    if coins == "nested":
        return torch.maximum(p, q)
    if coins == "poisson":
        # certain coins fall once for sure; the others are Poisson counts
        none = torch.where(p < 1, torch.exp(-p), 0) * torch.where(q < 1, torch.exp(-q), 0)
        return 1 - none
    return p + q - p * q


def _cancels(coins: str, p: Tensor, q: Tensor) -> Tensor:
    """Probability that both fall and their weights cancel."""
    if coins == "poisson":
        # counts m and n with m / p = n / q, even where p and q differ; summed until they no longer matter
        fallen = torch.arange(1.0, 30.0, dtype=p.dtype)[:, None, None]
        other = (fallen * q / p).round()
        cancel = (other > 0) & (fallen / p == other / q)
        both = torch.where(cancel, (_log_poisson(fallen, p) + _log_poisson(other, q)).exp(), 0.0).sum(0)
        return torch.where((p < 1) & (q < 1), both, ((p == 1) & (q == 1)).to(p.dtype))
    return torch.where(p == q, p if coins == "nested" else p * q, 0.0)


def _log_poisson(count: Tensor, mean: Tensor) -> Tensor:
    return count * mean.log() - mean - torch.lgamma(count + 1)
