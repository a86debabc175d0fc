"""All randomness of sampling: streams keyed by (seed, purpose, sample index, slot), and Brownian paths.

Nothing here keeps state between draws: a number depends on its key alone, so the same sample index gets the
same noise in any batch, on any number of ranks, and after a restart. The generator is SplitMix64 (Steele, Lea
and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) used as a keyed hash of a counter,
vectorised over samples and elements.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mlem.schedule import NoiseSchedule


def _signed(word: int) -> int:
    """The int64 with the bits of the unsigned `word`."""
    return word - (1 << 64) if word >= 1 << 63 else word


GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def mix(word: Tensor) -> Tensor:
    """The output function of SplitMix64, on int64 tensors read as 64 bits (products wrap, shifts are logical)."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        word = (word >> shift).bitwise_and_((1 << (64 - shift)) - 1).bitwise_xor_(word).mul_(multiplier)
    return (word >> 31).bitwise_and_((1 << 33) - 1).bitwise_xor_(word)


class NoiseStream:
    """Random numbers for one purpose, keyed by sample index and slot.

    seed: any integer. purpose: a word, such as "start" or "brownian". A slot is whatever the user of the stream
    counts, a step or a node of a tree: an integer in [0, 2^63).
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self._key = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little", signed=True)

    def _words(self, indices: Tensor, slots: Sequence[int], count: int) -> Tensor:
        """64 random bits for each slot, sample and element: (S, B, count) int64."""
        device = indices.device
        samples = mix(indices * GOLDEN + self._key)
        keys = mix(samples + torch.tensor(slots, device=device).mul_(GOLDEN)[:, None])
        return mix(keys[..., None] + torch.arange(1, count + 1, device=device).mul_(GOLDEN))

    def normal(self, indices: Tensor, slots: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Standard normals for each slot and sample: (len(slots), B, *shape), on the device of `indices` (B,) int64.

        Box and Muller in float64, rounded once to `dtype`: vectorised float32 functions differ in the last bit
        between the body and the tail of a tensor, and so between batch sizes.
        """
        size = math.prod(shape)
        half = -(-size // 2)
        words = self._words(indices, slots, half)
        radius = (words >> 32).double().add_(2.0**31 + 0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = words.bitwise_and_(0xFFFFFFFF).double().mul_(2 * math.pi * 2.0**-32)
        flat = torch.empty(len(slots), len(indices), 2 * half, dtype=dtype, device=indices.device)
        flat[..., :half] = torch.cos(angle).mul_(radius)
        flat[..., half:] = angle.sin_().mul_(radius)
        return flat[..., :size].reshape(len(slots), len(indices), *shape)

    def uniform(self, indices: Tensor, slot: int, dtype: torch.dtype) -> Tensor:
        """One uniform number in (0, 1) for each sample: (B,)."""
        # 23 bits and a half: exact in float32, and never 0 or 1
        bits = (self._words(indices, [slot], 1)[0, :, 0] >> 41).bitwise_and_((1 << 23) - 1)
        return bits.double().add_(0.5).mul_(2.0**-23).to(dtype)


class BrownianPath:
    """A Brownian motion B in the clock `kappa^2`, one for each sample and pixel, that every step count shares.

    `path.at(t)` is B(kappa(t)^2), with B = 0 at t = 0. Two uses:

    - Euler-Maruyama takes increments in the clock kappa^2: `B(kappa^2) - B(kappa'^2)`, variance `kappa^2 - kappa'^2`.
    - Ancestral sampling (DDPM) needs `kappa'^2 (M(1/kappa'^2) - M(1/kappa^2))` with M a Brownian motion in the
      clock 1/kappa^2. By time inversion `M(1/c) = B(c) / c` is one, so the noise of the step is
      `B(kappa'^2) - (kappa'/kappa)^2 B(kappa^2)`: finite, and zero by itself on the last step.

    Levy's construction over dyadic cells of t (2^10 of them) with a normal keyed by node; inside a cell a bridge,
    keyed by the time asked for. Hence grids with at most one time in a cell, such as all uniform grids of up to
    1024 steps, agree exactly wherever they meet; finer grids are exact in law and agree to the width of a cell.
    Times must be asked for in falling order (it keeps the 10 cells above the last time, no more).
    """

    depth = 10

    def __init__(
        self, schedule: NoiseSchedule, seed: int, indices: Tensor, shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        """indices: (B,) int64 sample indices on the device to use. shape: of one sample."""
        self._indices, self._shape, self._dtype = indices, tuple(shape), dtype
        self._nodes, self._inside = NoiseStream(seed, "brownian"), NoiseStream(seed, "brownian-bridge")
        # cells[d]: the cell of depth d that holds the last time: its number, B at its left end, B at its right end
        self._cells: list[tuple[int, Tensor, Tensor]] = []
        self._last: tuple[float, Tensor] | None = None
        # kappa^2 at t: the ends of a cell are asked for again and again
        self._clock = functools.lru_cache(64)(lambda t: schedule.kappa(t).item() ** 2)

    def _normals(self, stream: NoiseStream, slots: list[int]) -> Tensor:
        return stream.normal(self._indices, slots, self._shape, self._dtype)

    def _bridge(self, t: float, a: tuple[float, Tensor], b: tuple[float, Tensor], z: Tensor) -> Tensor:
        """B at t, given B at the times a < t < b."""
        left, here, right = self._clock(a[0]), self._clock(t), self._clock(b[0])
        weight = (here - left) / (right - left)
        return a[1] * (1 - weight) + b[1] * weight + z * math.sqrt((here - left) * (right - here) / (right - left))

    def at(self, t: float) -> Tensor:
        """B(kappa(t)^2): (B, *shape). Raises ValueError when t is above a time asked for before."""
        if self._last is None:
            start = self._normals(self._nodes, [0])[0] * math.sqrt(self._clock(1.0))
            self._cells = [(0, torch.zeros_like(start), start)]
            self._last = (1.0, start)
        if t > self._last[0]:
            raise ValueError(f"a Brownian path is read with falling times; {t} comes after {self._last[0]}")
        if t != self._last[0]:
            self._last = (t, self._descend(t, self._last))
        return self._last[1]

    def _descend(self, t: float, last: tuple[float, Tensor]) -> Tensor:
        cells = self._cells
        while not _holds(len(cells) - 1, cells[-1][0], t):
            cells.pop()
        missing = range(len(cells), self.depth + 1)
        # the node that splits cell c of depth d has number 2^d + c, as in a heap; 0 is the right end of the root
        slots = [(1 << (d - 1)) + _cell(d - 1, t) for d in missing]
        normals = self._normals(self._nodes, slots) if slots else []
        for d, z in zip(missing, normals, strict=True):
            number, left, right = cells[-1]
            width = 2.0**-d
            middle_t = (2 * number + 1) * width
            middle = self._bridge(middle_t, (middle_t - width, left), (middle_t + width, right), z)
            cells.append((2 * number, left, middle) if t < middle_t else (2 * number + 1, middle, right))
        number, left, right = cells[-1]
        width = 2.0**-self.depth
        end = ((number + 1) * width, right)
        return self._inside_cell(t, (number * width, left), last if last[0] < end[0] else end)

    def _inside_cell(self, t: float, left: tuple[float, Tensor], right: tuple[float, Tensor]) -> Tensor:
        if t == left[0]:
            return left[1]
        offset = int((t - left[0]) * 2.0 ** (self.depth + 20))
        cell = round(left[0] * 2.0**self.depth)
        return self._bridge(t, left, right, self._normals(self._inside, [(cell << 20) + offset])[0])


def _cell(depth: int, t: float) -> int:
    """Number of the cell of this depth that holds t; cells are closed on the left, and t = 1 is in the last."""
    return min(int(t * 2.0**depth), (1 << depth) - 1)


def _holds(depth: int, number: int, t: float) -> bool:
    return _cell(depth, t) == number
