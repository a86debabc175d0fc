"""How networks are run in `gpu.py`: precision, `torch.compile`, and CUDA graphs.

A graph repeats the kernels of a call without launching each anew: a small network spends most of its time there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlem.level import Level
from mlem.sampling.sampler import PRECISIONS

__all__ = ["MODES", "Graphs", "Mode", "autocast", "running"]


@dataclass(frozen=True)
class Mode:
    """precision: as in `Sampler`. compiled: by `torch.compile`, for one shape. graphs: captured, one for each shape."""

    precision: str = "fp32"
    compiled: bool = False
    graphs: bool = False


MODES = {
    "fp32": Mode(),
    "bf16": Mode("bf16"),
    "bf16, graphs": Mode("bf16", graphs=True),
    "bf16, compiled": Mode("bf16", compiled=True),
    "bf16, compiled, graphs": Mode("bf16", compiled=True, graphs=True),
}


def autocast(mode: Mode, device: str) -> AbstractContextManager[object]:
    """In which a sampler calls networks in this mode."""
    dtype = PRECISIONS[mode.precision]
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


@contextmanager
def running(levels: Sequence[Level], mode: Mode) -> Generator[None, None, None]:
    """The networks of these levels run in this mode within the block, but for its precision."""
    for level in levels:
        assert level.flops  # counted before, in the plain network
        forward: Callable[..., Any] = level.network.forward
        if mode.compiled:
            # inside: names of weights, and what wraps the network, stay as they are
            forward = torch.compile(forward, dynamic=False)
        _replace(level.network, Graphs(forward) if mode.graphs else forward)
    try:
        yield
    finally:
        for level in levels:
            _replace(level.network, None)
        if mode.compiled:
            torch.compiler.reset()  # or the next shapes would come to the limit of recompilations


def _replace(network: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Let a network run `forward` instead of its own; None: its own again."""
    if forward is None:
        vars(network).pop("forward", None)
    else:
        vars(network)["forward"] = forward


@dataclass(frozen=True)
class _Captured:
    """A captured call: its inputs, what repeats it, and where the output is then."""

    inputs: list[Tensor]
    replay: Callable[[], object]
    output: Tensor


class Graphs:
    """A network's forward pass as CUDA graphs, one for each combination of shapes, dtypes and autocast.

    Tensors are copied in and out, so that an output stays what it was when the next call is made. No gradients. On a
    CPU, which has no graphs, the call is made again with the same buffers.
    """

    def __init__(self, work: Callable[..., Any]) -> None:
        self._work, self._calls, self._pool = work, dict[Any, _Captured](), None

    def __call__(self, x: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        given = [x, time, *conditions.values()]
        kind = x.device.type
        casts = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (casts, *conditions, *((one.shape, one.dtype) for one in given))
        if key not in self._calls:
            self._calls[key] = self._capture(given, list(conditions), casts)
        call = self._calls[key]
        for own, new in zip(call.inputs, given, strict=True):
            own.copy_(new)
        call.replay()
        return call.output.clone()

    def _capture(self, given: Sequence[Tensor], names: Sequence[str], casts: torch.dtype | None) -> _Captured:
        inputs, kind = [one.clone() for one in given], given[0].device.type

        def run() -> Tensor:
            x, time, *rest = inputs
            # a cache of weights that were cast would be gone, or others, when the graph is replayed
            with torch.autocast(kind, casts or torch.bfloat16, casts is not None, cache_enabled=False):
                output = self._work(x, time, **dict(zip(names, rest, strict=True)))
            return getattr(output, "sample", output)

        if kind != "cuda":
            output = run().clone()
            return _Captured(inputs, lambda: output.copy_(run()), output)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # kernels are chosen and compiled before the capture
                run()
        torch.cuda.current_stream().wait_stream(side)
        # one memory for all: their kernels never overlap, and each output is copied before the next replay
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()
        return _Captured(inputs, graph.replay, output)
