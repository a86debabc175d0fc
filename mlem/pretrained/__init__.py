"""Families that come with the package, `Family.load("pretrained:NAME")`: weights in half precision, with calibration.

Lives here: a folder for each family, as `Family.save` writes it, and where it is.
`benchmarks/pretrained.py` makes them.
"""

from __future__ import annotations

import os
from pathlib import Path

from mlem.arguments import nearest

__all__ = ["comes_along", "folder_of", "pretrained"]

_PREFIX = "pretrained:"
_HOME = Path(__file__).parent


def pretrained() -> list[str]:
    """The names there are."""
    return sorted(path.parent.name for path in _HOME.glob("*/family.json"))


def folder_of(name: str | os.PathLike[str]) -> Path:
    """The folder of a family: that of a name that begins with "pretrained:", else the path as it is.

    Raises: ValueError for a name that there is not, with the nearest.
    """
    given = os.fspath(name)
    if not given.startswith(_PREFIX):
        return Path(given)
    own = given.removeprefix(_PREFIX)
    if own not in pretrained():
        raise ValueError(f"no family {own!r} comes with mlem; {nearest(own, pretrained())}")
    return _HOME / own


def comes_along(folder: Path) -> bool:
    """Whether this is the folder of such a family."""
    return folder.resolve().parent == _HOME.resolve()
