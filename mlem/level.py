"""A level: one network of a family, with its schedule and prediction; a folder that diffusers can read too.

    level_xs/mlem.json           schedule, prediction, shape of a sample, data set, measurements
    level_xs/config.json         the two files of a diffusers model; for another module, the name of its class
    level_xs/diffusion_pytorch_model.safetensors
    level_xs/scheduler_config.json      for sampling with diffusers, if one of its schedulers fits; not read
    level_xs/model_index.json           makes the folder a diffusers pipeline, if one fits; not read
    level_xs/README.md                  the model card; not read

There are no pickles. A file may name a class of `mlem.networks.CLASSES`; no other name in a file builds anything.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlem import networks
from mlem.conditions import ConditionSource, conditions_of, described
from mlem.denoiser import NetworkDenoiser
from mlem.files import check_format, damaged, read_object, remove, sha256, write_json, write_record, write_text
from mlem.model_card import level_card
from mlem.model_code import Export
from mlem.predictions import Named, make_prediction
from mlem.schedule import NUM_TIMESTEPS, NoiseSchedule
from mlem.scheduler_configs import pipeline_index, prediction_of, to_diffusers
from mlem.weights import read_weights, write_weights

__all__ = ["Level", "check_name"]

FORMAT = 1
WEIGHTS = "diffusion_pytorch_model.safetensors"
_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Name in mlem.json -> dtype of weights; all others are float32."""
_REMEDY = "copy it again or train this level again"
_FIELDS = ("name", "prediction", "shape", "data", "measured", "schedule", "schedule_hash", "sha256")


class Level:
    """One network and what is known about it.

    Args:
        name: a file name without separators.
        network: `network(x, timestep, **conditions)` gives a tensor like x, or an object that has it as `.sample`; x:
            (B, *shape), timestep: (B,) float32.
        schedule: the noise schedule it was trained on.
        shape: of one sample: (C, H, W) for images, (D,), (T, D) or any other.
        prediction: meaning of the network's input and output: a name in `mlem.predictions.PREDICTIONS`, a diffusers
            name, or an object with options such as `EDM(sigma_data=1.0)`.
        data: name of the data set.
        measured: plain numbers, such as `error` (held-out denoising error), `seconds` (per image) and `steps`
            (training steps).
        flops: floating-point operations to evaluate one sample; None: torch counts them.
        conditions: what the network takes besides x and t: argument -> number of classes, or shape of a sample's row,
            such as {"class_labels": 10} or {"encoder_hidden_states": (None, 768)}, None for any size.
        licence: of the data set, if its source states one, such as "cc-by-4.0"; printed on the model card.

    Attributes:
        latents: the decoder's `scaling_factor` and `shift_factor`; empty for images.

    Raises:
        ValueError: names an argument that is out of range.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        schedule: NoiseSchedule,
        shape: Sequence[int],
        prediction: Named = "v",
        data: str = "",
        measured: Mapping[str, Any] | None = None,
        *,
        flops: int | None = None,
        conditions: Mapping[str, int | Sequence[int | None]] | None = None,
        licence: str = "",
    ) -> None:
        self.prediction = make_prediction(prediction)
        self.prediction.check(schedule)
        check_name("level name", name)
        if flops is not None and flops < 1:
            raise ValueError(f"flops must be >= 1, got {flops}")
        self.name, self.network, self.schedule = name, network, schedule
        self.shape = _checked_shape(shape)
        self.data, self.licence = data, licence
        self.measured: dict[str, Any] = dict({} if measured is None else measured)
        self.conditions = described(conditions)
        self.latents: dict[str, float] = {}
        self._flops = flops
        self._asked = schedule
        if len(self.shape) == 3:
            networks.to_channels_last(network)

    @cached_property
    def flops(self) -> int:
        """Floating-point operations per sample. Raises ValueError if torch cannot count them."""
        found = self._flops or networks.flops(self.network, self.shape, self.conditions)
        if not found:
            raise ValueError(
                f"torch counts no FLOPs in level {self.name} ({type(self.network).__name__}); give those of one "
                "sample: Level(..., flops=)"
            )
        return found

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return networks.parameters(self.network)

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The network as a denoiser."""
        return NetworkDenoiser(self.network, self._asked, self.prediction, self.schedule)

    def under(self, schedule: NoiseSchedule) -> Level:
        """The same level with a denoiser under another schedule; the network keeps its own."""
        other = copy.copy(self)
        other._asked = schedule
        return other

    def through(self, network: nn.Module) -> Level:
        """The same level calling `network`, a wrapper of its own network."""
        other = copy.copy(self)
        other.network, other._flops = network, self.flops
        return other

    @staticmethod
    def from_diffusers(
        folder: str | os.PathLike[str],
        *,
        name: str | None = None,
        shape: Sequence[int] | None = None,
        schedule: NoiseSchedule | None = None,
        prediction: Named | None = None,
        conditions: Mapping[str, int | Sequence[int | None]] | None = None,
        data: str = "",
        dtype: torch.dtype | None = None,
    ) -> Level:
        """A level from a network saved by diffusers: the folder of a model or a pipeline.

        Args:
            folder: with config.json and safetensors, or with model_index.json.
            name: by default the folder's name.
            shape: of one sample; by default from the config, which does not give it for video.
            schedule, prediction: by default from the scheduler config in or beside the folder.
            conditions: by default those of the network's class.
            data: name of the data set.
            dtype: of the weights; by default as saved.

        Raises:
            FileNotFoundError: a file is missing; it is named.
            ValueError: the network cannot be sampled by mlem, or an argument contradicts its scheduler.
        """
        folder = Path(folder)
        found = networks.read_foreign(folder, dtype)
        shape = found.shape if shape is None else tuple(shape)
        if shape is None:
            raise ValueError(f"{folder} does not say the shape of a sample: pass shape=, such as (16, 5, 60, 104)")
        if found.scheduler is None and (schedule is None or prediction is None):
            raise ValueError(f"{folder} has no scheduler_config.json in or beside it: pass schedule= and prediction=")
        if found.scheduler is not None:
            said = prediction_of(found.scheduler)
            if prediction is not None and make_prediction(prediction).name != said.name:
                raise ValueError(f"prediction={prediction} contradicts the scheduler of {folder}, which says {said}")
            prediction = said if prediction is None else prediction
            schedule = schedule or NoiseSchedule.from_diffusers(found.scheduler)
        assert schedule is not None
        assert prediction is not None
        level = Level(
            re.sub(r"[^\w.+-]", "_", folder.resolve().name) if name is None else name,
            found.network,
            schedule,
            shape,
            prediction,
            data,
            conditions=found.conditions if conditions is None else conditions,
        )
        level.latents = found.latents
        return level

    def denoiser_for(self, indices: Tensor, conditions: ConditionSource | None = None) -> NetworkDenoiser:
        """The network as a denoiser of the samples with these indices (B,), with their conditions."""
        return self.denoiser.given(conditions_of([self], conditions, indices)[0])

    def __repr__(self) -> str:
        kind = type(self.network).__name__
        return (
            f"Level({self.name!r}, {kind}, shape={self.shape}, prediction={str(self.prediction)!r}, data={self.data!r})"
        )

    def common(self) -> dict[str, Any]:
        """The fields that the files of a level and of its family share."""
        return {
            "schedule": self.schedule.to_config(),
            "prediction": self.prediction.to_config(),
            "shape": list(self.shape),
            "data": self.data,
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the level's folder; every file atomically, `mlem.json` (with the checksum) last."""
        folder = Path(folder)
        about = self._about()
        config, scheduler = networks.config_of(self.network), self._scheduler()
        index = pipeline_index(config, scheduler, self.shape, self.conditions)
        write_weights(folder / WEIGHTS, self.network.state_dict())
        write_json(folder / "config.json", config)
        for name, plain in (("scheduler_config.json", scheduler), ("model_index.json", index)):
            if plain is None:
                remove(folder / name)  # of an earlier level
            else:
                write_json(folder / name, plain)
        measured = {"measured": self.measured}
        card = level_card(Export(folder.resolve().name, about | measured, config, scheduler, index))
        write_text(folder / "README.md", card)
        checked = {
            "config_sha256": sha256(folder / "config.json"),
            "schedule_hash": self.schedule.fingerprint,
            "sha256": sha256(folder / WEIGHTS),
        }
        write_record(folder / "mlem.json", about | checked | measured)

    def _about(self) -> dict[str, Any]:
        """The fields of mlem.json except hashes and measurements."""
        own = {"format": FORMAT, "name": self.name, "flops": self.flops, "parameters": self.parameters}
        own["timesteps"] = self.schedule.num_timesteps
        own |= {key: value for key in ("conditions", "latents", "licence") if (value := getattr(self, key))}
        dtype = self.denoiser.dtype
        own |= {"dtype": str(dtype).removeprefix("torch.")} if dtype in _HALVES.values() else {}
        return own | self.common()

    def _scheduler(self) -> dict[str, Any] | None:
        """The scheduler config for sampling with diffusers, if one fits."""
        try:
            return to_diffusers(self.schedule, self.prediction)
        except ValueError:
            return None

    @staticmethod
    def load(folder: str | os.PathLike[str], network: nn.Module | None = None) -> Level:
        """Read a level's folder.

        Args:
            folder: as written by `save`.
            network: a module like the saved one, which takes the weights in place; required unless the files name a
                class of `mlem.networks.CLASSES`.

        Raises:
            FileNotFoundError: a file is missing; it is named.
            ValueError: a file is damaged, or the network is unknown; names the file and the remedy.
        """
        folder = Path(folder)
        about = _about(folder)
        config = read_object(folder / "config.json")
        kind = str(config.get("_class_name"))
        known = network is None and kind in networks.CLASSES
        if network is None and not known:
            raise ValueError(
                f"{folder} holds a network of class {kind!r}, but only {', '.join(networks.CLASSES)} are built from a "
                f"file; build it and pass it: Level.load({str(folder)!r}, network=...)"
            )
        if about.get("config_sha256", sha256(folder / "config.json")) != sha256(folder / "config.json"):
            raise ValueError(f"{folder}/config.json differs from its checksum in mlem.json; {_REMEDY}")
        with damaged(folder / "mlem.json", _REMEDY):
            shape = _checked_shape(about["shape"], networks.CLASSES[kind].axes if known else None)
        if known:
            with damaged(folder / "config.json", _REMEDY):
                network = networks.from_config(kind, config)
                if "dtype" in about:
                    nn.Module.to(network, _HALVES[about["dtype"]])  # the method of diffusers warns needlessly
            read_weights(folder / WEIGHTS, network, about["sha256"])
        else:
            assert network is not None
            ours = f"network= ({type(network).__name__})"
            remedy = f"pass a network like the saved one, a {kind!r}"
            read_weights(folder / WEIGHTS, network, about["sha256"], owner=ours, remedy=remedy)
        with damaged(folder / "mlem.json", _REMEDY):
            schedule = NoiseSchedule.from_config(about["schedule"])
            own = {name: about[name] for name in ("name", "data", "measured")}
            own["prediction"] = _prediction(about, schedule)
            own["flops"] = None if known else about.get("flops")  # may have been given: torch cannot count all
            own["conditions"], own["licence"] = about.get("conditions"), str(about.get("licence", ""))
            level = Level(network=network.eval(), schedule=schedule, shape=shape, **own)
        level.latents = dict(about.get("latents", {}))
        if schedule.fingerprint != about["schedule_hash"]:
            raise ValueError(
                f"{folder}/mlem.json was edited: its schedule does not match its schedule_hash; train it again"
            )
        return level


def check_name(what: str, name: str) -> None:
    """Raise ValueError unless `name` is a plain file name, without a path."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"{what} must be letters, digits, or any of _ . + -, got {name!r}")


def _about(folder: Path) -> dict[str, Any]:
    """The contents of mlem.json, with format and fields checked."""
    if not (folder / "mlem.json").is_file():
        raise FileNotFoundError(f"{folder} holds no level (no mlem.json); train one with: python train.py model=unet_s")
    about = read_object(folder / "mlem.json")
    check_format(about, FORMAT, folder / "mlem.json", _REMEDY)
    for field in _FIELDS:
        if field not in about:
            raise ValueError(f"{folder}/mlem.json has no {field}; {_REMEDY}")
    return about


def _prediction(about: Mapping[str, Any], schedule: NoiseSchedule) -> Any:
    """The prediction in mlem.json. Old files have no timesteps: networks then had 1000."""
    found = about["prediction"]
    if "timesteps" in about or schedule.num_timesteps == NUM_TIMESTEPS:
        return found
    return {"kind": found, "timesteps": NUM_TIMESTEPS}


def _checked_shape(shape: Sequence[Any], axes: int | None = None) -> tuple[int, ...]:
    """`shape` as a tuple. Raises ValueError unless it consists of `axes` whole numbers >= 1."""
    if not shape or not all(isinstance(size, int) and size > 0 for size in shape) or len(shape) != (axes or len(shape)):
        raise ValueError(f"shape must be {axes or 'one or more'} whole numbers >= 1, got {list(shape)}")
    return tuple(shape)
