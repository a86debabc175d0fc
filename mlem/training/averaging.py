"""The exponential moving average of a network's weights, through Lightning's own callback."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from mlem.training.lightning_internals import averaged_state

__all__ = ["averaged_state", "make_average"]


def make_average(decay: float) -> WeightAveraging:
    """Average with `decay`, or with `(1 + n) / (10 + n)` after n updates while that is smaller.

    Lightning's own EMAWeightAveraging has no warm-up: a short run would keep its random initial weights. Raises
    ValueError unless decay is in [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"training.average_decay must be in [0, 1), got {decay}")

    @torch.no_grad()
    def update(averaged: Any, current: Any, updates: Tensor | int) -> None:
        # a tensor on the device of the weights: reading it would make the host wait
        n = torch.as_tensor(updates, dtype=torch.float64)
        weight = (1 - torch.clamp((1 + n) / (10 + n), max=decay)).to(averaged[0].dtype)
        for average, weights in zip(averaged, current, strict=True):
            average.lerp_(weights, weight)

    return WeightAveraging(use_buffers=False, multi_avg_fn=update)
