"""The result of one sampler: a row of `evaluation.json` and of `runs.csv`.

Here are `Row` and its conversion to JSON and CSV and back, independent of how it was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlem.files import CHECKSUM, checksum, damaged

__all__ = ["KEY", "MULTILEVEL", "Row"]

MULTILEVEL = "mlem"
"""Replaces the level's name for plans."""
KEY = ("sampler", "solver", "levels", "steps", "grid", "coins", "plan", "delta", "trial")
"""The attributes, and columns of the CSV, that identify a run."""
_JSON = {
    "level": "level",
    "sampler": "sampler",
    "steps": "steps",
    "target": "dial",
    "reference": "reference",
    "calls": "calls",
    "evaluations": "evaluations",
    "rounds": "rounds",
    "flops": "flops_per_image",
    "seconds": "seconds_per_image",
    "network_seconds": "network_seconds_per_image",
    "mse": "mse",
    "mse_stderr": "mse_stderr",
    "psnr": "psnr",
    "psnr_stderr": "psnr_stderr",
    "ssim": "ssim",
    "ssim_stderr": "ssim_stderr",
}
"""Attribute -> key; all other keys are scores."""
_CSV = {"flops": "flops", "network_seconds": "network_seconds", "seconds": "wall_seconds"}
_CSV |= {"mse": "mse", "mse_stderr": "mse_stderr"}
"""Attribute -> column, besides KEY, `calls_LEVEL`, the scores and those below."""
_SIMILARITY = ("psnr", "psnr_stderr", "ssim", "ssim_stderr")
"""Attributes, and columns that older files lack."""
_IMAGES = ("image_mse", "image_psnr", "image_ssim")
"""Attributes, and columns, with a number per image; older files have only the first."""
_RIVAL = "rival"
"""Attribute, and column in files where some row has one."""
_SPREAD = "_std"


@dataclass(frozen=True)
class Row:
    """One sampler at one number of steps. Costs are per image; NaN means not measured, or not in the file.

    Errors and similarities are to the reference, means over images; NaN for a solver that shares only its distribution
    with it. Similarities are of images, and NaN if samples cannot be shown.

    Attributes:
        sampler: its name in figures and metrics.
        steps: steps of the solver.
        level: the level that runs alone, or MULTILEVEL.
        levels: names of all levels that may run, joined by "+".
        solver: its name and options.
        grid: name of the time grid.
        coins: kind of the plan's coins; "" for none.
        plan: hash of the plan before `delta`; "" for a single level.
        target: of the plan, such as "budget0.25"; "" for none.
        rival: the kind of sampler, such as T-Stitch; "" for a kind of its own.
        reference: the solver of the reference of `mse`; "" for none.
        delta: added to the logits of p_k; None for the plan as it is.
        trial: replicate of the coins; None for the plan's own coins.
        calls: network evaluations (NFE) of each level.
        evaluations: network evaluations, summed over levels.
        rounds: sequential network calls.
        flops: of the networks.
        seconds: wall-clock time.
        network_seconds: time in the networks.
        mse: mean squared error.
        mse_stderr: standard error of `mse` over images.
        psnr: peak signal-to-noise ratio in dB; infinite if an image equals the reference.
        psnr_stderr: standard error of `psnr` over images.
        ssim: structural similarity, at most 1.
        ssim_stderr: standard error of `ssim` over images.
        scores: FID and similar, named by protocol and count; `NAME_std` is the spread of NAME.
        image_mse: error of each image, to six digits; () if not kept.
        image_psnr: PSNR of each image, likewise.
        image_ssim: SSIM of each image, likewise.
    """

    sampler: str
    steps: int
    level: str
    levels: str = ""
    solver: str = ""
    grid: str = ""
    coins: str = ""
    plan: str = ""
    target: str = ""
    rival: str = ""
    reference: str = ""
    delta: float | None = None
    trial: int | None = None
    calls: Mapping[str, float] = field(default_factory=dict)
    evaluations: float = math.nan
    rounds: float = math.nan
    flops: float = math.nan
    seconds: float = math.nan
    network_seconds: float = math.nan
    mse: float = math.nan
    mse_stderr: float = math.nan
    psnr: float = math.nan
    psnr_stderr: float = math.nan
    ssim: float = math.nan
    ssim_stderr: float = math.nan
    scores: Mapping[str, float] = field(default_factory=dict)
    image_mse: tuple[float, ...] = ()
    image_psnr: tuple[float, ...] = ()
    image_ssim: tuple[float, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether several levels run under a plan."""
        return self.level == MULTILEVEL

    @property
    def key(self) -> tuple[str | int | float | None, ...]:
        """Identity of a run: the attributes in KEY."""
        return tuple(getattr(self, name) for name in KEY)

    @property
    def setting(self) -> tuple[str | int | float | None, ...]:
        """Equal for rows that are replicates of each other: `key` without the trial."""
        return tuple(getattr(self, name) for name in KEY if name != "trial")

    @property
    def point(self) -> str:
        """Steps and target, such as "20_budget0.25"."""
        return f"{self.steps}_{self.target}" if self.target else str(self.steps)

    @property
    def frechet(self) -> str | None:
        """Name of the score that is a Frechet distance, such as fid_random256@2000; None if not measured."""
        return next((name for name in self.scores if name.startswith(("fid_", "fd_"))), None)

    @property
    def picture(self) -> str:
        """Name of the file with samples, without its suffix."""
        return f"{self.level}_{self.sampler}_{self.point}"

    def metrics(self) -> dict[str, float]:
        """Metrics for loggers, by names such as eval/s/ddpm@20/mse."""
        prefix = f"eval/{self.level}/{self.sampler}@{self.point}"
        measured = {"mse": self.mse, "psnr": self.psnr, "ssim": self.ssim}
        measured |= {"seconds_per_image": self.seconds, "evaluations": self.evaluations, **self.scores}
        values = {f"calls_{name}": calls for name, calls in self.calls.items()}
        values |= {name: value for name, value in measured.items() if math.isfinite(value)}
        return {f"{prefix}/{name}": value for name, value in values.items()}

    def to_json(self) -> dict[str, Any]:
        """The object of `evaluation.json`; null for what is not finite."""
        known = {key: getattr(self, name) for name, key in _JSON.items()}
        return {key: None if _not_finite(value) else value for key, value in (known | dict(self.scores)).items()}

    @staticmethod
    def from_json(plain: Mapping[str, Any], where: str = "evaluation.json") -> Row:
        """The row written by `to_json`, also of older versions. Raises ValueError naming `where` for other data."""
        with damaged(where):
            needed = {name: plain[name] for name in ("sampler", "steps", "level")}
            known: dict[str, Any] = {name: plain[key] for name, key in _JSON.items() if key in plain}
            known = {name: math.nan if value is None else value for name, value in known.items()}
            others = {key: value for key, value in plain.items() if key not in _JSON.values()}
            scores = {name: math.nan if value is None else value for name, value in others.items()}
            return Row(**known | needed, levels="+".join(known.get("calls", ())), scores=scores)

    def to_csv(self) -> dict[str, str]:
        """Column -> cell of `runs.csv`; spreads of scores are left out."""
        cells = {name: getattr(self, name) for name in KEY}
        cells |= {f"calls_{name}": calls for name, calls in self.calls.items()}
        cells |= {column: getattr(self, name) for name, column in _CSV.items()}
        cells |= {name: value for name, value in self.scores.items() if not name.endswith(_SPREAD)}
        cells |= {_RIVAL: self.rival} if self.rival else {}
        cells |= {name: getattr(self, name) for name in _SIMILARITY}
        cells |= {name: " ".join(map(str, getattr(self, name))) for name in _IMAGES}
        plain = {name: "" if value is None else str(value) for name, value in cells.items()}
        return {**plain, CHECKSUM: checksum(plain)}

    @staticmethod
    def from_csv(cells: Mapping[str, str]) -> Row:
        """The row written by `to_csv`, also of older versions. Raises KeyError or ValueError for other cells."""
        cells = {name: cell for name, cell in cells.items() if cell or name != _RIVAL}
        if CHECKSUM in cells and cells.pop(CHECKSUM) != checksum(cells):
            raise ValueError(f"a row differs from its {CHECKSUM}")
        texts = {name: cells[name] for name in ("sampler", "solver", "levels", "grid", "coins", "plan")}
        numbers: dict[str, Any] = {name: float(cells[column]) for name, column in _CSV.items()}
        numbers |= {name: float(cells.get(name, math.nan)) for name in _SIMILARITY}
        images: dict[str, Any] = {name: tuple(map(float, cells.get(name, "").split())) for name in _IMAGES}
        calls = {name.removeprefix("calls_"): float(cells[name]) for name in cells if name.startswith("calls_")}
        known = {*KEY, _RIVAL, *_CSV.values(), *_SIMILARITY, *_IMAGES, *(f"calls_{name}" for name in calls)}
        return Row(
            **texts,
            **numbers,
            **images,
            rival=cells.get(_RIVAL, ""),
            steps=int(cells["steps"]),
            level=MULTILEVEL if texts["plan"] else texts["levels"],
            delta=float(cells["delta"]) if cells["delta"] else None,
            trial=int(cells["trial"]) if cells["trial"] else None,
            calls=calls,
            evaluations=sum(calls.values()),
            scores={name: float(cells[name]) for name in cells if name not in known},
        )


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
