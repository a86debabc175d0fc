"""Calibration data: costs of levels, differences between them, and the effect of corrections on a sample."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from mlem.files import check_format, damaged
from mlem.multilevel.choices import UNITS
from mlem.networks import Reuse

__all__ = ["COMMAND", "Calibration", "LinearResponse"]

FORMAT = 1
KINDS = ("ode", "sde")
COMMAND = "python -m mlem.multilevel calibrate FAMILY"
"""The command to run if no calibration fits."""
_REMEDY = f"calibrate again: {COMMAND}"


@dataclass(frozen=True)
class LinearResponse:
    """The effect of corrections, for the ODE or the SDE; T times, C corrections (`f^2 - f^1` first).

    Args:
        inner: (C, T, C, T), mean over images and pixels of `q_k(t) q_l(t')`, where `q = u / gain`.
        gain: (C, T), root mean square of u over that of the correction in v.
        roughness: (C,), from 0 (smooth in time) to 1 (a Brownian path), of the corrections between two times.
    """

    inner: Tensor
    gain: Tensor
    roughness: Tensor

    def __post_init__(self) -> None:
        _in_float64(self, "inner", "gain", "roughness")


@dataclass(frozen=True)
class Calibration:
    """Measurements of a family.

    Args:
        names: of the levels, cheapest first.
        flops: of one evaluation of each level, per image.
        seconds: batch size -> seconds per image of one evaluation of each level.
        log_snr: (T,), rising.
        differences: (T, K, K), E|f^j - f^k|^2 per pixel.
        image_differences: (K-1, B), of neighbours, averaged over times and both trajectories of each starting noise.
        responses: "ode" and "sde".
        about: number of images, seed, device, hash of the weights; plain data.
        discretisation: "solver/grid" -> {steps: mean squared error of the largest level}.
        pilots: "sde/hindsight", "ddpm/hindsight" and so on -> predicted and measured error of each plan, and, except in
            old calibrations, the standard error of the latter, the steps, and the trimmed mean.
        outside: batch size -> seconds per image and step outside the networks, for "ode" and "sde".
        stderr: like `discretisation`, the standard errors of these over images.
        trimmed: like `discretisation`, without the worst twentieth of the images, at least one of them.
        shallow: batch size -> {branch: seconds per image of an evaluation of the largest level on reused features};
            empty for a network that cannot reuse them. Measurements with a `Reuse` have it as suffix, such as
            "unipc/uniform/every 2, branch 1".
    """

    names: tuple[str, ...]
    flops: tuple[float, ...]
    seconds: dict[int, tuple[float, ...]]
    log_snr: Tensor
    differences: Tensor
    image_differences: Tensor
    responses: dict[str, LinearResponse]
    about: dict[str, Any]
    discretisation: dict[str, dict[int, float]] = field(default_factory=dict[str, dict[int, float]])
    pilots: dict[str, list[list[float]]] = field(default_factory=dict[str, list[list[float]]])
    outside: dict[int, dict[str, float]] = field(default_factory=dict[int, dict[str, float]])
    stderr: dict[str, dict[int, float]] = field(default_factory=dict[str, dict[int, float]])
    trimmed: dict[str, dict[int, float]] = field(default_factory=dict[str, dict[int, float]])
    shallow: dict[int, dict[int, float]] = field(default_factory=dict[int, dict[int, float]])

    def __post_init__(self) -> None:
        _in_float64(self, "log_snr", "differences", "image_differences")

    def costs(self, unit: str = "seconds", batch_size: int = 64) -> Tensor:
        """Cost of one evaluation of each level, the largest being 1: (K,).

        Args:
            unit: "seconds" or "flops".
            batch_size: seconds are those at the closest measured batch size.

        Raises:
            ValueError: the unit is unknown.
        """
        if unit not in UNITS:
            raise ValueError(f"cost must be {' or '.join(UNITS)}, got {unit!r}")
        seconds = self.seconds[self._nearest(batch_size)]
        costs = torch.tensor(self.flops if unit == "flops" else seconds, dtype=torch.float64)
        return costs / costs[-1]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the calibration: 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def uncertainty(self) -> float | None:
        """The largest relative standard error of a measured solver error; None if not recorded."""
        shares = [
            stderr / self.discretisation[name][steps]
            for name, errors in self.stderr.items()
            for steps, stderr in errors.items()
        ]
        return max(shares, default=None)

    def outside_cost(self, kind: str, unit: str = "seconds", batch_size: int = 64) -> float:
        """Cost of a step outside the networks, in evaluations of the largest level.

        Args:
            kind: "ode" or "sde".
            unit: "seconds" or "flops", which are 0.
            batch_size: as for `costs`.
        """
        near = self._nearest(batch_size)
        if unit == "flops" or near not in self.outside:
            return 0.0
        return self.outside[near][kind] / self.seconds[near][-1]

    def predicted_seconds(
        self,
        calls: Mapping[str, float],
        steps: int,
        kind: str,
        batch_size: int = 64,
        reuse: Reuse | None = None,
        whole: int | None = None,
    ) -> float:
        """Wall-clock seconds per image of a run.

        Args:
            calls: of each level, per image.
            steps: of the solver.
            kind: "ode" or "sde".
            batch_size: as for `costs`.
            reuse: of the deep features of the largest level.
            whole: its calls that run the whole network; by default every Nth.
        """
        near = self._nearest(batch_size)
        seconds = dict(zip(self.names, self.seconds[near], strict=True))
        inside = sum(seconds[name] * count for name, count in calls.items())
        if reuse is not None and (count := calls.get(top := self.names[-1], 0.0)):
            shallow = count - (reuse.whole(count) if whole is None else whole)
            inside -= shallow * (seconds[top] - self.shallow[near][reuse.branch])
        return inside + (steps * self.outside[near][kind] if near in self.outside else 0.0)

    def reusing(self, reuse: Reuse) -> Calibration:
        """The calibration for plans whose largest level reuses deep features: cheaper calls, additional error.

        Pilots with "/reuse" after their name have the predicted error, and the ratio of the errors measured with and
        without reuse.

        Raises: ValueError if that was not measured.
        """
        own = f"/{reuse}"
        names = [name.removesuffix(own) for name in self.pilots if name.endswith(own)]
        if not names or any(reuse.branch not in each for each in (self.shallow or {0: {}}).values()):
            raise ValueError(f"reuse of features ({reuse}) was not measured for this family; {_REMEDY}")
        seconds = {
            size: (*each[:-1], (each[-1] + (reuse.every - 1) * self.shallow[size][reuse.branch]) / reuse.every)
            for size, each in self.seconds.items()
        }
        pilots = {
            f"{name}/reuse": [
                [plain[0], kept[1] / plain[1]]
                for plain, kept in zip(self.pilots[name], self.pilots[name + own], strict=True)
            ]
            for name in names
        }
        return replace(self, seconds=seconds, pilots=self.pilots | pilots)

    def _nearest(self, batch_size: int) -> int:
        """The closest measured batch size."""
        return min(self.seconds, key=lambda size: abs(math.log(size / batch_size)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain = asdict(self) | {"format": FORMAT}
        plain["seconds"] = {str(size): list(values) for size, values in self.seconds.items()}
        return _plain(plain)

    @staticmethod
    def from_dict(plain: dict[str, Any], where: str = "the calibration") -> Calibration:
        """The calibration described by `to_dict`. Raises ValueError naming `where` for other data."""
        check_format(plain, FORMAT, where, _REMEDY)

        def tensor(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.float64)

        def response(one: dict[str, Any]) -> LinearResponse:
            return LinearResponse(**{key: tensor(values) for key, values in one.items()})

        def by_number(values: dict[str, Any]) -> dict[int, float]:
            return {int(number): float(value) for number, value in values.items()}

        with damaged(where, _REMEDY):
            found = Calibration(
                tuple(map(str, plain["names"])),
                tuple(map(float, plain["flops"])),
                {int(size): tuple(map(float, values)) for size, values in plain["seconds"].items()},
                tensor(plain["log_snr"]),
                tensor(plain["differences"]),
                tensor(plain["image_differences"]),
                {kind: response(one) for kind, one in plain["responses"].items()},
                dict(plain["about"]),
                {name: by_number(errors) for name, errors in plain["discretisation"].items()},
                {name: [[*map(float, pair)] for pair in pairs] for name, pairs in plain["pilots"].items()},
                # missing in old calibrations
                {
                    int(size): {kind: float(one[kind]) for kind in KINDS}
                    for size, one in plain.get("outside", {}).items()
                },
                {name: by_number(errors) for name, errors in plain.get("stderr", {}).items()},
                {name: by_number(errors) for name, errors in plain.get("trimmed", {}).items()},
                {int(size): by_number(seconds) for size, seconds in plain.get("shallow", {}).items()},
            )
            found._check_shapes()
        return found

    def _check_shapes(self) -> None:
        """Raise ValueError if tables do not fit together."""
        levels, times = len(self.names), len(self.log_snr)
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
            "flops": ((len(self.flops),), (levels,)),
            "differences": (tuple(self.differences.shape), (times, levels, levels)),
            "image_differences": (tuple(self.image_differences.shape[:1]), (levels - 1,)),
        }
        shapes |= {f"seconds of {size}": ((len(values),), (levels,)) for size, values in self.seconds.items()}
        for kind in KINDS:
            one, row = self.responses[kind], (levels - 1, times)
            shapes[f"gain of {kind}"] = tuple(one.gain.shape), row
            shapes[f"inner of {kind}"] = tuple(one.inner.shape), row + row
            shapes[f"roughness of {kind}"] = tuple(one.roughness.shape), row[:1]
        if odd := [f"{name} has shape {there}, not {due}" for name, (there, due) in shapes.items() if there != due]:
            raise ValueError(odd[0])
        if not self.seconds:
            raise ValueError("no seconds")


def _in_float64(one: Calibration | LinearResponse, *names: str) -> None:
    """Convert fields to float64 and standard layout, so that predictions are the same as after reading from a file."""
    for name in names:
        object.__setattr__(one, name, torch.as_tensor(getattr(one, name), dtype=torch.float64).detach().contiguous())


def _plain(value: Any) -> Any:
    """Tensors and tuples as lists, keys as strings."""
    if isinstance(value, Tensor):
        value = cast("list[Any]", value.tolist())
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in cast("dict[Any, Any]", value).items()}
    if isinstance(value, tuple):
        return list(cast("tuple[Any, ...]", value))
    return value
