"""Where a run comes from: version of the package, git commit it was imported from, and machine."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["machine", "processor", "provenance"]


@cache
def provenance() -> dict[str, str]:
    """`{"version": ..., "commit": ...}`, "unknown" if there is none; changed code appends "-dirty"."""
    return {"version": _version(), "commit": _commit(Path(__file__).resolve().parent)}


@cache
def processor() -> str:
    """The processor of this machine: `2 cores AMD EPYC ..`."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} cores {name}"


def machine(device: str = "cpu") -> dict[str, str | int]:
    """What timings depend on: processor, threads, versions and, for "cuda", the GPU and its software."""
    import torch

    found: dict[str, str | int] = {"device": device, "processor": processor(), "threads": torch.get_num_threads()}
    found |= {"python": platform.python_version(), "torch": str(torch.__version__)}
    if torch.device(device).type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"gpu": about.name, "gpu_memory_gib": round(about.total_memory / 2**30)}
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found


def _version() -> str:
    try:
        return version("mlem-diffusion")
    except PackageNotFoundError:
        return "unknown"


def _commit(package: Path) -> str:
    try:
        # an installed copy inside another repository is not part of it
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
