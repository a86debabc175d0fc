"""Reading `metrics.jsonl`, the lines logged by training."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlem.files import damaged, read_object

__all__ = ["Line", "RunLog", "is_number", "run_logs"]

_NUMBER = re.compile(r"\d+(\.\d+)?")
Line = tuple[list[float], list[float]]
"""x and y."""


@dataclass(frozen=True)
class RunLog:
    """One metrics.jsonl.

    Attributes:
        name: of its folder.
        records: the lines.
    """

    name: str
    records: list[dict[str, Any]]

    def line(self, metric: str, x: str = "step") -> Line | None:
        """Values of the metric against steps; None if there are none."""
        points = [(one[x], one[metric]) for one in self.records if is_number(one.get(metric)) and x in one]
        return ([at for at, _ in points], [value for _, value in points]) if points else None

    def last(self, prefix: str) -> Line | None:
        """The latest values of the metrics `<prefix><number>` against these numbers; None if there are none."""
        found = {name: value for one in self.records for name, value in one.items() if name.startswith(prefix)}
        numbered = {name.removeprefix(prefix): value for name, value in found.items() if is_number(value)}
        points = sorted((float(name), value) for name, value in numbered.items() if _NUMBER.fullmatch(name))
        return ([at for at, _ in points], [value for _, value in points]) if points else None

    def names(self, prefix: str) -> list[str]:
        """Metrics that begin with `prefix`, in order of appearance."""
        return list(dict.fromkeys(name for one in self.records for name in one if name.startswith(prefix)))


def is_number(value: Any) -> bool:
    """Whether it can be drawn and sorted, neither missing nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def run_logs(folder: Path) -> Iterator[RunLog]:
    """The logs of the folder and its subfolders."""
    # the smallest level first, as in the other figures
    family = folder / "family" / "family.json"
    order = []
    if family.exists():
        with damaged(family):
            order = [f"{kind}_{level}" for level in read_object(family)["levels"] for kind in ("unet", "dit")]
    inside = sorted(folder.glob("*/metrics.jsonl"))
    inside.sort(key=lambda path: order.index(path.parent.name) if path.parent.name in order else len(order))
    for path in [folder / "metrics.jsonl", *inside]:
        if path.exists():
            yield RunLog(path.resolve().parent.name, list(_records(path)))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):  # cut short by a kill
            continue
        if isinstance(record, dict) and is_number(record.get("step")):
            yield record
