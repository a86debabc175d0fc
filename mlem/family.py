"""A family: networks of increasing cost for one data set, under one schedule; a folder on disk.

The files:

    family/family.json                  the levels in order
    family/README.md                    the model card; not read
    family/level_xs/                    a level: see `mlem.level`
    family/decoder/                     for latents: the AutoencoderKL, as saved by diffusers; see `mlem.decoder`
    family/calibration.json, ..         what was fitted to the levels: see `mlem.multilevel.fitted`
    family/found/                       saved plans: see `mlem.multilevel.kept`
    family/guided/0123456789abcdef/     what was fitted to the family under guidance
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlem.arguments import called, named
from mlem.conditions import ConditionSource, conditions_of
from mlem.decoder import Decoder
from mlem.denoiser import NetworkDenoiser
from mlem.files import check_format, damaged, read_object, remove, write_record, write_text
from mlem.guidance import GuidedNetwork, guided_level
from mlem.level import FORMAT, Level
from mlem.model_card import family_card
from mlem.multilevel.candidate import Recommendation
from mlem.multilevel.checking import Judge
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.kept import KeptPlans
from mlem.multilevel.recommend import recommend
from mlem.multilevel.spec import PlanSpec
from mlem.networks import Reuse
from mlem.pretrained import comes_along, folder_of
from mlem.reusing import reusing
from mlem.schedule import NoiseSchedule

__all__ = ["Family"]


class Family:
    """Levels in order of increasing cost.

    Schedules and predictions may differ: sampling follows the largest level's schedule, and every other level is
    evaluated at its own time with the same noise-to-signal ratio.

    Args:
        levels: one or more.
        fitted: what was fitted to these levels.
        kept: the store of found plans; by default in memory.
        folder: where fitted results are saved, if anywhere.
        decoder: turns samples into images, if they are latents.

    Raises:
        ValueError: levels disagree on shape or data set, share a name, are out of order of cost, or do not fit the
            decoder; both sides are named.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        fitted: Fitted | None = None,
        kept: KeptPlans | None = None,
        folder: Path | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        if not levels:
            raise ValueError("a family needs at least one level")
        self.levels = tuple(levels)
        self.fitted = fitted or Fitted()
        self.kept = kept or KeptPlans()
        self.folder = folder
        self.decoder = decoder
        # with their many-step runs, for recommend(check=...)
        self.judges = dict[tuple[int, torch.device], Judge]()
        self._weights_hash: str | None = None
        for name in self.names:
            if self.names.count(name) > 1:
                raise ValueError(f"two levels are called {name!r}; give each its own name")
        self._check_common()
        self._check_costs()
        if len({level.schedule.fingerprint for level in self.levels}) > 1:
            self.levels = tuple(level.under(self.schedule) for level in self.levels)

    def _check_common(self) -> None:
        first = self.levels[0]
        for level in self.levels[1:]:
            for key, one, other in (("shape", first.shape, level.shape), ("data", first.data, level.data)):
                if one != other:
                    raise ValueError(
                        f"levels {first.name} and {level.name} differ in {key}: {one} and {other}; "
                        "train both with the same settings"
                    )
        if len(self.levels) > 1 and (clipped := [level for level in self.levels if level.prediction.clip is not None]):
            raise ValueError(
                f"level {clipped[0].name} clips its estimate of the data, so that no sum over levels may use it: leave "
                "clip out, or make a family of that level alone"
            )
        if self.decoder is not None:
            self.decoder.picture_shape(self.shape)
            for level in self.levels:
                if {**self.decoder.latents, **level.latents} != self.decoder.latents:
                    raise ValueError(
                        f"level {level.name} works on latents scaled by {level.latents}, but {self.decoder.folder} "
                        f"scales by {self.decoder.latents}; use the decoder that it was trained with"
                    )
        for level in self.levels:
            for key, value in level.latents.items():
                if value != (own := first.latents.get(key, value)):
                    raise ValueError(
                        f"levels {first.name} and {level.name} work on different latents: {key} {own} and {value}; "
                        "use networks that were trained with the same decoder"
                    )

    def _check_costs(self) -> None:
        for small, large in zip(self.levels, self.levels[1:], strict=False):
            if small.flops >= large.flops:
                raise ValueError(
                    f"levels must rise in cost, but {small.name} takes {small.flops} FLOPs and {large.name} "
                    f"{large.flops}; list the cheaper one first"
                )

    @staticmethod
    def from_diffusers(
        folders: Mapping[str, str | os.PathLike[str]], *, data: str = "", dtype: torch.dtype | None = None
    ) -> Family:
        """A family of networks saved by diffusers, for the same images or latents.

        The decoder is the AutoencoderKL in `vae/` of the last pipeline that has one.

        Args:
            folders: name of a level -> folder of its model or pipeline, cheapest first; see `Level.from_diffusers`.
            data: name of the data set.
            dtype: of the weights; by default as saved.

        Raises: as `Level.from_diffusers` and `Family` do.
        """
        levels = [Level.from_diffusers(path, name=name, data=data, dtype=dtype) for name, path in folders.items()]
        found = [decoder for path in folders.values() if (decoder := Decoder.of_pipeline(path)) is not None]
        return Family(levels, decoder=found[-1] if found else None)

    plan = staticmethod(named(PlanSpec, "family.plan"))
    """A plan specification, such as `family.plan(budget=0.4)`; takes the arguments of `PlanSpec`."""

    @called("family.recommend")
    def recommend(
        self,
        *,
        mse: float | None = None,
        seconds: float | None = None,
        kind: str = "ode",
        batch_size: int = 64,
        check: int = 0,
    ) -> Recommendation:
        """The settings to run: `sample(family, ..., **family.recommend(mse=1e-3).options)`.

        Args:
            mse: allowed error: mean squared difference per pixel to the largest level in many steps.
            seconds: or the allowed time: wall-clock seconds per image.
            kind: "ode" or "sde".
            batch_size: images per batch.
            check: images on which choices are also measured, at the cost of a many-step run; for mse the search goes on
                until one is as fast as it may be. 0: predictions suffice.

        Raises:
            ValueError: not exactly one target, an uncalibrated family, or nothing reaches the target.
        """
        return recommend(self, mse=mse, seconds=seconds, kind=kind, batch_size=batch_size, check=check)

    def reusing(self, reuse: Reuse) -> Family:
        """The family whose largest level reuses its deep features (DeepCache), for one sampler at a time.

        Raises ValueError for a network whose features cannot be reused.
        """
        return Family([*self.levels[:-1], reusing(self.level(), reuse).level])

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of sampling: the largest level's."""
        return self.levels[-1].schedule

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, (C, H, W) for images."""
        return self.levels[0].shape

    @property
    def data(self) -> str:
        """Name of the data set."""
        return self.levels[0].data

    def pictures(self, samples: Tensor) -> Tensor:
        """Images of samples (B, *shape), nominally in [-1, 1]: the samples themselves, or decoded latents.

        Raises ValueError for latents without a decoder.
        """
        if self.decoder is not None:
            return self.decoder.decode(samples)
        if latents := self.level().latents:
            raise ValueError(
                f"the family makes latents scaled by {latents} and has no decoder: set "
                "family.decoder = Decoder(FOLDER of an AutoencoderKL) and save it again"
            )
        return samples

    @property
    def names(self) -> list[str]:
        """Names of the levels, cheapest first."""
        return [level.name for level in self.levels]

    @property
    def weights_hash(self) -> str:
        """Hash of all weights: what was fitted to one family is rejected on another."""
        if self._weights_hash is None:
            digest = hashlib.sha256()
            for level in self.levels:
                if own := _convention(level, self):
                    digest.update(own.encode())
                if isinstance(level.network, GuidedNetwork):
                    digest.update(json.dumps(level.network.identity, sort_keys=True).encode())
                for name, tensor in level.network.state_dict().items():
                    digest.update(f"{level.name}/{name}".encode())
                    # as bytes: NumPy has no bfloat16
                    digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
            self._weights_hash = digest.hexdigest()[:16]
        return self._weights_hash

    def level(self, name: str | None = None) -> Level:
        """The level called `name`, or the largest. Raises ValueError, listing the names."""
        if name is None:
            return self.levels[-1]
        if name not in self.names:
            raise ValueError(f"level must be one of {', '.join(self.names)}, got {name!r}")
        return self.levels[self.names.index(name)]

    def guided(
        self,
        scale: float,
        *,
        null: Mapping[str, Any] | None = None,
        weak: str | Level | None = None,
        interval: tuple[float, float] | None = None,
    ) -> Family:
        """The family under guidance, every level alike: `null + scale (conditioned - null)`; see `mlem.guidance`.

        It has its own calibration, coefficients and plans, valid for this guidance only.

        Args:
            scale: 1 is none; class-conditional networks commonly use 1.5 to 7.5.
            null: name of a condition -> what the null side gets instead, a label or a row of numbers; by default
                "no class" for every label.
            weak: autoguidance: the null side is this level, with the same conditions. As a name: the cheapest level,
                which itself stays unguided.
            interval: noise-to-signal ratios between which guidance acts, such as (0.2, 5.0); None: everywhere.

        Raises:
            ValueError: there is nothing to leave out, or levels do not fit together.
        """
        by = self.level(weak) if isinstance(weak, str) else weak
        if isinstance(weak, str) and weak != self.names[0]:
            raise ValueError(f"weak={weak} must be the cheapest level, {self.names[0]}, or a level of another family")
        levels = [
            level if level is by else guided_level(level, scale, null=null, weak=by, interval=interval)
            for level in self.levels
        ]
        guided = Family(levels, kept=self.kept, decoder=self.decoder)
        if self.folder is not None:
            guided.folder = self.folder / "guided" / guided.weights_hash
            guided.fitted = Fitted.load(guided.folder)
        return guided

    def denoisers_for(self, indices: Tensor, conditions: ConditionSource | None = None) -> list[NetworkDenoiser]:
        """The levels as denoisers of the samples with these indices (B,), with their conditions."""
        told = conditions_of(self.levels, conditions, indices)
        return [level.denoiser.given(own) for level, own in zip(self.levels, told, strict=True)]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the family, whole or not at all; an older one stays until all is written.

        The levels are first written to a folder aside. Then `family.json` is removed, the levels are swapped, and the
        new `family.json` comes last: if interrupted in between, there is no family, never a mix of old and new levels.
        """
        if any(isinstance(level.network, GuidedNetwork) for level in self.levels):
            raise ValueError("a family under guidance is not saved; save the unguided one, and guide it after loading")
        folder = Path(folder)
        aside = folder / ".saving"
        shutil.rmtree(aside, ignore_errors=True)  # left by a killed save
        try:
            for level in self.levels:
                level.save(aside / f"level_{level.name}")
            if self.decoder is not None:
                self.decoder.save(aside / "decoder")
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        remove(folder / "family.json")
        for old in [*folder.glob("level_*"), *folder.glob("decoder")]:
            shutil.rmtree(old)
        for new in aside.iterdir():
            os.replace(new, folder / new.name)
        aside.rmdir()
        self.save_fitted(folder)
        levels = [read_object(folder / f"level_{name}" / "mlem.json") for name in self.names]
        write_text(folder / "README.md", family_card(folder.resolve().name, levels))
        about = {"format": FORMAT, "levels": self.names, **self.levels[-1].common()}
        about |= {} if self.decoder is None else {"decoder": self.decoder.fingerprint}
        write_record(folder / "family.json", about)

    def save_fitted(self, folder: str | os.PathLike[str]) -> None:
        """Write what was fitted beside the levels; see `Fitted.save`."""
        self.fitted.save(folder)

    @staticmethod
    def load(folder: str | os.PathLike[str], networks: Mapping[str, nn.Module] | None = None) -> Family:
        """Read a family.

        Args:
            folder: as written by `save`, or "pretrained:NAME" for a family that ships with the package.
            networks: name of a level -> the module that takes its weights, for networks of your own.

        Raises:
            FileNotFoundError: a file is missing; it is named.
            ValueError: a file is damaged, or a network is unknown; names the file and the remedy.
        """
        folder = folder_of(folder)
        if not (folder / "family.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no family (no family.json); make one with: python train.py model=family"
            )
        remedy = "copy the family again or make it again: python train.py model=family"
        about = read_object(folder / "family.json")
        check_format(about, FORMAT, folder / "family.json", remedy)
        with damaged(folder / "family.json", remedy):
            folders = [folder / f"level_{name}" for name in about["levels"]]
        own = dict(networks or {})
        levels = [Level.load(one, own.pop(name, None)) for one, name in zip(folders, about["levels"], strict=True)]
        if own:
            raise ValueError(f"networks= names {next(iter(own))!r}; the levels are {', '.join(about['levels'])}")
        decoder = Decoder.beside(folder, about["decoder"]) if "decoder" in about else None
        if comes_along(folder):  # stored in half precision; nothing is written into the package
            for level in levels:
                nn.Module.float(level.network)  # the method of diffusers warns needlessly
            return Family(levels, Fitted.load(folder), decoder=decoder)
        return Family(levels, Fitted.load(folder), KeptPlans(folder), folder, decoder)


def _convention(level: Level, family: Family) -> str:
    """A level's identity besides its weights; empty for the original convention."""
    prediction = level.prediction.to_config()
    alike = prediction in ("v", "eps", "x0") and level.prediction == family.level().prediction
    plain: list[Any] = [] if alike else [prediction]
    if level.schedule.fingerprint != family.schedule.fingerprint:
        plain.append(level.schedule.to_config())
    return json.dumps(plain, sort_keys=True) if plain else ""
