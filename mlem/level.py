"""A level: one network of a family, with its schedule and prediction; a folder on disk that diffusers reads too.

    level_xs/mlem.json           schedule, prediction, image shape, data set, what was measured
    level_xs/config.json         the two files of a diffusers model
    level_xs/diffusion_pytorch_model.safetensors

There are no pickles, and nothing is built by a name that a file gives.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlem.denoiser import NetworkDenoiser, check_prediction
from mlem.files import atomic_write, check_format, damaged, read_object, sha256, write_json
from mlem.networks import flops, parameters
from mlem.schedule import NoiseSchedule
from mlem.weights import read_weights, write_weights

__all__ = ["Level", "check_name"]

FORMAT = 1
WEIGHTS = "diffusion_pytorch_model.safetensors"
_REMEDY = "copy it again or train this level again"


@dataclass
class Level:
    """One network and what is known of it.

    shape: (C, H, W) of an image. data: name of the data set. measured: plain numbers, such as `error`
    (held-out denoising error), `seconds` (per image) and `steps` (of training).
    """

    name: str
    network: nn.Module
    schedule: NoiseSchedule
    shape: tuple[int, ...]
    prediction: str = "v"
    data: str = ""
    measured: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_prediction(self.prediction)
        check_name("level name", self.name)
        self.shape = tuple(self.shape)
        self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @cached_property
    def flops(self) -> int:
        """Floating-point operations for one image."""
        return flops(self.network, self.shape)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return parameters(self.network)

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The network as a denoiser."""
        return NetworkDenoiser(self.network, self.schedule, self.prediction)

    def common(self) -> dict[str, Any]:
        """What all levels of a family must agree on."""
        return {
            "schedule": self.schedule.to_config(),
            "prediction": self.prediction,
            "shape": list(self.shape),
            "data": self.data,
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the level's folder; every file atomically, `mlem.json` (with the checksum) last."""
        folder = Path(folder)
        write_weights(folder / WEIGHTS, self.network.state_dict())
        # the network's own config, as diffusers writes it
        with atomic_write(folder / "config.json") as file:
            file.write(self.network.to_json_string().encode())  # type: ignore[operator]
        own = {"format": FORMAT, "name": self.name, "flops": self.flops, "parameters": self.parameters}
        checked = {"schedule_hash": self.schedule.fingerprint, "sha256": sha256(folder / WEIGHTS)}
        write_json(folder / "mlem.json", own | self.common() | checked | {"measured": self.measured})

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Level:
        """Read a level's folder. Raises ValueError or FileNotFoundError that names the file and the remedy."""
        from diffusers.models.unets.unet_2d import UNet2DModel

        folder = Path(folder)
        if not (folder / "mlem.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no level (no mlem.json); train one with: python train.py model=unet_s"
            )
        about = read_object(folder / "mlem.json")
        check_format(about, FORMAT, folder / "mlem.json", _REMEDY)
        names = ("name", "prediction", "shape", "data", "measured")
        for field_name in (*names, "schedule", "schedule_hash", "sha256"):
            if field_name not in about:
                raise ValueError(f"{folder}/mlem.json has no {field_name}; {_REMEDY}")
        config = read_object(folder / "config.json")
        with damaged(folder / "config.json", _REMEDY):
            network = UNet2DModel.from_config(config)
        assert isinstance(network, nn.Module)
        read_weights(folder / WEIGHTS, network, about["sha256"])
        with damaged(folder / "mlem.json", _REMEDY):
            schedule = NoiseSchedule.from_config(about["schedule"])
            own = {name: about[name] for name in names}
            own["measured"] = dict(about["measured"])
            level = Level(network=network.eval(), schedule=schedule, **own)
            _check_shape(level.shape)
        if schedule.fingerprint != about["schedule_hash"]:
            raise ValueError(
                f"{folder}/mlem.json was edited: its schedule does not match its schedule_hash; train it again"
            )
        return level


def check_name(what: str, name: str) -> None:
    """Raise ValueError unless `name` can be that of a file or folder, and of nothing outside of where it is put."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"{what} must be letters, digits, or any of _ . + -, got {name!r}")


def _check_shape(shape: Sequence[Any]) -> None:
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"shape must be three whole numbers >= 1, got {list(shape)}")
