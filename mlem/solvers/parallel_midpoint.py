"""Randomized midpoints in parallel over time (Gupta, Cai and Chen, arXiv:2406.00924, the parallel algorithm).

A step, or block, has R parts with a midpoint uniform in each, all evaluated in one call. With (k_j-1, k_j) the
parts, m_j the midpoints, d and w the drift and the weight of the clock (`mlem.solvers.clock`):

- start, with eps at the block's start: `y_i = y + d(k_0 -> m_i) eps(y, k_0)`;
- each of K rounds: all `e_j = eps(y_j, m_j)` at once, then
  `y_i = y + sum_(j<i) d(k_j-1 -> k_j) e_j + d(k_i-1 -> m_i) e_i`;
- end: `y' = y + sum_j w(k_j-1 -> k_j, m_j) e_j`, with the estimates of the last round.

So K counts calls; the paper counts one iteration fewer, as its last call is that of the end. The rounds converge to the
fixed point, the result of solving for one midpoint after another; unlike the paper's they are damped (`_Table.share`),
or they would diverge in long parts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlem.arguments import check_whole
from mlem.brownian import NoisePath
from mlem.noise import NoiseStream
from mlem.solvers.base import GridPoint, GridPoints, NoiseEstimate, ScatteredPoints, Solver
from mlem.solvers.clock import Clock, make_clock

__all__ = ["ParallelMidpoint"]


class ParallelMidpoint(Solver):
    """Few rounds of many calls: `steps` blocks of `midpoints`, each with at most `rounds` calls after its first.

    clock: what midpoints are uniform in, `kappa` or `ou`. tolerance: a block is done when no midpoint of the sample
    moved by more since the last round, root mean square over pixels in units of the data (None: after `rounds`);
    each sample stops on its own, independent of the batch. window: midpoints in flight, in whole blocks: each block
    runs one round behind the one before it, so n blocks take about n + rounds sequential calls instead of
    n (1 + rounds). chunk: the most rows of one network call. Memory holds one window, whatever the number of steps.
    A block that begins in pure noise is one DDIM step.
    Raises ValueError for options out of range.
    """

    name = "parallel_midpoint"
    order = 1.5
    stochastic = False
    reference = "dpm_solver_pp"
    sequential = False
    default_grid = "log_snr"
    linear = False

    def __init__(
        self,
        midpoints: int = 8,
        rounds: int = 20,
        tolerance: float | None = 1e-3,
        window: int | None = None,
        chunk: int | None = None,
        clock: str = "kappa",
    ) -> None:
        for option, value in (("midpoints", midpoints), ("rounds", rounds), ("chunk", 1 if chunk is None else chunk)):
            check_whole(option, value)
        if tolerance is not None and not (tolerance > 0 and math.isfinite(tolerance)):
            raise ValueError(f"tolerance must be a positive number, got {tolerance!r}; null runs all rounds")
        window = midpoints if window is None else window
        if not isinstance(window, int) or window < midpoints or window % midpoints:
            raise ValueError(f"window must hold whole blocks of midpoints={midpoints}, at least one, got {window!r}")
        self.midpoints, self.rounds, self.tolerance, self.window = midpoints, rounds, tolerance, window
        self.chunk, self.clock = chunk, make_clock(clock)
        if clock == "ou":
            self.default_grid = "ou_halving"

    def evaluations(self, points: GridPoints) -> int:
        """An upper bound; fewer if the tolerance is met."""
        return points.steps * (1 + self.rounds * self.midpoints)

    def init(self, points: GridPoints, indices: Tensor, seed: int) -> tuple[Tensor, int, int]:
        return indices, seed, 0

    def step(
        self, eps: NoiseEstimate, y: Tensor, state: Any, here: GridPoint, there: GridPoint, path: NoisePath
    ) -> tuple[Tensor, Any]:
        """One block alone; state: its number."""
        if here.pure_noise:
            return y + (there.kappa - here.kappa) * eps(y, here), (*state[:2], state[2] + 1)
        y = self._fly(eps, y, _Table.draw(self.clock, self.midpoints, [here, there], *state), None)
        return y, (*state[:2], state[2] + 1)

    def integrate(
        self,
        eps: NoiseEstimate,
        y: Tensor,
        points: GridPoints,
        path: NoisePath,
        indices: Tensor,
        seed: int,
        *,
        revise: Callable[[Tensor, GridPoint], Tensor] | None = None,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        if revise is not None:
            raise ValueError("parallel_midpoint evaluates many times at once: nothing can be revised in between")
        first = 0
        if points[0].pure_noise:
            y, (_, _, first) = self.step(eps, y, (indices, seed, 0), points[0], points[1], path)
            if watch is not None:
                watch(0, y)
        if first == points.steps:
            return y
        return self._fly(
            eps, y, _Table.draw(self.clock, self.midpoints, points[first:], indices, seed, first), watch, first
        )

    def _fly(
        self,
        eps: NoiseEstimate,
        y: Tensor,
        table: _Table,
        watch: Callable[[int, Tensor], None] | None,
        first: int = 0,
    ) -> Tensor:
        flight = _Flight(table, y, self.window // self.midpoints)
        while flight.unfinished:
            moved = flight.round(eps, measure=self.tolerance is not None)
            done = flight.age >= 1 + self.rounds
            if (
                moved is not None and self.tolerance is not None
            ):  # only here does the host wait: it decides whether to go on
                done |= (flight.age > 1) & (moved <= self.tolerance).cpu()
            flight.move_on(done)
            if watch is not None:
                watch(first + max(0, int(flight.front.min()) - 1), flight.base)
        return flight.base


@dataclass
class _Table:
    """Everything about the blocks that is known in advance; float64."""

    clock: Clock
    edges: Tensor
    """kappa at the ends of the parts: (blocks, R + 1)."""
    middles: Tensor
    """kappa of the midpoints: (B, blocks, R)."""

    @staticmethod
    def draw(
        clock: Clock, midpoints: int, points: Sequence[GridPoint], indices: Tensor, seed: int, first: int = 0
    ) -> _Table:
        """first: number of the first block; block numbers key the midpoints."""
        slots = range(first * midpoints, (first + len(points) - 1) * midpoints)
        pairs = itertools.pairwise(point.kappa for point in points)
        edges = torch.stack([clock.parts(*pair, midpoints) for pair in pairs]).to(indices.device)
        stream = NoiseStream(seed, "midpoint-parallel")
        own = stream.uniform(indices, slots, torch.float64).T.reshape(len(indices), -1, midpoints)
        return _Table(clock, edges, clock.place(edges[:, :-1], edges[:, 1:], own))

    def of(self, edges: Tensor, middles: Tensor) -> Tensor:
        """Weight of each estimate in y at each midpoint and at the block's end: (.., R + 1, R)."""
        left, right, parts = edges[..., :-1], edges[..., 1:], middles.shape[-1]
        whole = self.clock.drift(left, right, middles)[..., None, :].expand(*middles.shape, parts)
        inside = torch.diag_embed(self.clock.drift(left, middles, middles).expand_as(middles))
        end = self.clock.weight(left, right, middles).expand_as(middles)
        return torch.cat([whole.tril(-1) + inside, end[..., None, :]], -2)

    def share(self, edges: Tensor, middles: Tensor) -> Tensor:
        """Damping: how far each midpoint moves towards a round's result, in (0, 1]: (.., R).

        A midpoint depends on its own estimate, by -d / m times its error for data of a single point: the undamped
        iteration diverges when the part is long relative to m. Moving m / (m + |d|) of the way is exact there, and the
        fixed point is the same.
        """
        return middles / (middles + self.clock.drift(edges[..., :-1], middles, middles).abs())

    def of_start(self, edges: Tensor, middles: Tensor) -> Tensor:
        """The weights when only the estimate at the start, number 0, is known."""
        start = edges[..., :1]
        found = self.clock.drift(start, torch.cat([middles, edges[..., -1:]], -1), start)
        return torch.nn.functional.pad(found[..., None], (0, middles.shape[-1] - 1))


class _Flight:
    """The blocks in flight, S for each of B samples, and the state before them.

    front: number of the first block of each sample, (B,); age: calls made for each block, (B, S); both on the CPU.
    A block enters once the one before it has been evaluated. base: y at the start of the first block.
    """

    def __init__(self, table: _Table, y: Tensor, slots: int) -> None:
        self._table, self.base = table, y
        self._blocks, self._parts = table.middles.shape[1:]
        slots = min(slots, self._blocks)
        self.front = torch.zeros(len(y), dtype=torch.int64)
        self.age = torch.zeros(len(y), slots, dtype=torch.int64)
        self._starts = y[:, None].repeat(1, slots + 1, *[1] * (y.dim() - 1))
        """y where each block begins, and where the last ends: (B, S + 1, ...)."""
        self._places: Tensor = self._starts[:, :-1, None].repeat(1, 1, self._parts, *[1] * (y.dim() - 1))
        """y at the midpoints: (B, S, R, ...)."""
        self._slopes: Tensor = torch.zeros_like(self._places)
        """The last estimates there; for a block evaluated only at its start, number 0."""

    @property
    def unfinished(self) -> bool:
        """Whether any sample has blocks left."""
        return bool((self.front < self._blocks).any())

    def round(self, eps: NoiseEstimate, measure: bool) -> Tensor | None:
        """One call for all blocks in flight; with `measure`, how far each moved, in units of the data, (B, S)."""
        device, slots = self.base.device, self.age.shape[1]
        numbers = self.front[:, None] + torch.arange(slots)
        waits = torch.cat([torch.zeros(len(numbers), 1, dtype=torch.bool), self.age[:, :-1] == 0], 1)
        asked = (numbers < self._blocks) & ~((self.age == 0) & waits)
        starting = asked & (self.age == 0)
        own = asked[..., None] & (~starting[..., None] | (torch.arange(self._parts) == 0))
        rows = own.flatten().nonzero().flatten().to(device, non_blocking=True)
        numbers = numbers.clamp(max=self._blocks - 1).to(device, non_blocking=True)
        edges = self._table.edges[numbers]  # (B, S, R + 1)
        middles = self._table.middles.gather(1, numbers[..., None].expand(-1, -1, self._parts))  # (B, S, R)
        starting, silent = (mask.to(device, non_blocking=True)[..., None] for mask in (starting, ~asked))
        at = torch.where(starting, edges[..., :1], middles)
        places = ScatteredPoints(at.flatten()[rows], rows // (slots * self._parts))
        found = eps(self._places.flatten(0, 2)[rows], places).double()
        self._slopes.view(-1, *self.base.shape[1:]).index_copy_(0, rows, found)
        weights = torch.where(starting[..., None], self._table.of_start(edges, middles), self._table.of(edges, middles))
        weights = weights.masked_fill(silent[..., None], 0.0)
        before = self._places
        self._add(weights)
        share = self._table.share(edges, middles).masked_fill(starting | silent, 1.0)
        self._places = torch.lerp(before, self._places, share.view(*share.shape, *[1] * (self.base.dim() - 1)))
        self.age += asked
        if not measure:
            return None
        alpha = (1 + middles.square()).rsqrt()
        return ((self._places - before).flatten(3).square().mean(3).sqrt() * alpha).amax(2)

    def _add(self, weights: Tensor) -> None:
        """Update starts and midpoints; weights (B, S, R + 1, R): of each estimate at midpoints and the block's end."""
        sums: Tensor = (weights @ self._slopes.flatten(3)).view(*weights.shape[:3], *self.base.shape[1:])
        ends = self.base[:, None] + sums[:, :, -1].cumsum(1)
        self._starts = torch.cat([self.base[:, None], ends], 1)
        self._places = self._starts[:, :-1, None] + sums[:, :, :-1]

    def move_on(self, done: Tensor) -> None:
        """Retire the leading finished blocks of each sample and admit new ones; done: (B, S)."""
        passed = done.long().cumprod(1).sum(1).minimum(self._blocks - self.front)
        if not bool(passed.any()):
            return
        slots = self.age.shape[1]
        self.front = self.front + passed
        ahead = (torch.arange(slots + 1) + passed[:, None]).clamp(max=slots)
        ages = torch.cat([self.age, torch.zeros(len(passed), 1, dtype=torch.int64)], 1)
        self.age = ages.gather(1, ahead[:, :-1])
        ahead, rows = ahead.to(self.base.device, non_blocking=True), torch.arange(len(passed))[:, None]
        rows = rows.to(self.base.device, non_blocking=True)
        self._starts = self._starts[rows, ahead]
        self.base = self._starts[:, 0]
        fresh = self._starts[:, -1:, None].expand(-1, -1, self._parts, *self.base.shape[1:])
        self._places = torch.cat([self._places, fresh], 1)[rows, ahead[:, :-1]]
        self._slopes = self._slopes[rows, ahead[:, :-1].clamp(max=slots - 1)]
