"""The recommendation for a family, saved beside its run: `recommendation.json`, with the calls of its plans.

Reading it back needs no torch. `fastest.py` has the measurements of all rivals.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlem.comparison.calls import Calls
from mlem.comparison.fastest import Advice, advice_from_json
from mlem.files import damaged, read_object, sha256, write_record

if TYPE_CHECKING:
    from mlem.family import Family
    from mlem.multilevel.candidate import Recommendation

__all__ = ["NAME", "Recommended", "renew", "source_of"]

NAME = "recommendation.json"
TARGETS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Mean squared errors; the recommendation is for the first one that can be reached."""


@dataclass(frozen=True)
class Recommended:
    """The recommendation for a family, or why there is none.

    Args:
        advice: None if nothing reaches a target.
        why_not: one line; "" if there is advice.
        calls: of the plans in the advice, the recommended one first.
        source: hash of its inputs.
        machine: on which the seconds hold.
    """

    advice: Advice | None
    why_not: str
    calls: tuple[Calls, ...]
    source: str
    machine: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        write_record(path, asdict(self))

    @staticmethod
    def load(path: Path) -> Recommended:
        """The result written by `save`. Raises ValueError naming the file for other data."""
        plain = read_object(path)
        with damaged(path):
            return Recommended(
                None if plain["advice"] is None else advice_from_json(plain["advice"]),
                str(plain["why_not"]),
                tuple(map(Calls.from_json, plain["calls"])),
                str(plain["source"]),
                str(plain["machine"]),
            )


def renew(folder: Path, family: Family | None = None) -> Recommended | None:
    """The recommendation for the family of a run folder, read from there if current, else found and saved.

    Args:
        folder: with `family/` in it.
        family: of the folder, on the device of interest; None: read it.

    Returns: None if the family is not calibrated.

    Raises:
        ValueError: names a damaged file.
    """
    known, source = folder / NAME, source_of(folder / "family")
    if source is None:
        return None
    if known.exists() and (found := Recommended.load(known)).source == source:
        return found
    from mlem.family import Family

    family = family or Family.load(folder / "family")
    if wrong := family.fitted.damaged.get("calibration"):
        raise ValueError(wrong)
    found = _recommended(family, source)
    found.save(known)
    return found


def source_of(family: Path) -> str | None:
    """Hash of the inputs of a recommendation; None if the family is not calibrated.

    These are the calibration, and the levels with the hashes of their weights.
    """
    if not (family / "calibration.json").is_file():
        return None
    digest = hashlib.sha256()
    for path in (family / "calibration.json", *sorted(family.glob("level_*/mlem.json"))):
        digest.update(sha256(path).encode())
    return digest.hexdigest()


def _recommended(family: Family, source: str) -> Recommended:
    """The fastest way to the smallest possible of TARGETS, on the device of the networks."""
    from mlem.comparison.rivals import advice_of

    why_not = ""
    for target in TARGETS:
        try:
            found = family.recommend(mse=target)
        except ValueError as error:  # the error for the largest target is the most informative
            why_not = str(error)
            continue
        machine = family.fitted.calibration_for(family).about.get("machine", "")
        return Recommended(advice_of(found, target), "", tuple(_calls(found, family)), source, str(machine))
    return Recommended(None, why_not, (), source, "")


def _calls(found: Recommendation, family: Family) -> list[Calls]:
    from mlem.solvers import GridPoint, make_solver

    calls: list[Calls] = []
    for number, one in enumerate((found, *found.alternatives)):
        if one.plan is not None:
            solver = make_solver(one.solver)
            points = GridPoint.of(family.schedule, solver.grid(family.schedule, one.steps, one.grid))
            name = f"{'instead' if number else 'recommended'}: {one}"
            made = Calls.of(name, one.plan, family.names, solver, points)
            calls += [made] if made is not None else []
    return calls
