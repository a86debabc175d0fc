"""Brownian paths, one per sample, shared by all step counts."""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mlem.noise import NoiseStream
from mlem.schedule import NoiseSchedule, expand_like

__all__ = ["BrownianPath", "NoisePath"]


class NoisePath(Protocol):
    """What a solver needs of a Brownian path; see `BrownianPath`."""

    def at(self, t: float) -> Tensor:
        """B at time t: (B, ...)."""
        ...

    def between(self, t: float, kappa: Tensor) -> tuple[Tensor, Tensor]:
        """B at kappa^2, with one kappa per sample (B,) between the last time requested and t, and B at t."""
        ...


class _Cell(NamedTuple):
    """A time interval, in ticks; its left end is a node."""

    left: int
    right: float


class _Split(NamedTuple):
    """A cell, and a time in it at which B is drawn: from the normal of that node, or its own normal between nodes.

    slot: of the normal. weight: position of the time within the cell in the clock kappa^2, in [0, 1]. spread: standard
    deviation of the Brownian bridge there.
    """

    left: int
    here: float
    right: float
    inside: bool
    slot: int
    weight: float
    spread: float


class _Route(NamedTuple):
    """The splits that lead to a time, the cells left below it, lowest first, and the ends of those cells."""

    step: float
    splits: tuple[_Split, ...]
    cells: tuple[_Cell, ...]
    ends: frozenset[float]


class _Known(NamedTuple):
    """What is known at a time: the cells below it, lowest first, and B at their ends."""

    step: float
    cells: tuple[_Cell, ...]
    values: dict[float, Tensor]


_TICKS = 48000
"""Ticks in t = 1, so that all nodes are whole numbers."""
_SPANS = tuple(_TICKS // steps for steps in (10, 20, 32, 50, 64, 96, 100, 128, 200, 1000))
"""Their multiples are the nodes of the tree, in this order of priority."""

AT_ONCE = 1 << 17
"""Numbers drawn at once: more would not fit the cache, fewer would be mostly overhead."""


@functools.lru_cache(4096)
def _split(left: int, right: int) -> int | None:
    """The node of highest priority strictly inside, closest to the middle."""
    for span in _SPANS:
        first, last = (left // span + 1) * span, (right - 1) // span * span
        if first < right:
            return min(max(round((left + right) / 2 / span) * span, first), last)
    return None


def _split_at(schedule: NoiseSchedule, left: int, right: float, step: float) -> _Split:
    """The split of a cell on the way to `step`: at a node, or, where none is inside, at `step` itself."""
    node = _split(left, math.ceil(right))
    here = step if node is None else node
    slot = (left << 32) + int((here - left) * 2**32) if node is None else node
    before, at, after = (_clock(schedule, end) for end in (left, here, right))
    weight, spread = (at - before) / (after - before), math.sqrt((at - before) * (after - at) / (after - before))
    return _Split(left, here, right, node is None, slot, weight, spread)


def _route(schedule: NoiseSchedule, cells: list[_Cell], step: float) -> Iterator[_Split]:
    """The splits that lead to B at `step`, below all earlier requests; updates `cells`, lowest first."""
    while step < cells[-1].left:
        cells.pop()
    while step != cells[-1].left:
        left, right = cells.pop()
        yield (split := _split_at(schedule, left, right, step))
        cells.append(_Cell(left, split.here))
        if split.inside:
            return
        if step >= split.slot:
            cells.append(_Cell(split.slot, right))


@functools.lru_cache(256)
def _routes(
    schedule: NoiseSchedule, cells: tuple[_Cell, ...], steps: tuple[float, ...], room: int
) -> tuple[_Route, ...]:
    """The routes to falling times in turn: at least one, and until they have this many splits."""
    below, count, routes = list(cells), 0, list[_Route]()
    for step in steps:
        splits = tuple(_route(schedule, below, step))
        ends = frozenset({0, step, *(end for cell in below for end in cell)})
        routes.append(_Route(step, splits, tuple(below), ends))
        count += len(splits)
        if count >= room:
            break
    return tuple(routes)


def _own_split(left: Tensor, right: Tensor) -> Tensor:
    """`_split` of many cells; the left end if there is no node inside. Whole numbers in float64, (B,)."""
    found = left
    for span in reversed(_SPANS):
        first, last = (left // span + 1) * span, (right - 1) // span * span
        nearest = torch.round((left + right) / 2 / span) * span
        found = torch.where(first < right, torch.minimum(torch.maximum(nearest, first), last), found)
    return found


@functools.cache
def _depth(left: int, right: int) -> int:
    """How often a cell can be split until no node is left inside."""
    middle = _split(left, right)
    return 0 if middle is None else 1 + max(_depth(left, middle), _depth(middle, right))


def _bridged(left: Tensor, here: Tensor, right: Tensor, at_left: Tensor, at_right: Tensor, z: Tensor) -> Tensor:
    """A Brownian motion at clocks `here` (B,), given its values on either side and standard normals z (B, ...).

    Where both ends coincide, the value there.
    """
    width = (right - left).clamp(min=torch.finfo(left.dtype).tiny)
    weight = expand_like((here - left) / width, z)
    spread = expand_like(((here - left) * (right - here) / width).clamp(min=0).sqrt(), z)
    return at_left * (1 - weight) + at_right * weight + z * spread


class BrownianPath:
    """A Brownian motion B in the clock `kappa^2`, one per sample and pixel, shared by all step counts.

    `path.at(t)` is B(kappa(t)^2), with B = 0 at t = 0. Two uses:

    - Euler-Maruyama takes increments in the clock kappa^2: `B(kappa^2) - B(kappa'^2)`, variance `kappa^2 - kappa'^2`.
    - Ancestral sampling (DDPM) needs `kappa'^2 (M(1/kappa'^2) - M(1/kappa^2))` with M a Brownian motion in the
      clock 1/kappa^2. By time inversion `M(1/c) = B(c) / c` is one, so the noise of the step is
      `B(kappa'^2) - (kappa'/kappa)^2 B(kappa^2)`: finite, and zero on the last step.

    Levy's construction; its nodes are the times of uniform grids of 10, 20, 32, 50, 64, 96, 100, 128, 200 and 1000
    steps, each keying one normal. Coarse grids come first, so that they need one or two normals a step. Between two
    nodes lies a bridge, keyed by the time requested. Hence grids with at most one time strictly between two nodes, such
    as all uniform grids of up to 1000 steps, agree exactly wherever they meet; finer ones have the exact distribution
    and agree to a thousandth. Times must be requested in falling order: what lies above the last is forgotten.
    `path.between(t, kappa)` goes on to t and also returns B at an intermediate time, a different one for each sample.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        seed: int,
        indices: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        times: Sequence[float] = (),
    ) -> None:
        """indices: (B,) int64, sample indices, on the device to use. shape: of one sample.

        times: the falling times that will be requested, if known: their normals are then drawn several at once.
        """
        self._schedule, self._indices, self._shape, self._dtype = schedule, indices, tuple(shape), dtype
        self._nodes, self._inside = NoiseStream(seed, "brownian"), NoiseStream(seed, "brownian-bridge")
        self._coming = deque(_step(t) for t in times)
        self._known: _Known | None = None
        self._ready: deque[_Known] = deque()

    def at(self, t: float) -> Tensor:
        """B(kappa(t)^2): (B, *shape). Raises ValueError if t is above an earlier request."""
        step = _step(t)
        if self._known is None:
            end = self._normals(self._nodes, [_TICKS])[0] * math.sqrt(_clock(self._schedule, _TICKS))
            self._known = _Known(_TICKS, (_Cell(0, _TICKS),), {0: torch.zeros_like(end), _TICKS: end})
        if step > self._known.step:
            raise ValueError(f"a Brownian path is read at falling times; {t} comes after {self._known.step / _TICKS}")
        if step != self._known.step:
            if not self._ready or self._ready[0].step != step:
                self._go_on(self._known, step)
            self._known = self._ready.popleft()
        return self._known.values[step]

    def between(self, t: float, kappa: Tensor) -> tuple[Tensor, Tensor]:
        """B at kappa^2, with one kappa per sample (B,) between the last time requested and t, and B at t.

        A grid through these times would get the same numbers, up to one node. Raises ValueError if no time was
        requested before, or t is above the last.
        """
        if self._known is None:
            raise ValueError("between() starts from the last time requested: call at() first")
        _, cells, values = self._known
        at_t, low = self.at(t), _step(t)
        step = (self._schedule.time_from_kappa(kappa) * _TICKS).clamp(min=low)
        above = [cell for cell in cells if cell.right > low]
        left, at_left, right, at_right = self._narrowed(step, above, values)
        number = left.long()
        z = self._inside.normal(
            self._indices, ((number << 32) + ((step - left) * 2**32).long())[None], self._shape, self._dtype
        )[0]
        at_left = torch.where((left < low).view(-1, *[1] * len(self._shape)), at_t, at_left)
        clocks = self._schedule.kappa(torch.stack([left.clamp(min=low), right]) / _TICKS).square()
        return _bridged(clocks[0], kappa.square(), clocks[1], at_left, at_right, z), at_t

    def _narrowed(
        self, step: Tensor, cells: Sequence[_Cell], values: Mapping[float, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The known nodes on either side of each sample's own time (B,), and B there."""

        def rows(mask: Tensor) -> Tensor:
            return mask.view(-1, *[1] * len(self._shape))

        lowest = cells[0]
        left, right = torch.full_like(step, lowest.left), torch.full_like(step, lowest.right)
        at_left, at_right = values[lowest.left], values[lowest.right]
        for cell in cells[1:]:
            above = step >= cell.left
            left, right = left.masked_fill(above, cell.left), right.masked_fill(above, cell.right)
            at_left = torch.where(rows(above), values[cell.left], at_left)
            at_right = torch.where(rows(above), values[cell.right], at_right)
        for _ in range(max(_depth(cell.left, math.ceil(cell.right)) for cell in cells)):
            middle = _own_split(left, right)
            z = self._nodes.normal(self._indices, middle.long()[None], self._shape, self._dtype)[0]
            clocks = self._schedule.kappa(torch.stack([left, middle, right]) / _TICKS).square()
            value = _bridged(clocks[0], clocks[1], clocks[2], at_left, at_right, z)
            up, down = (step >= middle) & (middle > left), (step < middle) & (middle > left)  # without a node: neither
            left, right = torch.where(up, middle, left), torch.where(down, middle, right)
            at_left = torch.where(rows(up), value, at_left)
            at_right = torch.where(rows(down), value, at_right)
        return left, at_left, right, at_right

    def _go_on(self, known: _Known, step: float) -> None:
        """Find B at `step`, and at as many later times as are efficient at once."""
        while self._coming and self._coming[0] >= step:
            self._coming.popleft()
        room = AT_ONCE // (len(self._indices) * math.prod(self._shape))
        routes = _routes(self._schedule, known.cells, (step, *itertools.islice(self._coming, room)), room)
        normals = self._drawn([split for route in routes for split in route.splits])
        self._ready.clear()
        values = dict(known.values)
        for route in routes:
            for split in route.splits:
                value = (values[split.left] * (1 - split.weight)).add_(values[split.right] * split.weight)
                values[split.here] = value.add_(next(normals[split.inside]).mul_(split.spread))
            values = {end: value for end, value in values.items() if end in route.ends}
            self._ready.append(_Known(route.step, route.cells, dict(values)))

    def _drawn(self, splits: Sequence[_Split]) -> dict[bool, Iterator[Tensor]]:
        """The normals of these splits, in order; at nodes and between nodes separately."""
        drawn: dict[bool, Iterator[Tensor]] = {}
        for stream, inside in ((self._nodes, False), (self._inside, True)):
            slots = [split.slot for split in splits if split.inside is inside]
            drawn[inside] = iter(self._normals(stream, slots)) if slots else iter(())
        return drawn

    def _normals(self, stream: NoiseStream, slots: Sequence[int]) -> Tensor:
        return stream.normal(self._indices, slots, self._shape, self._dtype)


def _step(t: float) -> float:
    """A time in ticks."""
    step = t * _TICKS
    return round(step) if abs(step - round(step)) < 1e-8 else step  # 0.058 * 1000 is not 58


@functools.lru_cache(4096)
def _clock(schedule: NoiseSchedule, step: float) -> float:
    """kappa^2 at a tick."""
    return schedule.kappa(step / _TICKS).item() ** 2
