"""What the benchmarks share: the machine they ran on, and how rounds are summed up."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path


def processor() -> str:
    """`2 cores AMD EPYC ..`"""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} cores {name}"


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest, four digits of each."""
    digits = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {key: float(f"{value:.4g}") for key, value in digits.items()}
