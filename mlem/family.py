"""A family: networks of increasing cost for one data set, under one schedule; a folder on disk.

family/family.json                  the levels in order
family/level_xs/                    a level: see `mlem.level`
family/calibration.json             what `mlem.multilevel` measured of the levels, if it has
family/coefficients.json            learned coefficients
family/plans/best.json              memorised plans
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlem.arguments import named
from mlem.files import check_format, damaged, read_object, remove, write_json
from mlem.level import FORMAT, Level, check_name
from mlem.multilevel.spec import PlanSpec

__all__ = ["Family"]

FITTED = ("calibration", "coefficients")


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
    plan = staticmethod(named(PlanSpec, "family.plan"))

    @cached_property
    def weights_hash(self) -> str:
        """Hash of all weights: what was fitted to one family is refused on another."""
        digest = hashlib.sha256()
        for level in self.levels:
            for name, tensor in level.network.state_dict().items():
                digest.update(f"{level.name}/{name}".encode())
                # as bytes: NumPy has no bfloat16
                digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def level(self, name: str | None = None) -> Level:
        """The level called `name`, or the largest. Raises ValueError with the names there are."""
        if name is None:
            return self.levels[-1]
        if name not in self.names:
            raise ValueError(f"level must be one of {', '.join(self.names)}, got {name!r}")
        return self.levels[self.names.index(name)]

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
    def load(folder: str | os.PathLike[str], networks: Mapping[str, nn.Module] | None = None) -> Family:
        """Read a family.

        Args:
            folder: as `save` wrote it.
            networks: name of a level -> the module that takes its weights, for levels of modules of one's own.

        Raises:
            FileNotFoundError: a file is missing; it is named.
            ValueError: a file is damaged, or a network is not known; it names the file and the remedy.
        """
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
        own = dict(networks or {})
        levels = [Level.load(one, own.pop(name, None)) for one, name in zip(folders, about["levels"], strict=True)]
        if own:
            raise ValueError(f"networks= names {next(iter(own))!r}; the levels are {', '.join(about['levels'])}")
        return Family(levels, fitted)
