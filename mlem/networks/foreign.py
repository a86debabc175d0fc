"""Networks saved by diffusers: reading the folder of a model or a pipeline for sampling."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from mlem.files import read_object
from mlem.networks.registry import CLASSES

__all__ = ["ForeignNetwork", "read_foreign"]

_Conditions: TypeAlias = dict[str, "int | tuple[int | None, ...]"]


class ForeignNetwork(NamedTuple):
    """A network in a diffusers folder.

    Args:
        network: in eval mode.
        shape: of one sample; None if the config does not give it.
        conditions: what it takes besides x and t, as in `Level`.
        scheduler: the config of the scheduler beside it, or None.
        latents: scale and shift of latents by the pipeline's decoder; empty for images.
    """

    network: nn.Module
    shape: tuple[int, ...] | None
    conditions: _Conditions
    scheduler: dict[str, Any] | None
    latents: dict[str, float]


def read_foreign(folder: Path, dtype: torch.dtype | None) -> ForeignNetwork:
    """Read a folder saved by diffusers: a model, or a pipeline with `unet` or `transformer` in it.

    Weights are safetensors; nothing is downloaded, and only classes in `CLASSES` are built.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing.
        ValueError: mlem cannot sample the network; the message says why.
    """
    own, scheduler = _folders(folder)
    config = read_object(own / "config.json")
    kind = str(config.get("_class_name"))
    if kind not in CLASSES:
        raise ValueError(f"{own} holds a {kind}; mlem can sample {', '.join(CLASSES)}")
    _refuse(own, kind, config)
    about = _ABOUT[kind](config)
    cls = getattr(importlib.import_module(CLASSES[kind].module), kind)
    network: nn.Module = cls.from_pretrained(own, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
    found = read_object(scheduler) if scheduler is not None else None
    if kind in FLOWS and found is not None and not _of_flows(found):
        raise ValueError(f"{own} holds a {kind}, trained on a flow, but {scheduler} is for no flow; save both together")
    return ForeignNetwork(network.eval(), _shape(config, kind), about, found, _latents(folder))


def _folders(folder: Path) -> tuple[Path, Path | None]:
    """The folder of the network, and the file of the scheduler, if there is one."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; name that of a diffusers model or pipeline")
    own = folder
    if (folder / "model_index.json").is_file():
        index = read_object(folder / "model_index.json")
        for name in ("transformer_2", "unet_2"):
            if index.get(name, [None])[0] is not None:
                raise ValueError(
                    f"{folder} has two networks, each for part of the noise levels; name the folder of one"
                )
        parts = [name for name in ("unet", "transformer") if index.get(name, [None])[0] is not None]
        if not parts:
            raise ValueError(f"{folder} is a pipeline of {index.get('_class_name')} without unet or transformer")
        if (folder / parts[0]).is_dir():  # otherwise it is in the folder itself, another layout of diffusers
            own = folder / parts[0]
    if not (own / "config.json").is_file():
        raise FileNotFoundError(f"{own} has no config.json; name the folder of a diffusers model or pipeline")
    places = [own / "scheduler_config.json", own.parent / "scheduler" / "scheduler_config.json"]
    return own, next((place for place in places if place.is_file()), None)


def _of_flows(scheduler: Mapping[str, Any]) -> bool:
    return "FlowMatch" in str(scheduler.get("_class_name")) or bool(scheduler.get("use_flow_sigmas"))


def _refuse(folder: Path, kind: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError for networks that mlem would sample wrongly."""
    time = config.get("time_embedding_type", "positional")
    if time != "positional":
        raise ValueError(f"{folder}: a {time} time embedding is not supported; only positional ones take any time")
    classes = config.get("class_embed_type")
    if classes is not None:
        raise ValueError(f"{folder}: class embeddings of type {classes} are not supported; labels are")
    addition = config.get("addition_embed_type")
    if addition not in (None, "text_time"):
        raise ValueError(f"{folder}: embeddings of type {addition} are not supported; text and text_time are")
    if kind == "SanaTransformer2DModel" and config.get("guidance_embeds"):
        raise ValueError(
            f"{folder}: it takes the guidance scale as input, like distilled networks; use one that is not distilled"
        )
    channels, out = config.get("in_channels"), config.get("out_channels")
    if channels is not None and out not in (None, channels, 2 * channels):
        raise ValueError(f"{folder}: it takes {channels} channels and returns {out}: it needs more input than x")


def _shape(config: Mapping[str, Any], kind: str) -> tuple[int, ...] | None:
    size = config.get("sample_size")
    if size is None or CLASSES[kind].axes != 3:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return config["in_channels"], height, width


def _labels(config: Mapping[str, Any]) -> _Conditions:
    """The last embedding is taken to mean no class."""
    count = config.get("num_class_embeds")
    return {} if count is None else {"class_labels": count - 1}


def _text(config: Mapping[str, Any]) -> _Conditions:
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    found: _Conditions = {"encoder_hidden_states": (None, width)}
    if config.get("addition_embed_type") == "text_time":
        ids = 6  # sizes and crops: twice height and width of the original, the crop and the target
        pooled = config["projection_class_embeddings_input_dim"] - ids * config["addition_time_embed_dim"]
        found |= {"text_embeds": (pooled,), "time_ids": (ids,)}
    return found | _labels(config)


FLOWS = ("SD3Transformer2DModel", "SanaTransformer2DModel", "WanTransformer3DModel")
"""Classes whose networks were trained on rectified flows, whatever a scheduler beside them says."""

_ABOUT: dict[str, Callable[[Mapping[str, Any]], _Conditions]] = {
    "UNet2DModel": _labels,
    "UNet2DConditionModel": _text,
    "DiTTransformer2DModel": lambda config: {"class_labels": config["num_embeds_ada_norm"]},
    "SD3Transformer2DModel": lambda config: {
        "encoder_hidden_states": (None, config["joint_attention_dim"]),
        "pooled_projections": (config["pooled_projection_dim"],),
    },
    "SanaTransformer2DModel": lambda config: {
        "encoder_hidden_states": (None, config["caption_channels"]),
        "encoder_attention_mask": (None,),
    },
    "WanTransformer3DModel": lambda config: {"encoder_hidden_states": (None, config["text_dim"])},
}
"""Class -> function of a config that returns the conditions."""


def _latents(folder: Path) -> dict[str, float]:
    """The scale, and shift, of the latents of a pipeline."""
    path = folder / "vae" / "config.json"
    if not path.is_file():
        return {}
    config = read_object(path)
    names = ("scaling_factor", "shift_factor")
    return {name: float(config[name]) for name in names if isinstance(config.get(name), int | float)}
