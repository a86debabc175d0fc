"""All randomness of sampling: streams keyed by (seed, purpose, sample index, slot), and the table of reserved indices.

Nothing here keeps state between draws: a number depends only on its key, so the same sample index gets the same
noise in any batch, on any number of ranks, and after a restart. The generator is SplitMix64 (Steele, Lea
and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) used as a keyed hash of a counter,
vectorised over samples and elements.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

__all__ = ["RESERVED", "USER_INDICES", "NoiseStream", "check_indices", "noise_dtype", "reserved_indices"]

USER_INDICES = range(10**9)
"""Sample indices available to users."""

RESERVED: Mapping[str, range] = MappingProxyType(
    {
        "calibration": range(10**9, 11 * 10**8),
        "pilots": range(11 * 10**8, 12 * 10**8),
        "memorising": range(12 * 10**8, 13 * 10**8),
        "lipschitz": range(13 * 10**8, 14 * 10**8),
        "checking": range(14 * 10**8, 15 * 10**8),
        "learning": range(2 * 10**9, 3 * 10**9),
        "judging": range(3 * 10**9, 4 * 10**9),
    }
)
"""Sample indices of runs that fit something, so that nothing is applied to the noise it was fitted on."""


def reserved_indices(use: str, count: int, device: str | torch.device = "cpu", skip: int = 0) -> Tensor:
    """`count` indices of a use in `RESERVED`, after the first `skip`: (count,) int64."""
    indices = RESERVED[use]
    if skip + count > len(indices):
        raise ValueError(f"{use} may draw at most {len(indices)} samples, got {skip + count}")
    return torch.arange(indices.start + skip, indices.start + skip + count, device=device)


def check_indices(indices: Iterable[int]) -> list[int]:
    """The indices as plain numbers. Raises ValueError unless they are whole numbers in `USER_INDICES`."""
    if isinstance(indices, range):
        if indices:
            check_indices(sorted({indices[0], indices[-1]}))  # before a list fills the memory
        return [*indices]
    try:
        listed = [operator.index(index) for index in indices]
    except TypeError as error:
        raise ValueError(f"indices must be whole numbers >= 0: {error}") from error
    if listed and max(listed) >= USER_INDICES.stop:
        uses = ", ".join(RESERVED)
        raise ValueError(
            f"indices must be in [0, {USER_INDICES.stop}), got {max(listed)}: those above are reserved ({uses})"
        )
    if listed and min(listed) < 0:
        raise ValueError(f"indices must be distinct whole numbers >= 0, got {min(listed)}")
    return listed


def noise_dtype() -> torch.dtype:
    """The dtype of starting noise, Brownian paths and samples: float64 where that is torch's default, else float32."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


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

    seed: any integer. purpose: a word, such as "start" or "brownian". A slot is whatever the caller counts, a
    step or a node of a tree: an integer in [0, 2^63).
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self._key = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little", signed=True)

    def _words(self, indices: Tensor, slots: Sequence[int] | Tensor, count: int) -> Tensor:
        """64 random bits for each slot, sample and element: (S, B, count) int64."""
        device = indices.device
        samples = mix(indices * GOLDEN + self._key)
        if isinstance(slots, Tensor):
            keys = mix(samples + slots * GOLDEN)
        else:  # as plain numbers: a tensor would make the host wait for a device
            keys = mix(torch.stack([samples + _signed(slot * GOLDEN % (1 << 64)) for slot in slots]))
        return mix(keys[..., None] + torch.arange(1, count + 1, device=device).mul_(GOLDEN))

    def normal(
        self, indices: Tensor, slots: Sequence[int] | Tensor, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Standard normals for each slot and sample: (S, B, *shape), on the device of `indices` (B,) int64.

        slots: S numbers, or (S, B) int64, different for each sample.

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
