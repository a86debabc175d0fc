"""What was fitted to a family and is saved beside its levels: calibration, learned coefficients, memorised plans.

    family/calibration.json         measurements of the levels
    family/coefficients.json        learned coefficients
    family/plans/best.json          memorised plans

A damaged file is an error only when it is needed: the family can be sampled without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mlem.files import read_object, write_record
from mlem.level import check_name
from mlem.multilevel import calibration as calibrations
from mlem.multilevel import coefficients as learned
from mlem.multilevel.calibration import Calibration
from mlem.multilevel.coefficients import Coefficients
from mlem.multilevel.plan import Plan
from mlem.schedule import NoiseSchedule

__all__ = ["Fitted"]

_T = TypeVar("_T")
_CALIBRATION, _COEFFICIENTS, _PLANS = "calibration", "coefficients", "plans"
_MEMORISE = "python -m mlem.multilevel memorise FAMILY"


class _Family(Protocol):
    """The family, as far as it matters here."""

    @property
    def data(self) -> str: ...
    @property
    def names(self) -> list[str]: ...
    @property
    def weights_hash(self) -> str: ...
    @property
    def schedule(self) -> NoiseSchedule: ...


@dataclass(frozen=True, eq=False)
class Fitted:
    """What was fitted to a family; `calibration_for` and the like reject what was fitted to other weights.

    Args:
        calibration: if there is one.
        coefficients: if there are any.
        plans: by name.
        damaged: "calibration", "coefficients" or "plans/NAME" -> the fault of the file, in one line.
    """

    calibration: Calibration | None = None
    coefficients: Coefficients | None = None
    plans: Mapping[str, Plan] = field(default_factory=dict[str, Plan])
    damaged: Mapping[str, str] = field(default_factory=dict[str, str])

    def has(self, name: str) -> bool:
        """Whether there is a "calibration", or "coefficients", damaged or not."""
        return {_CALIBRATION: self.calibration, _COEFFICIENTS: self.coefficients}[name] is not None or (
            name in self.damaged
        )

    def calibrated(self, family: _Family) -> bool:
        """Whether there is a calibration for these weights. Raises ValueError if it is damaged."""
        if self.calibration is None:
            self._refuse_damaged(_CALIBRATION)
            return False
        return self.calibration.about.get("weights") == family.weights_hash

    def calibration_for(self, family: _Family) -> Calibration:
        """The calibration. Raises ValueError with the remedy if there is none, or it is for other weights."""
        found = self.calibration
        if found is None:
            self._refuse_damaged(_CALIBRATION)
            _refuse_one_level(family)
            raise ValueError(f"this family of {family.data} is not calibrated: {calibrations.COMMAND}")
        if not self.calibrated(family):
            raise ValueError(f"the calibration is for other weights or guidance: {calibrations.COMMAND}")
        if found.about.get("schedule") not in (None, family.schedule.fingerprint):
            raise ValueError(f"the calibration is for another noise schedule: {calibrations.COMMAND}")
        return found

    def coefficients_for(self, family: _Family) -> Coefficients:
        """The coefficients. Raises ValueError with the remedy if there are none, or they are for other weights."""
        found = self.coefficients
        if found is None:
            self._refuse_damaged(_COEFFICIENTS)
            _refuse_one_level(family)
            raise ValueError(
                f"this family of {family.data} has no learned coefficients: {learned.COMMAND}, "
                "or use probabilities=calibrated"
            )
        if found.about.get("weights") not in (None, family.weights_hash):
            raise ValueError(f"the coefficients are for other weights or guidance; fit them again: {learned.COMMAND}")
        return found

    def plan_for(self, family: _Family, name: str) -> Plan:
        """The plan of this name. Raises ValueError listing the names, or if it was made for other weights."""
        plan = self.plans.get(name)
        if plan is None:
            self._refuse_damaged(f"{_PLANS}/{name}")
            kept = f"there are {', '.join(self.plans)}" if self.plans else "there are none"
            raise ValueError(f"plan={name}: {kept}; memorise one with: {_MEMORISE}")
        if plan.about.get("weights") not in (None, family.weights_hash):
            raise ValueError(f"plan={name} was memorised for other weights or guidance: {_MEMORISE}")
        return plan

    def with_plan(self, name: str, plan: Plan) -> Fitted:
        """A copy with a plan of this name."""
        return replace(self, plans={**self.plans, name: plan})

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what there is; other files stay as they are.

        Raises:
            ValueError: a plan's name is not a file name; nothing is written.
        """
        for name in self.plans:
            check_name("name of a plan", name)
        folder = Path(folder)
        if self.calibration is not None:
            write_record(folder / f"{_CALIBRATION}.json", self.calibration.to_dict())
        if self.coefficients is not None:
            write_record(folder / f"{_COEFFICIENTS}.json", self.coefficients.to_dict())
        for name, plan in self.plans.items():
            plan.save(folder / _PLANS / f"{name}.json")

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Fitted:
        """Read what there is. A fault in a file is recorded, and raised when the file is needed."""
        folder, damaged = Path(folder), dict[str, str]()

        def read(name: str, parse: Callable[[dict[str, Any], str], _T]) -> _T | None:
            path = folder / f"{name}.json"
            if not path.is_file():
                return None
            try:
                return parse(read_object(path), str(path))
            except ValueError as error:
                damaged[name] = str(error)
                return None

        calibration = read(_CALIBRATION, Calibration.from_dict)
        coefficients = read(_COEFFICIENTS, Coefficients.from_dict)
        names = [path.stem for path in sorted((folder / _PLANS).glob("*.json"))]
        plans = {name: plan for name in names if (plan := read(f"{_PLANS}/{name}", Plan.from_dict)) is not None}
        return Fitted(calibration, coefficients, plans, damaged)

    def _refuse_damaged(self, name: str) -> None:
        if name in self.damaged:
            raise ValueError(self.damaged[name])


def _refuse_one_level(family: _Family) -> None:
    """Raise ValueError for a family of one level, to which nothing can be fitted."""
    if len(family.names) == 1:
        raise ValueError(
            f"this family of {family.data} has one level, {family.names[0]}, but plans share work between several: "
            "leave out the plan, or train more: model=family model.levels=[xs,s]"
        )
