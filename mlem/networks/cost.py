"""What a network costs: parameters, FLOPs, seconds; and the mode in which it is evaluated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluating", "flops", "parameters", "seconds_per_image"]


@contextmanager
def evaluating(module: nn.Module | None) -> Iterator[None]:
    """Eval mode within the block; afterwards every submodule is back in the mode that it was in."""
    modes = {} if module is None else {part: part.training for part in module.modules()}
    if module is not None:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def parameters(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def flops(network: nn.Module, shape: Sequence[int]) -> int:
    """Floating-point operations (2 for each multiply-add) to evaluate one image of `shape` (C, H, W)."""
    from torch.utils.flop_counter import FlopCounterMode

    parameter = next(network.parameters())
    image = torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)
    # eval mode: dropout would draw from the global random numbers
    with FlopCounterMode(display=False) as counter, torch.no_grad(), evaluating(network):
        network(image, torch.zeros(1, device=parameter.device))
    return counter.get_total_flops()


def seconds_per_image(network: nn.Module, shape: Sequence[int], batch_size: int, repeats: int = 5) -> float:
    """Median time to evaluate a batch, over its size, on the network's device; the first call does not count."""
    parameter = next(network.parameters())
    image = torch.zeros(batch_size, *shape, device=parameter.device).contiguous(memory_format=torch.channels_last)
    t = torch.zeros(batch_size, device=parameter.device)
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            network(image, t)
            if parameter.device.type == "cuda":
                torch.cuda.synchronize(parameter.device)
            times.append(time.perf_counter() - begin)
    return statistics.median(times[1:]) / batch_size
