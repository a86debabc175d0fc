"""Checking a composed config before anything heavy is imported, and what of it may be written down."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ALLOWED = ("mlem", "torch", "lightning", "torchmetrics", "diffusers")
"""Modules from which a `_target_` may come."""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _from_1(value: Any) -> bool:
    return _whole(value) and value >= 1


def _devices(value: Any) -> bool:
    listed = isinstance(value, list) and bool(value) and all(_whole(n) and n >= 0 for n in value)
    return listed or value in ("auto", -1) or _from_1(value)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


_FROM_1 = ("steps", "batch_size", "accumulate", "epoch_steps", "checkpoint_every")
_VALUES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    (
        "a whole number >= 1",
        _from_1,
        (
            *(f"training.{name}" for name in _FROM_1),
            "evaluation.batch_size",
            "evaluation.reference_steps",
            "calibration.reference_steps",
            "metric.blocks",
            "trainer.num_nodes",
            *(f"eval.{name}" for name in ("reference_steps", "plan_steps", "trials", "draws")),
            "steps",
            "batch_size",
            *(f"model.{name}" for name in ("steps", "updates", "batch_size", "images", "checkpoint_every")),
        ),
    ),
    (
        "a whole number >= 0",
        lambda value: _whole(value) and value >= 0,
        (
            "seed",
            "training.warmup_steps",
            "training.workers",
            "evaluation.every_n_epochs",
            "data.held_out",
            "eval.shown",
        ),
    ),
    (
        "a whole number >= 2, or 0 for none",
        lambda value: _whole(value) and (value >= 2 or value == 0),
        ("calibration.images",),
    ),
    ("a whole number >= 3", lambda value: _whole(value) and value >= 3, ("calibration.times",)),
    (
        "a list of whole numbers >= 1",
        lambda value: isinstance(value, list) and bool(value) and all(_whole(n) and n >= 1 for n in value),
        ("calibration.batch_sizes",),
    ),
    ("a whole number >= 2", lambda value: _whole(value) and value >= 2, ("model.draws", "model.held_out")),
    ("a whole number >= 1, a list of device numbers, or auto", _devices, ("trainer.devices",)),
    ("a list of one or more sizes, such as [xs,s]", _sizes, ("model.levels",)),
    (
        "a whole number >= 2",
        lambda value: _whole(value) and value >= 2,
        ("schedule.num_timesteps",),
    ),
    (
        "a number",
        lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
        tuple(f"schedule.{name}" for name in ("offset", "log_snr_min", "beta_start", "beta_end")),
    ),
    (
        "a number > 0",
        lambda value: _number(value) and value > 0,
        ("training.learning_rate", "model.learning_rate"),
    ),
    (
        "a whole number >= 2, or null",
        lambda value: value is None or (_whole(value) and value >= 2),
        ("metric.reference",),
    ),
    ("a number > 0, or null", lambda value: value is None or (_number(value) and value > 0), ("model.lambda",)),
    ("in (0, 1]", lambda value: _number(value) and 0 < value <= 1, ("model.budget", "eval.budget")),
    ("a whole number >= 100", lambda value: _whole(value) and value >= 100, ("eval.replicates",)),
    (
        "a number >= 0",
        lambda value: _number(value) and value >= 0,
        ("training.weight_decay", "training.gradient_clip"),
    ),
    (
        "in [0, 1)",
        lambda value: _number(value) and 0 <= value < 1,
        ("training.average_decay", "model.dropout"),
    ),
    (
        "true or false",
        lambda value: isinstance(value, bool),
        ("trainer.compile", "dry_run", "debug", "metric.kid", "metric.precision_recall"),
    ),
)
"""What a value must be, how to tell, and the options that this holds for."""
_TEXT = ("root", "resume", "data.name", "data.source", "data.folder", "schedule.kind", "sampler.name", "sampler.solver")
_TEXT += ("model.name", "model.solver", "metric.cache", "trainer.accelerator", "trainer.strategy")
_TEXT_OR_NULL = ("family", "level", "grid", "out", "plan", "model.grid", "folder")
_TEXT_OR_NULL += ("metric.features", "metric.weights", "metric.sha256")
_GROUPS = ("data", "data.options", "model", "schedule", "trainer", "logger", "metric", "sampler", "eval")
_GROUPS += ("training", "evaluation", "calibration", "sampler.options")
_LISTS = ("callbacks", "allow", "evaluation.samplers", "eval.samplers", "eval.steps", "eval.deltas")
_ONE_OF = {
    "trainer.precision": ("fp32", "bf16", "fp16"),
    "model.prediction": ("v", "eps", "x0"),
    "model.tangents": ("exact", "random"),
    "sampler.over": ("samples", "ranks"),
    "format": ("png", "shards", "npz"),
    "eval.name": ("samples", "folder", "ref", "benchmark", "scaling"),
    "eval.cost": ("flops", "seconds"),
    "eval.coins": ("systematic", "bernoulli", "nested", "poisson"),
    "logger.mode": ("auto", "online", "offline", "disabled"),
}


def check(config: DictConfig) -> None:
    """Raise ValueError with the option, its value and what is allowed, for the first option that is out of range."""
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    _check_shape(plain)
    refuse_targets(config)

    for words, holds, names in _VALUES:
        for name, value in _given(plain, names):
            if not holds(value):
                raise ValueError(f"{name} must be {words}, got {value!r}")
    for name, allowed in _ONE_OF.items():
        for _, value in _given(plain, (name,)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    _check_eval(plain.get("eval", {}))
    nodes = plain["trainer"]["num_nodes"]
    if nodes > 1 and not plain.get("dry_run") and not {"RANK", "SLURM_PROCID"} & os.environ.keys():
        raise ValueError(f"trainer.num_nodes={nodes} needs torchrun or srun on every machine: see docs/cluster.md")
    training = plain.get("training", {"batch_size": 1, "accumulate": 1})
    batch, accumulate = training["batch_size"], training["accumulate"]
    if batch % accumulate:
        raise ValueError(f"training.batch_size must be a multiple of training.accumulate {accumulate}, got {batch}")
    model = plain.get("model")
    if isinstance(model, dict) and model.get("name") == "coefficients":
        _check_coefficients(model, plain["trainer"])


def _check_eval(options: dict[str, Any]) -> None:
    """`eval.name` alone brings none of the options of the other choices."""
    name = options.get("name")
    if name is not None and {"benchmark": "samplers", "scaling": "replicates"}.get(name, "name") not in options:
        raise ValueError(f"eval.name={name} has options of its own, which eval={name} brings: give that in its place")


def _check_coefficients(model: dict[str, Any], trainer: dict[str, Any]) -> None:
    if model["images"] % model["batch_size"]:
        raise ValueError(
            f"model.images must be a multiple of model.batch_size {model['batch_size']}, got {model['images']}"
        )
    if trainer["precision"] != "fp32":
        raise ValueError(f"trainer.precision must be fp32 for model=coefficients, got {trainer['precision']!r}")
    if trainer["compile"]:
        raise ValueError("trainer.compile must be false for model=coefficients, got True")


def _given(plain: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The options among `names` that this command has, with their values."""
    for name in names:
        *outer, last = name.split(".")
        node = plain
        for key in outer:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict) and last in node:
            yield name, node[last]


def _check_shape(plain: dict[str, Any]) -> None:
    """Groups must hold options, lists must be lists, names must be text."""
    for name, value in _given(plain, _GROUPS):
        if not isinstance(value, dict):
            raise ValueError(f"{name} holds options: give {name}.OPTION=VALUE, got {value!r}")
    for name, value in _given(plain, _LISTS):
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, as in {name}=[...], got {value!r}")
    for name, value in _given(plain, (*_TEXT, *_TEXT_OR_NULL)):
        if not (isinstance(value, str) and value) and not (value is None and name in _TEXT_OR_NULL):
            raise ValueError(f"{name} must be text, got {value!r}")


def parse_indices(text: Any, option: str) -> list[int]:
    """`"0-63"` or `"0-9,20"` -> the whole numbers; raises ValueError that names the option."""
    numbers: list[int] = []
    for part in str(text).replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"{option} must be ranges such as 0-63 or 0-9,20, got {text}")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{option} names an index twice: {text}")
    return numbers


def devices(config: DictConfig) -> dict[str, Any]:
    """What Lightning's Trainer and Fabric want to know of the machines."""
    trainer: dict[str, Any] = OmegaConf.to_container(config.trainer, resolve=True)  # type: ignore[assignment]
    return {name: trainer[name] for name in ("accelerator", "devices", "strategy", "num_nodes")}


def on_devices(config: DictConfig, make: Callable[..., Any]) -> Any:
    """`make(accelerator=..., devices=..., ...)`: a Trainer or Fabric. Raises ValueError where it cannot be had."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    given = devices(config)
    try:
        return make(**given)
    except (MisconfigurationException, ValueError, TypeError) as error:
        options = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"trainer: {str(error).splitlines()[0]} ({options})") from error


def written(value: Any) -> str:
    """A value as the command line has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def refuse_targets(config: DictConfig) -> None:
    """Raise ValueError for a `_target_` anywhere but in `callbacks`, or from a module that is not allowed."""
    allowed = (*ALLOWED, *(OmegaConf.select(config, "allow", default=None) or ()))
    for place, target in _targets(OmegaConf.to_container(config, resolve=True)):
        if not re.fullmatch(r"callbacks\[\d+\]", place):
            raise ValueError(f"{place}._target_={target}: only entries of callbacks are built by name; leave it out")
        package = str(target).split(".")[0]
        if package not in allowed:
            raise ValueError(
                f"{place}._target_={target} is not from {', '.join(allowed)}; if you trust it, add allow=[{package}]"
            )


def _targets(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield place, node["_target_"]
        for key, value in node.items():
            yield from _targets(value, f"{place}.{key}" if place else str(key))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _targets(value, f"{place}[{number}]")


def build_callbacks(config: DictConfig) -> list[Any]:
    """The Lightning callbacks that `callbacks` names. Raises ValueError for what is not a Callback class."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback

    refuse_targets(config)
    built = []
    entries: Any = OmegaConf.to_container(config.callbacks, resolve=True)
    for options in entries:
        if not isinstance(options, dict) or "_target_" not in options:
            raise ValueError(f"callbacks: an entry must be {{_target_: module.Class, option: value}}, got {options}")
        target = str(options.pop("_target_"))
        module, _, name = target.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name, None)
        except (ImportError, ValueError) as error:
            raise ValueError(f"callbacks: cannot import {target} ({error}); correct the name") from error
        if not (inspect.isclass(found) and issubclass(found, Callback)):
            raise ValueError(f"callbacks: {target} is not a Lightning Callback class; correct the name")
        try:
            built.append(found(**options))
        except (TypeError, MisconfigurationException) as error:
            raise ValueError(f"callbacks: {target}: {error}") from error
    return built


def without_secrets(config: DictConfig) -> dict[str, Any]:
    """The config resolved to plain data, but with every value that comes from the environment left as its name.

    What refers to such a value, or holds it inside a string, shows the name too.
    """
    OmegaConf.register_new_resolver("oc.env", lambda name, default=None: f"oc.env:{name}", replace=True)
    try:
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
