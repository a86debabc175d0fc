"""How networks are run in `gpu.py`: precision, `torch.compile`, and CUDA graphs.

A graph repeats the kernels of a call without launching each again, where a small network spends most of its time.
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
    """precision: as in `Sampler`. compiled: by `torch.compile`, for one shape. graphs: captured, one per shape."""

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
    """The precision in which a sampler calls networks in this mode."""
    dtype = PRECISIONS[mode.precision]
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


@contextmanager
def running(levels: Sequence[Level], mode: Mode) -> Generator[None, None, None]:
    """Run the networks of these levels in this mode within the block, except for its precision."""
    for level in levels:
        assert level.flops  # counted first, in the plain network
        forward: Callable[..., Any] = level.network.forward
        if mode.compiled:
            # inside: names of weights, and wrappers of the network, do not change
            forward = torch.compile(forward, dynamic=False)
        _replace(level.network, Graphs(forward) if mode.graphs else forward)
    try:
        yield
    finally:
        for level in levels:
            _replace(level.network, None)
        if mode.compiled:
            torch.compiler.reset()  # or the next shapes would reach the recompilation limit


def _replace(network: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Make a network run `forward` instead of its own; None: restore its own."""
    if forward is None:
        vars(network).pop("forward", None)
    else:
        vars(network)["forward"] = forward


@dataclass(frozen=True)
class _Captured:
    """A captured call: its inputs, the graph that repeats it, and its output."""

    inputs: list[Tensor]
    replay: Callable[[], object]
    output: Tensor


class Graphs:
    """A network's forward pass as CUDA graphs, one per combination of shapes, dtypes and autocast.

    Tensors are copied in and out, so the next call does not overwrite an output. No gradients. On a CPU, which has no
    graphs, the call is repeated with the same buffers.
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
            # a cache of cast weights would be gone, or changed, when the graph is replayed
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
        # one memory pool for all: their kernels never overlap, and outputs are copied before the next replay
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()
        return _Captured(inputs, graph.replay, output)
