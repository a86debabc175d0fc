"""A family: networks of increasing cost for one data set, under one schedule; a folder on disk.

    family/family.json                  the levels in order
    family/level_xs/mlem.json           schedule, prediction, image shape, data set, what was measured
    family/level_xs/config.json         the two files of a diffusers model
    family/level_xs/diffusion_pytorch_model.safetensors
    family/calibration.json             what `mlem.multilevel` measured of the levels, if it has
    family/coefficients.json            learned coefficients
    family/plans/best.json              memorised plans

A level's folder stands by itself: `Level.load` reads one. There are no pickles, and nothing is built by a name
that a file gives.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlem.denoiser import NetworkDenoiser, check_prediction
from mlem.files import atomic_write, check_format, damaged, read_object, remove, sha256, write_json
from mlem.network import flops, parameters
from mlem.schedule import NoiseSchedule

if TYPE_CHECKING:
    from mlem.multilevel.spec import PlanSpec

FORMAT = 1
WEIGHTS = "diffusion_pytorch_model.safetensors"
FITTED = ("calibration", "coefficients")
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

    def _common(self) -> dict[str, Any]:
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
        write_json(folder / "mlem.json", own | self._common() | checked | {"measured": self.measured})

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


class Family:
    """Levels in order of rising cost.

    Raises ValueError, naming both sides, when levels disagree on schedule, prediction, shape or data set, when two
    share a name, or when they are out of order of cost.
    """

    def __init__(self, levels: Sequence[Level], fitted: Mapping[str, Any] | None = None) -> None:
        """fitted: what `mlem.multilevel` found out about these levels, plain data: "calibration", "coefficients" and
        "plans" (by name).
        """
        if not levels:
            raise ValueError("a family needs at least one level")
        self.levels = tuple(levels)
        self.fitted: dict[str, Any] = dict(fitted or {})
        first = self.levels[0]
        for name in self.names:
            if self.names.count(name) > 1:
                raise ValueError(f"two levels are called {name!r}; name each level once")
        for level in self.levels[1:]:
            for key, value in level._common().items():
                if value != first._common()[key]:
                    raise ValueError(
                        f"levels {first.name} and {level.name} differ in {key}: {first._common()[key]} and {value}; "
                        "train both with the same settings"
                    )
        for small, large in zip(self.levels, self.levels[1:], strict=False):
            if small.flops >= large.flops:
                raise ValueError(
                    f"levels must rise in cost, but {small.name} takes {small.flops} FLOPs and {large.name} "
                    f"{large.flops}; list the cheaper one first"
                )

    schedule = property(lambda self: self.levels[0].schedule, doc="The noise schedule that all levels share.")
    shape = property(lambda self: self.levels[0].shape, doc="(C, H, W) of an image.")
    data = property(lambda self: self.levels[0].data, doc="Name of the data set.")
    names = property(lambda self: [level.name for level in self.levels], doc="Names of the levels, cheapest first.")

    @cached_property
    def weights_hash(self) -> str:
        """Hash of all weights: what was fitted to one family is refused on another."""
        digest = hashlib.sha256()
        for level in self.levels:
            for name, tensor in level.network.state_dict().items():
                digest.update(f"{level.name}/{name}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def level(self, name: str | None = None) -> Level:
        """The level called `name`, or the largest. Raises ValueError with the names there are."""
        if name is None:
            return self.levels[-1]
        if name not in self.names:
            raise ValueError(f"level must be one of {', '.join(self.names)}, got {name!r}")
        return self.levels[self.names.index(name)]

    def plan(self, **options: Any) -> PlanSpec:
        """How to share evaluations among the levels: `sample(family, ..., plan=family.plan(budget=0.25))`.

        One dial: budget, the share of what the largest level would cost at every evaluation, in (0, 1]; mse, the mean
        squared error to the many-step run; or delta, added to learned coefficients.
        probabilities: "calibrated", "learned", "theory" (with gamma) or numbers, one for each level.
        estimator: "hindsight", "held" or "jump"; order: of a held correction, by default 0 for SDEs and 1 for ODEs.
        coins: "systematic", "bernoulli", "nested" or "poisson"; by default systematic, but held corrections with
        calibrated probabilities are measured where the predicted error is least. levels: names, cheapest first; by
        default the best subset. cost: "seconds" or "flops", what budget counts, and batch_size, at which seconds were
        measured. seed: of the coins. per_sample: every sample tosses its own (jump only).
        Raises ValueError for options out of range; `sample` does where the family was not calibrated or fitted.
        """
        from mlem.multilevel.spec import PlanSpec

        return PlanSpec(**options)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the family, which is there whole or not at all; the one that was there stays until all is written.

        The levels are written in a folder aside. Then `family.json` is taken away, levels take the place of levels, and
        the new `family.json` comes last: cut short in between, there is no family, and never one of old and new levels.
        """
        folder = Path(folder)
        aside = folder / ".saving"
        shutil.rmtree(aside, ignore_errors=True)  # of a save that was killed
        try:
            for level in self.levels:
                level.save(aside / f"level_{level.name}")
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        remove(folder / "family.json")
        for old in folder.glob("level_*"):
            shutil.rmtree(old)
        for new in aside.iterdir():
            os.replace(new, folder / new.name)
        aside.rmdir()
        self.save_fitted(folder)
        write_json(folder / "family.json", {"format": FORMAT, "levels": self.names, **self.levels[0]._common()})

    def save_fitted(self, folder: str | os.PathLike[str]) -> None:
        """Write what was fitted: `calibration.json`, `coefficients.json`, `plans/NAME.json`.

        Raises ValueError, before anything is written, for a name of a plan that cannot be a file's.
        """
        for name in self.fitted.get("plans", {}):
            check_name("name of a plan", name)
        for name in FITTED:
            if name in self.fitted:
                write_json(Path(folder) / f"{name}.json", self.fitted[name])
        for name, plan in self.fitted.get("plans", {}).items():
            write_json(Path(folder) / "plans" / f"{name}.json", plan)

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Family:
        """Read a family. Raises FileNotFoundError or ValueError that names the file and the remedy."""
        folder = Path(folder)
        if not (folder / "family.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no family (no family.json); make one with: python train.py model=family"
            )
        remedy = "copy the family again or make it again: python train.py model=family"
        about = read_object(folder / "family.json")
        check_format(about, FORMAT, folder / "family.json", remedy)
        with damaged(folder / "family.json", remedy):
            folders = [folder / f"level_{name}" for name in about["levels"]]
        fitted: dict[str, Any] = {
            name: read_object(folder / f"{name}.json") for name in FITTED if (folder / f"{name}.json").is_file()
        }
        fitted["plans"] = {path.stem: read_object(path) for path in sorted((folder / "plans").glob("*.json"))}
        return Family([Level.load(one) for one in folders], fitted)


def write_weights(path: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically. Raises ValueError that names a tensor with NaN or infinity."""
    from safetensors.torch import save

    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"weights {name} hold NaN or infinity; not saved to {path}")
    with atomic_write(path) as file:
        file.write(save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}))


def read_weights(path: str | os.PathLike[str], network: nn.Module, checksum: str | None = None) -> None:
    """Load safetensors into `network`, in place.

    Raises ValueError when the file is not safetensors, differs from its checksum, holds NaN or infinity (the
    tensor is named), or does not fit the network (at most five keys are named).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy it again or train this level again")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or it was cut short ({error}); copy it again") from error
    if checksum is not None and sha256(path) != checksum:
        raise ValueError(f"{path} differs from its checksum in mlem.json; copy it again or train this level again")
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: weights {name} hold NaN or infinity; use an earlier checkpoint")
    own = network.state_dict()
    odd = [f"{key} (missing)" for key in own.keys() - weights.keys()]
    odd += [f"{key} (extra)" for key in weights.keys() - own.keys()]
    odd += [
        f"{key} ({tuple(weights[key].shape)} in the file, {tuple(own[key].shape)} in the network)"
        for key in own.keys() & weights.keys()
        if own[key].shape != weights[key].shape
    ]
    if odd:
        shown = "; ".join(sorted(odd)[:5])
        raise ValueError(f"{path} does not fit config.json, {len(odd)} keys differ: {shown}; check the size in model=")
    network.load_state_dict(weights)
