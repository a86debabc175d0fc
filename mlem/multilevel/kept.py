"""A cache of found plans: in memory, and beside the family if it was read from a folder.

    family/found/0123456789abcdef.json      one per specification, solver, grid and calibration

Whatever is wrong with the folder, plans are simply found again.
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

VERSION = 3
"""Version: raise it when the search finds other plans for the same request."""

MOST = 64
"""Number of plans kept, in memory and in the folder."""


class KeptPlans:
    """The most recently used plans.

    Args:
        folder: of the family; None: keep plans in memory only.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = None if folder is None else Path(folder) / "found"
        self._plans: OrderedDict[str, Plan] = OrderedDict()

    def plan(self, asked: Mapping[str, Any], find: Callable[[], Plan], *, on_disk: bool) -> Plan:
        """The plan for a request, from the cache if possible.

        Args:
            asked: everything that determines the plan, as plain data.
            find: finds the plan; its errors propagate and are not cached.
            on_disk: whether finding takes so long that the plan is also kept in the folder.
        """
        key = hashlib.sha256(json.dumps({**asked, "version": VERSION}, sort_keys=True).encode()).hexdigest()[:32]
        plan = self._plans.pop(key, None) or (self._read(key) if on_disk else None)
        if plan is None:
            plan = find()
            if on_disk:
                self._write(key, plan)
        self._plans[key] = plan  # most recent last
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
        except OSError:  # a read-only folder only costs the time to find the plan again
            return
