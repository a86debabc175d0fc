"""Plans that were found, kept: in memory, and beside the family where that was read from a folder.

    family/found/0123456789abcdef.json      one for what was asked, of which solver, on which grid, by what calibration

They are a cache: whatever is wrong with the folder, plans are found anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlem.files import read_object, write_record
from mlem.multilevel.plan import Plan

__all__ = ["KeptPlans"]

VERSION = 2
"""To be raised when other plans are found for what is asked."""

MOST = 64
"""How many plans are kept, in memory and in the folder."""


class KeptPlans:
    """The plans last asked for.

    Args:
        folder: of the family; None: plans are kept in memory only.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = None if folder is None else Path(folder) / "found"
        self._plans: OrderedDict[str, Plan] = OrderedDict()

    def plan(self, asked: Mapping[str, Any], find: Callable[[], Plan], *, on_disk: bool) -> Plan:
        """The plan for what is asked, found only where it is not kept.

        Args:
            asked: all that the plan follows from, as plain data.
            find: finds the plan. What it raises is raised again, and is not kept.
            on_disk: whether finding it takes so long that it is kept in the folder too.
        """
        key = hashlib.sha256(json.dumps({**asked, "version": VERSION}, sort_keys=True).encode()).hexdigest()[:32]
        plan = self._plans.pop(key, None) or (self._read(key) if on_disk else None)
        if plan is None:
            plan = find()
            if on_disk:
                self._write(key, plan)
        self._plans[key] = plan  # the last one asked for comes last
        if len(self._plans) > MOST:
            self._plans.popitem(last=False)
        return plan

    def _read(self, key: str) -> Plan | None:
        try:
            return None if self._folder is None else Plan.from_dict(read_object(self._folder / f"{key}.json"))
        except (OSError, ValueError):
            return None

    def _write(self, key: str, plan: Plan) -> None:
        if self._folder is None or not self._folder.parent.is_dir():
            return
        try:
            self._folder.mkdir(exist_ok=True)
            write_record(self._folder / f"{key}.json", plan.to_dict())
            kept = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for path in kept[:-MOST]:
                path.unlink(missing_ok=True)
        except OSError:  # a folder that cannot be written costs the time to find the plan again, and no more
            return
