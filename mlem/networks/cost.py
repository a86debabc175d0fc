"""What a network costs: parameters, FLOPs, seconds; and the mode in which it is evaluated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mlem.conditions import blank
from mlem.networks.calling import by_position

__all__ = ["evaluating", "flops", "parameters", "seconds_per_image", "to_channels_last"]


@contextmanager
def evaluating(module: nn.Module | None) -> Generator[None, None, None]:
    """Eval mode within the block; afterwards every submodule is back in the mode that it was in."""
    training = [] if module is None else [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def parameters(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def flops(
    network: nn.Module, shape: Sequence[int], conditions: Mapping[str, int | tuple[int | None, ...]] | None = None
) -> int:
    """Floating-point operations (2 for each multiply-add) to evaluate one sample, as torch counts them; 0 if it cannot.

    Args:
        network: on any device, the meta device among them.
        shape: of one sample, (C, H, W) for images.
        conditions: what it is told beside x and t, as `Level` has it.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    device, dtype = _placed(network)
    x = torch.zeros(1, *shape, device=device, dtype=dtype)
    # the plain kernel of attention: torch does not count those of every device; eval mode: dropout would draw from the
    # global random numbers
    counting = FlopCounterMode(display=False)
    with counting as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad(), evaluating(network):
        by_position(network)(x, torch.zeros(1, device=device), **blank(dict(conditions or {}), 1, device, dtype))
    return counter.get_total_flops()


def seconds_per_image(
    network: nn.Module,
    shape: Sequence[int],
    batch_size: int,
    repeats: int = 5,
    conditions: Mapping[str, int | tuple[int | None, ...]] | None = None,
) -> float:
    """Median time to evaluate a batch, over its size, on the network's device; the first call does not count.

    Args:
        network: in the mode in which it is to be timed.
        shape: of one sample, (C, H, W) for images.
        batch_size: samples in a call.
        repeats: number of calls that count.
        conditions: what it is told beside x and t, as `Level` has it.
    """
    device, dtype = _placed(network)
    x = torch.zeros(batch_size, *shape, device=device, dtype=dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    t = torch.zeros(batch_size, device=device)
    told = blank(dict(conditions or {}), batch_size, device, dtype)
    ask, times = by_position(network), []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            ask(x, t, **told)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begin)
    return statistics.median(times[1:]) / batch_size


def to_channels_last(network: nn.Module) -> None:
    """Keep the weights of a network of images in channels_last, in place, unless it has volumes' 5-D weights."""
    # not tensor by tensor with contiguous(): that leaves a weight of one channel as it is, which gives other last bits
    if all(weight.dim() != 5 for weight in (*network.parameters(), *network.buffers())):
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _placed(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a network's first parameter is, and its dtype; the CPU and the default dtype for one without."""
    first = next(network.parameters(), None)
    return (torch.device("cpu"), torch.get_default_dtype()) if first is None else (first.device, first.dtype)
