"""Cost of a network: parameters, FLOPs, seconds; and its evaluation mode."""

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
    """Eval mode within the block; afterwards every submodule returns to its previous mode."""
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
    """Floating-point operations (2 per multiply-add) to evaluate one sample, counted by torch; 0 if it cannot.

    Args:
        network: on any device, including meta.
        shape: of one sample, (C, H, W) for images.
        conditions: what it takes besides x and t, as in `Level`.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    device, dtype = _placed(network)
    x = torch.zeros(1, *shape, device=device, dtype=dtype)
    # plain attention kernel: torch does not count the others on every device; eval mode: dropout would draw from the
    # global random state
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
    """Median seconds per image to evaluate a batch on the network's device, without the first call.

    Args:
        network: in the mode to be timed.
        shape: of one sample, (C, H, W) for images.
        batch_size: samples per call.
        repeats: number of timed calls.
        conditions: what it takes besides x and t, as in `Level`.
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
    """Convert an image network's weights to channels_last, in place, unless it has 5-D weights of volumes."""
    # not tensor by tensor with contiguous(): that skips weights of one channel, which changes the last bits
    if all(weight.dim() != 5 for weight in (*network.parameters(), *network.buffers())):
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _placed(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a network's first parameter; the CPU and the default dtype if it has none."""
    first = next(network.parameters(), None)
    return (torch.device("cpu"), torch.get_default_dtype()) if first is None else (first.device, first.dtype)
