"""How diffusers networks are called: which arguments are x and the time, and where conditions go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["argument_names", "by_position", "unwrapped"]


class _Call(NamedTuple):
    """Arguments of a class.

    Args:
        x, time: their names.
        inner: name of a condition -> the argument that holds it in a dictionary.
    """

    x: str = "hidden_states"
    time: str = "timestep"
    inner: Mapping[str, str] = {}


_CALLS = {
    "UNet2DConditionModel": _Call("sample", inner=dict.fromkeys(("text_embeds", "time_ids"), "added_cond_kwargs")),
    "DiTTransformer2DModel": _Call(),
    "SD3Transformer2DModel": _Call(),
    "SanaTransformer2DModel": _Call(),
    "WanTransformer3DModel": _Call(),
}
"""Class -> how it is called; all others as network(x, time, **conditions)."""


class _ByName(nn.Module):
    """A network called with keyword arguments."""

    def __init__(self, network: nn.Module, call: _Call) -> None:
        super().__init__()
        self.network, self._call = network, call
        config: Any = getattr(network, "config", {})
        self._time_scale: float = config.get("timestep_scale", 1.0)  # for Sana, whose pipeline applies it

    def forward(self, x: Tensor, time: Tensor, **conditions: Tensor) -> Any:
        arguments: dict[str, Any] = {self._call.x: x, self._call.time: time * self._time_scale}
        for name, value in conditions.items():
            if name in self._call.inner:
                arguments.setdefault(self._call.inner[name], {})[name] = value
            else:
                arguments[name] = value
        return self.network(**arguments)


def argument_names(network: Any) -> tuple[str, str]:
    """Names of the arguments of a diffusers network that are x and the time."""
    call = _CALLS.get(type(network).__name__, _Call("sample"))
    return call.x, call.time


def by_position(network: Any) -> Any:
    """The network as a function of (x, time, **conditions): itself, or a module around it."""
    call = _CALLS.get(type(network).__name__)
    return network if call is None or not type(network).__module__.startswith("diffusers.") else _ByName(network, call)


def unwrapped(network: nn.Module) -> nn.Module:
    """The network that was passed to `by_position`."""
    return network.network if isinstance(network, _ByName) else network
