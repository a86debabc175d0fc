"""Spreading the rows of one call over the ranks of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["own_rows", "spread_rows"]


def own_rows(count: int) -> slice:
    """The rows of `count` that this rank evaluates; a rank without any repeats the last."""
    rank, size = torch.distributed.get_rank(), -(-count // torch.distributed.get_world_size())
    return slice(min(rank * size, count - 1), (rank + 1) * size)


def spread_rows(denoise: Callable[[slice], Tensor], count: int) -> Tensor:
    """eps of all rows, each rank evaluating its share; bitwise equal on all ranks, which must all call this.

    Args:
        denoise: rows -> their eps.
        count: B, the total number of rows, the same on every rank.
    """
    world_size = torch.distributed.get_world_size()
    size = -(-count // world_size)
    own = denoise(own_rows(count))
    own = torch.cat([own, own[-1:].expand(size - len(own), *own.shape[1:])]).contiguous()
    found = [torch.empty_like(own) for _ in range(world_size)]
    torch.distributed.all_gather(found, own)
    return torch.cat(found)[:count]
