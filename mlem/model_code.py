"""Python code that samples a level from its folder, with mlem or with diffusers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlem import networks
from mlem.conditions import Described, described
from mlem.predictions import SIT, Flow, Prediction, make_prediction
from mlem.schedule import NoiseSchedule

__all__ = ["Export", "by_diffusers", "by_mlem", "family_by_mlem", "quoted"]

_COUNT, _STEPS = 4, 50
"""Samples that the code makes, and the most steps it takes."""
_CALLED_ALIKE = ("UNet2DModel", "DiTTransformer2DModel")
"""Classes that are called as network(x, times, class_labels=), with no pipeline around them."""
_LOOP = """\
with torch.no_grad():
    for t in scheduler.timesteps:
        output = network({asked}, t.expand({count}){told}).sample
        x = scheduler.step(output, t, x).prev_sample"""


@dataclass(frozen=True)
class Export:
    """The files of a level's folder.

    Args:
        folder: its name.
        about: mlem.json.
        config: of the network.
        scheduler: scheduler_config.json, or None.
        index: model_index.json, or None.
    """

    folder: str
    about: Mapping[str, Any]
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None
    index: Mapping[str, Any] | None

    @property
    def kind(self) -> str:
        """The class of the network; with its module unless it is a diffusers class."""
        return str(self.config["_class_name"])

    @property
    def of_diffusers(self) -> bool:
        """Whether diffusers can load the network, with mlem imported if the class is mlem's."""
        return "_diffusers_version" in self.config and "." not in self.kind

    @property
    def prediction(self) -> Prediction:
        """What the network predicts."""
        return make_prediction(self.about["prediction"])

    @property
    def conditions(self) -> Described:
        """Conditions of the network."""
        return described(self.about.get("conditions"))

    @property
    def grid(self) -> str:
        """The grid of diffusers' scheduler."""
        if isinstance(self.prediction, Flow):
            return "flow"
        return "karras" if self.prediction.name.startswith("edm") else "trailing"

    @property
    def steps(self) -> int:
        """Steps that divide the timesteps: for others, diffusers' DDIM steps to the wrong noise level."""
        return next(steps for steps in range(_STEPS, 0, -1) if self.about["timesteps"] % steps == 0)


def by_mlem(export: Export) -> str:
    """Code that samples a level with mlem, on the grid of diffusers' scheduler."""
    network, comment = "", "this folder"
    if export.kind not in networks.CLASSES:
        network, comment = ", network=network", f"this folder; network: a new {export.kind}"
    solver = "ddim" if export.prediction.clip is None else "ddpm"
    how = [f'solver="{solver}"', f'grid="{export.grid}"', f"steps={export.steps}"]
    return _block(
        "from mlem import Level, sample",
        "",
        f"level = Level.load({quoted(export.folder)}{network})  # {comment}",
        _call(["level", *how], export.conditions),
    )


def family_by_mlem(folder: str, conditions: Described) -> str:
    """Code that samples the largest level of a family with mlem."""
    return _block(
        "from mlem import Family, sample",
        "",
        f"family = Family.load({quoted(folder)})  # this folder",
        _call(["family", f"steps={_STEPS}"], conditions),
    )


def _call(arguments: list[str], conditions: Described) -> str:
    """A call of `sample` with classes in turn, as ruff formats it; rows of numbers are left to the reader."""
    arguments = [*arguments, f"indices=range({_COUNT})"]
    if all(value == 1 for value in conditions.values()):
        return f"x = sample({', '.join(arguments)}).x"
    told = ", ".join(f'"{name}": indices % {value}' for name, value in conditions.items())
    rows = any(isinstance(value, tuple) for value in conditions.values())
    arguments.append(f"conditions={'conditions' if rows else f'lambda indices: {{{told}}}'}")
    return "\n".join(["x = sample(", *(f"    {argument}," for argument in arguments), ").x"])


def by_diffusers(export: Export) -> str | None:
    """Code that samples a level with diffusers, from the same noise to the same samples; None if it cannot."""
    if export.index is not None:
        return _by_pipeline(export, export.index["_class_name"])
    begin = _begin(export) if export.kind in _CALLED_ALIKE else None
    if begin is None:
        return None
    scheduler, lines, scale = begin
    told = "".join(
        f", {name}={name if isinstance(value, tuple) else f'torch.arange({_COUNT}) % {value}'}"
        for name, value in export.conditions.items()
    )
    asked = "scheduler.scale_model_input(x, t)" if scheduler == "EDMEulerScheduler" else "x"
    return _block(
        "import torch",
        f"from diffusers import {', '.join(sorted((scheduler, export.kind)))}",
        "",
        f"network = {export.kind}.from_pretrained({quoted(export.folder)})",
        *lines,
        f"x = torch.randn({', '.join(map(str, (_COUNT, *export.about['shape'])))}){scale}",
        _LOOP.format(asked=asked, count=_COUNT, told=told),
        *(["images = (x / 2 + 0.5).clamp(0, 1)"] if export.about["shape"][0] in (1, 3) else []),
    )


def _by_pipeline(export: Export, pipeline: str) -> str:
    classes = export.conditions.get("class_labels")
    told = f"class_labels={[i % classes for i in range(_COUNT)]}, " if isinstance(classes, int) else ""
    return _block(
        f"from diffusers import {pipeline}",
        "",
        f"pipe = {pipeline}.from_pretrained({quoted(export.folder)})",
        f"images = pipe(batch_size={_COUNT}, {told}num_inference_steps={export.steps}).images",
    )


def _begin(export: Export) -> tuple[str, list[str], str] | None:
    """The scheduler's class, the lines that make it, and the factor on the noise; None if there is none."""
    if export.scheduler is not None:
        name, folder = export.scheduler["_class_name"], quoted(export.folder)
        lines = [f"scheduler = {name}.from_pretrained({folder})", f"scheduler.set_timesteps({export.steps})"]
        return name, lines, " * scheduler.init_noise_sigma" if name == "EDMEulerScheduler" else ""
    if not isinstance(export.prediction, Flow) or isinstance(export.prediction, SIT):
        return None
    # a velocity, on the noise levels of a schedule that is not a flow's
    schedule, name = NoiseSchedule.from_config(export.about["schedule"]), "FlowMatchEulerDiscreteScheduler"
    low, high = (schedule.kappa(t).item() for t in (1 / schedule.num_timesteps, 1.0))
    lines = [
        f"scheduler = {name}(num_train_timesteps={export.prediction.timesteps:g})",
        f"sigmas = torch.linspace({high / (1 + high)!r}, {low / (1 + low)!r}, {export.steps}).tolist()",
        "scheduler.set_timesteps(sigmas=sigmas)",
    ]
    return name, lines, " * (sigmas[0] ** 2 + (1 - sigmas[0]) ** 2) ** 0.5"


def quoted(name: str) -> str:
    """A name in Python quotes."""
    return json.dumps(name, ensure_ascii=False)


def _block(*lines: str) -> str:
    """A Markdown block of Python."""
    return "\n".join(["```python", *lines, "```"])
