"""Which code makes a run: the version of the package and the git commit that it was imported from."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["provenance"]


@cache
def provenance() -> dict[str, str]:
    """`{"version": ..., "commit": ...}`, "unknown" where there is none; "-dirty" ends the commit of changed code."""
    return {"version": _version(), "commit": _commit(Path(__file__).resolve().parent)}


def _version() -> str:
    try:
        return version("mlem-diffusion")
    except PackageNotFoundError:
        return "unknown"


def _commit(package: Path) -> str:
    try:
        # an installed copy inside somebody else's repository is no part of that repository
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
