"""The rows of one call spread over the ranks of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["spread_rows"]


def spread_rows(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    """eps of all rows, each rank having evaluated its share: the same bits on every rank, which all must call it.

    Args:
        denoise: (x, t) -> eps for some of the rows.
        x, t: (B, ...) and (B,), the same on every rank.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    size = -(-len(x) // world_size)
    mine = slice(min(rank * size, len(x) - 1), (rank + 1) * size)  # a rank without rows repeats the last
    own = denoise(x[mine], t[mine])
    own = torch.cat([own, own[-1:].expand(size - len(own), *own.shape[1:])]).contiguous()
    found = [torch.empty_like(own) for _ in range(world_size)]
    torch.distributed.all_gather(found, own)
    return torch.cat(found)[: len(x)]
