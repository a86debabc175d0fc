"""Shared by the benchmarks: the summary of rounds."""

from __future__ import annotations

import statistics


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest, four digits of each."""
    digits = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {key: float(f"{value:.4g}") for key, value in digits.items()}
