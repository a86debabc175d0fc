"""The networks that are built by name: architectures of a given size, and classes that a level's files may name.

Nothing else is ever built from a name in a file. A new architecture is one entry of ARCHITECTURES, and one of CLASSES
if its levels should load by themselves.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from mlem.networks.dit import dit
from mlem.networks.unet import unet

__all__ = ["ARCHITECTURES", "CLASSES", "LoadableClass", "build", "config_of", "from_config", "told"]


class LoadableClass(NamedTuple):
    """A class that a level's config.json may name.

    Args:
        module: where it is imported from.
        axes: number of axes of one sample.
        base: where the class of diffusers is that it derives from, if any; a network may be of either.
    """

    module: str
    axes: int
    base: str | None = None


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"unet": unet, "dit": dit}
"""Name -> function of (size, shape, options) that builds a network with fresh weights."""

CLASSES: dict[str, LoadableClass] = {
    "UNet2DModel": LoadableClass("mlem.networks.unet_2d", 3, "diffusers.models.unets.unet_2d"),
    "PatchUNet2DModel": LoadableClass("mlem.networks.patch_unet", 3),
    "UNet2DConditionModel": LoadableClass("diffusers.models.unets.unet_2d_condition", 3),
    "DiTTransformer2DModel": LoadableClass("diffusers.models.transformers.dit_transformer_2d", 3),
    "SD3Transformer2DModel": LoadableClass("diffusers.models.transformers.transformer_sd3", 3),
    "SanaTransformer2DModel": LoadableClass("diffusers.models.transformers.sana_transformer", 3),
    "WanTransformer3DModel": LoadableClass("diffusers.models.transformers.transformer_wan", 4),
}
"""The allow-list: class name -> where it is; all but one belong to diffusers."""


def build(name: str, size: str, shape: Sequence[int], **options: float | int | str | bool) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        name: of the architecture, a key of ARCHITECTURES.
        size: one of the architecture's sizes, such as "s".
        shape: of one sample, (C, H, W) for images.
        options: of the architecture, such as dropout=0.1.

    Raises:
        ValueError: a wrong name or option (suggests the nearest match), or an option out of range.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"network must be one of {', '.join(ARCHITECTURES)}, got {name!r}{_near(name, ARCHITECTURES)}")
    known = [*inspect.signature(ARCHITECTURES[name]).parameters][2:]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}; its options are {', '.join(known)}")
    return ARCHITECTURES[name](size, shape, **options)


def told(name: str, classes: int) -> dict[str, int]:
    """Conditions of a network built by `build`: argument -> number of classes.

    A transformer always takes a class; without classes, all images share one.
    """
    return {"class_labels": max(1, classes)} if classes or name == "dit" else {}


def config_of(network: nn.Module) -> dict[str, Any]:
    """The config.json of a network: a diffusers model's own config; for other modules, the class name."""
    kind = type(network)
    to_json: Callable[[], str] | None = getattr(network, "to_json_string", None)  # of diffusers' ConfigMixin
    config: dict[str, Any] = {} if to_json is None else json.loads(to_json())
    known = CLASSES.get(kind.__name__)
    if not config or (known is not None and kind.__module__ not in (known.module, known.base)):
        config["_class_name"] = f"{kind.__module__}.{kind.__qualname__}"
    return config


def from_config(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build a network of class `class_name`, a key of CLASSES, with fresh weights, from the result of `config_of`."""
    return getattr(importlib.import_module(CLASSES[class_name].module), class_name).from_config(dict(config))


def _near(name: str, names: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]}?" if near else ""
