"""A pipeline's calls of its network: their arguments, the guidance that combines outputs, and both as a network for a
level."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlem.networks import argument_names

__all__ = ["Call", "CapturedNetwork", "Guidance", "plain_network"]

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative tolerance for recognising guidance; a twentieth in half precision."""

_DIGITS = {torch.float32: 4, torch.float64: 4}
"""Decimals to which a guidance scale can be recovered."""


def plain_network(network: nn.Module) -> nn.Module:
    """The network without the wrapper of `torch.compile`, if any."""
    inside = getattr(network, "_orig_mod", network)
    assert isinstance(inside, nn.Module)
    return inside


class Call(NamedTuple):
    """One call of a network.

    Args:
        x: (N, ...).
        time: as the pipeline passes it, a number in a tensor of any shape, or (N,).
        others: all other arguments by name.
    """

    x: Tensor
    time: Any
    others: dict[str, Any]

    @staticmethod
    def of(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The call network(*args, **kwargs)."""
        plain = plain_network(network)
        bound = _signature(type(plain)).bind(None, *args, **kwargs).arguments
        x, time = argument_names(plain)
        known = ("self", x, time, "return_dict", "kwargs")
        others = {name: value for name, value in bound.items() if name not in known}
        return Call(bound[x], bound[time], others | dict(bound.get("kwargs", {})))

    @property
    def moment(self) -> float:
        """The time as a number."""
        return float(torch.as_tensor(self.time).flatten()[0])

    def with_input(self, x: Tensor, time: Any) -> Call:
        """The same call at another x, with as many rows, and another time."""
        return Call(x, time, self.others)

    def sides(self, count: int) -> list[Call]:
        """The call split into `count` equal parts."""
        size = len(self.x) // count
        return [self.rows(torch.arange(i * size, (i + 1) * size)) for i in range(count)]

    def rows(self, rows: Tensor) -> Call:
        """The call for some of its rows, which may be repeated."""
        total = len(self.x)

        def some(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() and len(value) == total:
                return value[rows.to(value.device)]
            return {name: some(inner) for name, inner in value.items()} if isinstance(value, Mapping) else value

        return Call(some(self.x), self.time, some(self.others))

    def answer(self, network: nn.Module) -> Tensor:
        """The network's output, (N, ...)."""
        x, time = argument_names(plain_network(network))
        output = network(**{x: self.x, time: self.time}, **self.others, return_dict=False)
        return output[0]


@functools.cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _together(calls: Sequence[Call]) -> Call:
    """Several calls joined into one, if all their tensors have one row per sample."""

    def both(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, Mapping):
            return {name: both([value[name] for value in values]) for name in first}
        return torch.cat([*values]) if isinstance(first, Tensor) and first.dim() else first

    return Call(torch.cat([call.x for call in calls]), calls[0].time, both([call.others for call in calls]))


class Guidance(NamedTuple):
    """How the outputs of one step are combined: `first + scale (second - first)`, or the only output.

    Args:
        scale: None if there is one side.
        calls: calls of the network per step.
        mirrored: whether the pipeline also doubles its samples, like DiT's.
    """

    scale: float | None = None
    calls: int = 1
    mirrored: bool = False

    @staticmethod
    def found(outputs: Sequence[Tensor], answer: Tensor) -> Guidance:
        """The guidance that turns the network's outputs in this step into `answer` (B, ...), the scheduler's input.

        Raises:
            ValueError: it is not guidance.
        """
        outputs = [output[:, : answer.shape[1]] for output in outputs]  # without a learned variance
        rows = sum(len(output) for output in outputs)
        if rows == len(answer) and _alike(outputs[0], answer):
            return Guidance()
        mirrored = rows == len(answer)
        halves = outputs if len(outputs) == 2 else [*outputs[0].chunk(2)]
        if len(halves) == 2 and len(halves[0]) == len(answer) // (2 if mirrored else 1):
            first, second = (half.double() for half in halves)
            due, step = answer[: len(first)].double(), second - first
            length = step.square().sum()
            scale = ((due - first) * step).sum().item() / length.item() if length > 0 else 1.0
            scale = round(scale, _DIGITS.get(answer.dtype, 2))  # as the user wrote it: calls with other prompts agree
            if _alike((first + scale * step).to(answer.dtype), answer[: len(first)]):
                return Guidance(scale, len(outputs), mirrored)
        raise ValueError(
            "this pipeline does more with its network's output than guidance (guidance_rescale, skipped layers, ..): "
            "leave that out, or pass estimator=held with plan="
        )

    @property
    def sides(self) -> int:
        """Number of sides of the guidance."""
        return 1 if self.scale is None else 2

    def combined(self, values: Sequence[Tensor]) -> Tensor:
        """Values of each call, (N, ...), combined: one per row of the scheduler's sample."""
        if self.scale is None:
            return values[0]
        first, second = values if self.calls == 2 else values[0].chunk(2)
        guided = first + self.scale * (second - first)
        return torch.cat([guided, guided]) if self.mirrored else guided


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    tolerance = _TOLERANCE.get(other.dtype, 0.05)
    return bool((one.double() - other.double()).norm() <= tolerance * other.double().norm())


class CapturedNetwork(nn.Module):
    """The network of a pipeline with the pipeline's arguments and guidance.

    Called as network(x, time, row), where row (B,) int64 selects the sample whose arguments are used. The network is
    not a submodule: its device and format are up to the pipeline.

    Args:
        network: of the pipeline.
        guidance: how the pipeline combines its outputs.
        told: the calls of a step; `tell` replaces them.
    """

    def __init__(self, network: nn.Module, guidance: Guidance, told: Sequence[Call]) -> None:
        super().__init__()
        self._hidden, self.guidance = [network], guidance
        self._scale: float = getattr(getattr(plain_network(network), "config", None), "timestep_scale", 1.0)
        self.tell(told)

    def tell(self, told: Sequence[Call]) -> None:
        """Use the arguments of these calls from now on."""
        self._told = [*told] if self.guidance.calls == 2 else told[0].sides(self.guidance.sides)

    @property
    def network(self) -> nn.Module:
        """The network of the pipeline."""
        return self._hidden[0]

    @property
    def samples(self) -> int:
        """Number of samples in the captured calls."""
        return len(self._told[0].x)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.network.parameters(recurse)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Weights and guidance, its identity."""
        scale = torch.tensor(self.guidance.scale or 1.0)
        return {**plain_network(self.network).state_dict(*args, **kwargs), "guidance_scale": scale}

    def forward(self, x: Tensor, time: Tensor, row: Tensor) -> Tensor:
        """The guided output: x (B, ...), time (B,), row (B,) -> (B, ...)."""
        time = time * self._scale
        calls = [side.rows(row % self.samples).with_input(x, time) for side in self._told]
        if self.guidance.sides == 1:
            return calls[0].answer(self.network)
        joined = [_together(calls)._replace(time=torch.cat([time, time]))] if self.guidance.calls == 1 else calls
        return self.guidance._replace(mirrored=False).combined([call.answer(self.network) for call in joined])
