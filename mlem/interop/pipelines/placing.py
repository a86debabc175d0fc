"""The module that replaces a pipeline's network, and the networks it may hold."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from mlem.interop.pipelines.captured import Call, plain_network
from mlem.level import Level

__all__ = ["LARGE", "PLACES", "MultilevelNetwork", "Small", "named_networks", "place_of"]

LARGE = "large"
"""The name of the pipeline's own network."""
PLACES = ("unet", "transformer")
"""The attributes of pipelines that hold it."""
Small: TypeAlias = "nn.Module | Level | str | os.PathLike[str]"
"""What may be passed as a small network."""


class Accelerates(Protocol):
    """Makes the evaluations."""

    def evaluate(self, call: Call) -> Tensor:
        """The output in place of the large network's."""
        ...

    def restore(self) -> None:
        """Give the pipeline its own network back."""
        ...


class _Output(dict[str, Tensor]):
    """The output of a network, readable like diffusers' own: `.sample`, `["sample"]` and `[0]`."""

    @property
    def sample(self) -> Tensor:
        return self["sample"]

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__("sample" if key == 0 else key)


class MultilevelNetwork(nn.Module):
    """Replaces a pipeline's network, with the attributes of the large one."""

    def __init__(self, levels: Sequence[nn.Module], acceleration: Accelerates) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self._large = (levels[-1],)
        self.acceleration = (acceleration,)  # not a submodule

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        output = self.acceleration[0].evaluate(Call.of(self._large[0], args, kwargs))
        return _Output(sample=output) if return_dict else (output,)

    @property
    def device(self) -> torch.device:
        """Where it computes: the large network may be offloaded."""
        return next(self.levels[0].parameters()).device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["_large"][0], name)


def place_of(pipe: Any) -> str:
    """The attribute that holds the pipeline's network."""
    name = type(pipe).__name__
    for two in ("transformer_2", "unet_2"):
        if getattr(pipe, two, None) is not None:
            raise ValueError(f"{name} already switches between two networks ({two}, boundary_ratio); use it as it is")
    place = next((one for one in PLACES if isinstance(getattr(pipe, one, None), nn.Module)), None)
    if place is None:
        raise ValueError(f"{name} has neither unet nor transformer: it cannot be accelerated")
    if getattr(getattr(pipe, place), "_hf_hook", None) is not None:
        raise ValueError(
            f"the {place} of this {name} moves between devices (enable_model_cpu_offload or similar); "
            "put the pipeline on its device, with offload=True if memory is short"
        )
    if isinstance(getattr(pipe, place), MultilevelNetwork):
        raise ValueError(f"this {name} is already accelerated; call mlem.restore(pipe) first")
    return place


def named_networks(small: Sequence[Small], large: nn.Module) -> tuple[dict[str, nn.Module], list[Level]]:
    """The small networks by name, with the device and dtype of the large one; and those that came as levels."""
    found: dict[str, nn.Module] = {}
    levels: list[Level] = []
    like = next(large.parameters())
    for number, one in enumerate(small, 1):
        name, network = "small" if len(small) == 1 else f"small{number}", one
        if isinstance(one, str | os.PathLike):
            folder = Path(one)
            one = Level.load(folder) if (folder / "mlem.json").is_file() else Level.from_diffusers(folder)
        if isinstance(one, Level):
            name, network = one.name, one.network
            levels.append(one)
        assert isinstance(network, nn.Module)
        _refuse_other_latents(name, network, large)
        own = next(network.parameters())
        if own.dtype != like.dtype:
            network = copy.deepcopy(network).to(like.dtype)  # the user's network stays as it is
        found[name] = network.to(like.device).eval() if own.device != like.device else network.eval()
    if LARGE in found:
        raise ValueError(f"a small network cannot be called {LARGE}, the name of the pipeline's own")
    return found, levels


def _refuse_other_latents(name: str, network: nn.Module, large: nn.Module) -> None:
    own, other = (getattr(plain_network(one), "config", {}) for one in (network, large))
    for field in ("in_channels", "out_channels"):
        if (ours := own.get(field)) != (theirs := other.get(field)):
            raise ValueError(f"small network {name} has {field}={ours}, the pipeline's has {theirs}; they must agree")
