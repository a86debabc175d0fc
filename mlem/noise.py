"""All randomness of sampling: streams keyed by (seed, purpose, sample index, slot).

Nothing here keeps state between draws: a number depends on its key alone, so the same sample index gets the
same noise in any batch, on any number of ranks, and after a restart. The generator is SplitMix64 (Steele, Lea
and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) used as a keyed hash of a counter,
vectorised over samples and elements.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


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

    def _words(self, indices: Tensor, slots: Sequence[int] | Tensor, count: int) -> Tensor:
        """64 random bits for each slot, sample and element: (S, B, count) int64."""
        device = indices.device
        samples = mix(indices * GOLDEN + self._key)
        if isinstance(slots, Tensor):
            keys = mix(samples + slots * GOLDEN)
        else:  # as plain numbers: a tensor of them would make the host wait for a device
            keys = mix(torch.stack([samples + _signed(slot * GOLDEN % (1 << 64)) for slot in slots]))
        return mix(keys[..., None] + torch.arange(1, count + 1, device=device).mul_(GOLDEN))

    def normal(
        self, indices: Tensor, slots: Sequence[int] | Tensor, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Standard normals for each slot and sample: (S, B, *shape), on the device of `indices` (B,) int64.

        slots: S numbers, or (S, B) int64, other ones for each sample.

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

    def uniform(self, indices: Tensor, slots: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uniform numbers in (0, 1) for each slot and sample: (len(slots), B)."""
        # 23 bits and a half: exact in float32, and never 0 or 1
        bits = (self._words(indices, slots, 1)[..., 0] >> 41).bitwise_and_((1 << 23) - 1)
        return bits.double().add_(0.5).mul_(2.0**-23).to(dtype)
