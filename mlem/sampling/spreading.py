"""The rows of one call spread over the ranks of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["own_rows", "spread_rows"]


def own_rows(count: int) -> slice:
    """The rows of `count` that this rank evaluates; one without any repeats the last."""
    rank, size = torch.distributed.get_rank(), -(-count // torch.distributed.get_world_size())
    return slice(min(rank * size, count - 1), (rank + 1) * size)


def spread_rows(denoise: Callable[[slice], Tensor], count: int) -> Tensor:
    """eps of all rows, each rank having evaluated its share: the same bits on every rank, which all must call it.

    Args:
        denoise: rows -> their eps.
        count: B, of all rows, the same on every rank.
    """
    world_size = torch.distributed.get_world_size()
    size = -(-count // world_size)
    own = denoise(own_rows(count))
    own = torch.cat([own, own[-1:].expand(size - len(own), *own.shape[1:])]).contiguous()
    found = [torch.empty_like(own) for _ in range(world_size)]
    torch.distributed.all_gather(found, own)
    return torch.cat(found)[:count]
