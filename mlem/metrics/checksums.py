"""Weights identified by the first digits of their SHA-256."""

from __future__ import annotations

from pathlib import Path

__all__ = ["check_sha256"]


def check_sha256(path: Path, found: str, given: str) -> None:
    """Raise ValueError unless `found`, the file's SHA-256, starts with `given`, at least 8 hexadecimal digits."""
    if len(given) < 8:
        raise ValueError(f"metric.sha256 must be the first 8 or more digits of the file's SHA-256, got {given!r}")
    if not found.startswith(given.lower()):
        raise ValueError(f"{path} has SHA-256 {found[:16]}..., but metric.sha256 is {given}; correct one of them")
