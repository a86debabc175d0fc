"""Wall-clock time of levels as sampling runs them, and of a step outside them."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlem.conditions import ConditionSource
from mlem.files import cache_folder, read_object, write_record
from mlem.ledger import Meter
from mlem.level import Level
from mlem.multilevel.calibration import KINDS, Calibration
from mlem.multilevel.correction import REUSES
from mlem.networks import Reuse, evaluating
from mlem.noise import reserved_indices
from mlem.provenance import processor
from mlem.reusing import can_reuse, reusing
from mlem.solvers import GridPoint, make_solver
from mlem.trajectory import samples
from mlem.waiting import Waiting

if TYPE_CHECKING:
    from mlem.family import Family

__all__ = ["time_levels", "time_shallow", "timed_here", "timed_on"]

REPEATS = 3
CALLS, STEPS, SHALLOW = 2, 16, 4
"""Calls of a level per repeat, steps of the run that times what is outside, and calls on reused features."""
SOLVERS = dict(zip(KINDS, ("ddim", "ddpm"), strict=True))


def time_levels(
    family: Family, batch_size: int, device: torch.device, conditions: ConditionSource | None = None
) -> tuple[tuple[float, ...], dict[str, float]]:
    """Medians over short runs of the levels, one after another, in batches of `batch_size` samples.

    Networks must already be on `device`, in the mode to be timed.

    Returns: seconds per image of one evaluation of each level, and of one step outside the networks, by kind.
    """
    index = reserved_indices("calibration", batch_size, device)
    seconds: list[float] = []
    for level in family.levels:
        _run(level, "ddim", 1, index, conditions)  # the very first call is slow
        networks = [_run(level, "ddim", CALLS, index, conditions)[0] for _ in range(REPEATS)]
        seconds.append(statistics.median(networks) / CALLS / batch_size)
    outside: dict[str, float] = {}
    for kind, solver in SOLVERS.items():
        _run(family.levels[0], solver, STEPS, index, conditions)
        others = [_run(family.levels[0], solver, STEPS, index, conditions)[1] for _ in range(REPEATS)]
        outside[kind] = statistics.median(others) / STEPS / batch_size
    return tuple(seconds), outside


def time_shallow(
    family: Family, batch_size: int, device: torch.device, conditions: ConditionSource | None = None
) -> dict[int, float]:
    """Median seconds per image of an evaluation of the largest level on reused deep features, by branch.

    Empty for a network that cannot reuse features. Otherwise like `time_levels`.
    """
    index, found = reserved_indices("calibration", batch_size, device), dict[int, float]()
    for branch in sorted({reuse.branch for reuse in REUSES}):
        once = Reuse(SHALLOW + 1, branch)
        if not can_reuse(family.level(), once):
            continue
        level, cache = reusing(family.level(), once)
        seconds: list[float] = []
        for _ in range(REPEATS):
            cache.start()
            whole, _ = _run(level, "ddim", 1, index, conditions)
            cache.start()
            both, _ = _run(level, "ddim", 1 + SHALLOW, index, conditions)
            seconds.append((both - whole) / SHALLOW / batch_size)
        found[branch] = max(0.0, statistics.median(seconds))
    return found


def timed_on(device: torch.device) -> str:
    """What the times of levels depend on, besides batch size and network."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def timed_here(family: Family, calibration: Calibration, batch_size: int) -> Calibration:
    """The calibration with times on this machine: its own, or measured once, if it is from another machine, and kept.

    Old calibrations without a machine are returned unchanged. Times are kept below `mlem.files.cache_folder`, so that
    what is recommended today is recommended tomorrow; delete them to measure again.
    """
    place = next(family.level().network.parameters(), torch.empty(0)).device
    if calibration.about.get("machine", here := timed_on(place)) == here:
        return calibration
    what = json.dumps([family.weights_hash, here, batch_size, torch.__version__, bool(calibration.shallow)])
    path = cache_folder() / "times" / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.json"
    times = _kept(path)
    if times is None:
        times = _timed(family, batch_size, place, bool(calibration.shallow))
        with suppress(OSError, ValueError):  # a read-only folder only costs the time to measure again
            write_record(path, times)
    found = calibration.to_dict() | times
    found["about"] |= {"machine": here}
    return Calibration.from_dict(found)


def _kept(path: Path) -> dict[str, Any] | None:
    """What `_timed` returned; None if it is not there, or not readable."""
    try:
        return {name: read_object(path)[name] for name in ("seconds", "outside", "shallow")}
    except (OSError, ValueError, KeyError):
        return None


def _timed(family: Family, batch_size: int, place: torch.device, reuse: bool) -> dict[str, Any]:
    """Times of the levels on this machine, as in a calibration's plain data."""
    networks = torch.nn.ModuleList(level.network for level in family.levels)
    with torch.inference_mode(), evaluating(networks), Waiting("timing the levels on this machine", 1) as waiting:
        seconds, outside = time_levels(family, batch_size, place)
        shallow = time_shallow(family, batch_size, place) if reuse else {}
        waiting.advance()
    size = str(batch_size)
    once = {str(branch): value for branch, value in shallow.items()}
    return {"seconds": {size: list(seconds)}, "outside": {size: outside}, "shallow": {size: once} if reuse else {}}


def _run(
    level: Level, solver: str, steps: int, index: Tensor, conditions: ConditionSource | None
) -> tuple[float, float]:
    """Seconds of a run in the network and outside it."""
    meter = Meter(level.network, level.flops)
    schedule = level.denoiser.schedule
    points = GridPoint.of(schedule, make_solver(solver).grid(schedule, steps, "log_snr"))
    begin = time.perf_counter()
    x = samples(
        level.denoiser_for(index, conditions).through(meter), make_solver(solver), points, level.shape, index, 0
    )
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    whole = time.perf_counter() - begin
    network = meter.collect().seconds
    return network, max(0.0, whole - network)
