"""Brownian paths that every step count shares, one for each sample."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mlem.noise import NoiseStream
from mlem.schedule import NUM_TIMESTEPS, NoiseSchedule, expand_like

__all__ = ["BrownianPath", "NoisePath"]


class NoisePath(Protocol):
    """What a solver asks of a Brownian path; see `BrownianPath`."""

    def at(self, t: float) -> Tensor:
        """B at time t: (B, ...)."""
        ...

    def between(self, t: float, kappa: Tensor) -> tuple[Tensor, Tensor]:
        """B at kappa^2, a kappa for each sample (B,) between the last time asked for and t, and B at t."""
        ...


class _Cell(NamedTuple):
    """A stretch of time, in timesteps (thousandths of t), and B at its ends."""

    left: int
    at_left: Tensor
    right: float
    at_right: Tensor


_SPANS = (500, 100, 20, 10, 5, 1)


def _split(left: int, right: int) -> int:
    """The roundest timestep strictly inside, the one nearest to the middle."""
    span = next(span for span in _SPANS if (left // span + 1) * span < right)
    first, last = (left // span + 1) * span, (right - 1) // span * span
    return min(max(round((left + right) / 2 / span) * span, first), last)


def _own_split(left: Tensor, right: Tensor) -> Tensor:
    """`_split` of many cells; of one that has nothing inside, its left end. Whole numbers in float64, (B,)."""
    found = left
    for span in reversed(_SPANS):
        first, last = (left // span + 1) * span, (right - 1) // span * span
        nearest = torch.round((left + right) / 2 / span) * span
        found = torch.where(first < right, torch.minimum(torch.maximum(nearest, first), last), found)
    return found


@functools.cache
def _depth(left: int, right: int) -> int:
    """How often a cell can be split before all that is left is single thousandths."""
    if right - left <= 1:
        return 0
    middle = _split(left, right)
    return 1 + max(_depth(left, middle), _depth(middle, right))


def _bridged(left: Tensor, here: Tensor, right: Tensor, at_left: Tensor, at_right: Tensor, z: Tensor) -> Tensor:
    """A Brownian motion at the clocks `here` (B,), given it at clocks on either side, by standard normals z (B, ...).

    Where both ends are one, that end.
    """
    width = (right - left).clamp(min=torch.finfo(left.dtype).tiny)
    weight = expand_like((here - left) / width, z)
    spread = expand_like(((here - left) * (right - here) / width).clamp(min=0).sqrt(), z)
    return at_left * (1 - weight) + at_right * weight + z * spread


class BrownianPath:
    """A Brownian motion B in the clock `kappa^2`, one for each sample and pixel, that every step count shares.

    `path.at(t)` is B(kappa(t)^2), with B = 0 at t = 0. Two uses:

    - Euler-Maruyama takes increments in the clock kappa^2: `B(kappa^2) - B(kappa'^2)`, variance `kappa^2 - kappa'^2`.
    - Ancestral sampling (DDPM) needs `kappa'^2 (M(1/kappa'^2) - M(1/kappa^2))` with M a Brownian motion in the
      clock 1/kappa^2. By time inversion `M(1/c) = B(c) / c` is one, so the noise of the step is
      `B(kappa'^2) - (kappa'/kappa)^2 B(kappa^2)`: finite, and zero by itself on the last step.

    Levy's construction over the thousandths of t, with a normal keyed by each; round numbers come first (halves,
    tenths, fiftieths, ..), so that 10, 50, 100 or 200 steps need one normal each. Between two thousandths a bridge,
    keyed by the time asked for. Hence grids with at most one time strictly between two thousandths, such as all
    uniform grids of up to 1000 steps, agree exactly wherever they meet; finer ones are exact in law, and agree to a
    thousandth. Times must be asked for in falling order: what lies above the last is forgotten.
    `path.between(t, kappa)` goes on to t, and says too what B was on the way, at a time of its own for each sample.
    """

    def __init__(
        self, schedule: NoiseSchedule, seed: int, indices: Tensor, shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        """indices: (B,) int64 sample indices on the device to use. shape: of one sample."""
        self._schedule, self._indices, self._shape, self._dtype = schedule, indices, tuple(shape), dtype
        self._nodes, self._inside = NoiseStream(seed, "brownian"), NoiseStream(seed, "brownian-bridge")
        # kappa^2: the ends of a cell are asked for again and again
        self._clock = functools.lru_cache(64)(self._squared_kappa)
        # the cells below the last time, lowest first; empty before the first question
        self._cells: list[_Cell] = []
        self._last: tuple[float, Tensor] | None = None

    def _squared_kappa(self, step: float) -> float:
        return self._schedule.kappa(step / NUM_TIMESTEPS).item() ** 2

    def at(self, t: float) -> Tensor:
        """B(kappa(t)^2): (B, *shape). Raises ValueError when t is above a time asked for before."""
        step = t * NUM_TIMESTEPS
        if abs(step - round(step)) < 1e-9:  # 0.058 * 1000 is not 58
            step = round(step)
        if self._last is None:
            end = self._normal(self._nodes, NUM_TIMESTEPS) * math.sqrt(self._clock(NUM_TIMESTEPS))
            self._cells = [_Cell(0, torch.zeros_like(end), NUM_TIMESTEPS, end)]
            self._last = (NUM_TIMESTEPS, end)
        if step > self._last[0]:
            raise ValueError(f"a Brownian path is read with falling times; {t} comes after {self._last[0] / 1000}")
        if step != self._last[0]:
            self._last = (step, self._descend(step))
        return self._last[1]

    def between(self, t: float, kappa: Tensor) -> tuple[Tensor, Tensor]:
        """B at kappa^2, with a kappa for each sample (B,) between the last time asked for and t, and B at t.

        The same numbers that a grid through these times would meet, up to the thousandth. Raises ValueError when no
        time was asked for, or t is above the last.
        """
        if self._last is None:
            raise ValueError("between() begins at the last time asked for: call at() first")
        cells, at_t = list(self._cells), self.at(t)
        low = self._last[0]
        step = (self._schedule.time_from_kappa(kappa) * NUM_TIMESTEPS).clamp(min=low)
        left, at_left, right, at_right = self._narrowed(step, [cell for cell in cells if cell.right > low])
        number = left.long()
        z = self._inside.normal(
            self._indices, ((number << 32) + ((step - left) * 2**32).long())[None], self._shape, self._dtype
        )[0]
        at_left = torch.where((left < low).view(-1, *[1] * len(self._shape)), at_t, at_left)
        clocks = self._schedule.kappa(torch.stack([left.clamp(min=low), right]) / NUM_TIMESTEPS).square()
        return _bridged(clocks[0], kappa.square(), clocks[1], at_left, at_right, z), at_t

    def _narrowed(self, step: Tensor, cells: Sequence[_Cell]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The thousandths on either side of each sample's own time (B,), as far as it is known, and B there."""

        def rows(mask: Tensor) -> Tensor:
            return mask.view(-1, *[1] * len(self._shape))

        lowest = cells[0]
        left, right = torch.full_like(step, lowest.left), torch.full_like(step, lowest.right)
        at_left, at_right = lowest.at_left, lowest.at_right
        for cell in cells[1:]:
            above = step >= cell.left
            left, right = left.masked_fill(above, cell.left), right.masked_fill(above, cell.right)
            at_left = torch.where(rows(above), cell.at_left, at_left)
            at_right = torch.where(rows(above), cell.at_right, at_right)
        for _ in range(max(_depth(cell.left, math.ceil(cell.right)) for cell in cells)):
            middle = _own_split(left, right)
            z = self._nodes.normal(self._indices, middle.long()[None], self._shape, self._dtype)[0]
            clocks = self._schedule.kappa(torch.stack([left, middle, right]) / NUM_TIMESTEPS).square()
            value = _bridged(clocks[0], clocks[1], clocks[2], at_left, at_right, z)
            # a cell of one thousandth stays as it is
            up = (step >= middle) & (right - left > 1)
            down = (step < middle) & (right - left > 1)
            left, right = torch.where(up, middle, left), torch.where(down, middle, right)
            at_left = torch.where(rows(up), value, at_left)
            at_right = torch.where(rows(down), value, at_right)
        return left, at_left, right, at_right

    def _descend(self, step: float) -> Tensor:
        cells = self._cells
        while step < cells[-1].left:
            cells.pop()
        while step != cells[-1].left:
            cell = cells.pop()
            if cell.right - cell.left <= 1:
                offset = int((step - cell.left) * 2**32)
                value = self._bridge(cell, step, self._normal(self._inside, (cell.left << 32) + offset))
                cells.append(_Cell(cell.left, cell.at_left, step, value))
                return value
            middle = _split(cell.left, int(cell.right))
            value = self._bridge(cell, middle, self._normal(self._nodes, middle))
            cells.append(_Cell(cell.left, cell.at_left, middle, value))
            if step >= middle:
                cells.append(_Cell(middle, value, cell.right, cell.at_right))
        return cells[-1].at_left

    def _normal(self, stream: NoiseStream, slot: int) -> Tensor:
        return stream.normal(self._indices, [slot], self._shape, self._dtype)[0]

    def _bridge(self, cell: _Cell, step: float, z: Tensor) -> Tensor:
        """B at `step`, given B at the ends of the cell that holds it."""
        left, here, right = self._clock(cell.left), self._clock(step), self._clock(cell.right)
        weight = (here - left) / (right - left)
        spread = math.sqrt((here - left) * (right - here) / (right - left))
        return cell.at_left * (1 - weight) + cell.at_right * weight + z * spread
