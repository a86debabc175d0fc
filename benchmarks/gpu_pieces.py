"""The pieces of `gpu.py`: measurements as jobs of one row each, the most informative first."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gpu_modes import MODES, autocast, running
from gpu_rows import Job, Rows
from gpu_samplers import Scale
from measuring import spread
from overhead import Training
from parallel import Comparison as Parallel
from parallel import Run as Timed
from scale import folder_round

from mlem.comparison.coupled import Comparison
from mlem.comparison.entry import Entry
from mlem.comparison.setup import Run, Setup
from mlem.comparison.tally import Tally
from mlem.data import ensure
from mlem.family import Family
from mlem.level import Level
from mlem.metrics import Measure, mean_error
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.timing import time_levels
from mlem.networks import evaluating, unet
from mlem.sampling import Sampler, blocks
from mlem.schedule import NoiseSchedule
from mlem.solvers.parallel_midpoint import ParallelMidpoint

__all__ = ["Bench", "family_jobs", "speed_jobs"]

_TOLERANCE = 0.02
"""Of parallel midpoints, as in `parallel.py`."""


@dataclass(frozen=True)
class Bench:
    """What all pieces share.

    Attributes:
        scale: how much is measured.
        device: "cpu" or "cuda".
        root: folder of files beside the rows: references, and training data.
        rows: existing measurements.
        given: whether a trained family was given.
        trained: the family, calibrated; called only when a piece needs it.
        measure: FID against its data set.
    """

    scale: Scale
    device: str
    root: Path
    rows: Rows
    given: bool
    trained: Callable[[], Family]
    measure: Callable[[], Measure]

    @cached_property
    def family(self) -> Family:
        """The trained family, on the device. Raises ValueError if it is not calibrated."""
        family = self.trained()
        family.fitted.calibration_for(family)
        for level in family.levels:
            level.network.to(self.device).eval()
        return family

    @cached_property
    def fresh(self) -> Family:
        """The family timed before there is a trained one: the same networks with random weights."""
        return self.family if self.given else fresh_family(self.scale, self.device)

    @cached_property
    def score(self) -> Measure:
        """FID, with its reference."""
        return self.measure()

    @cached_property
    def references(self) -> Comparison:
        """Many-step samples of the largest level, in fp32."""
        options: dict[str, Any] = {"reference_steps": self.scale.reference_steps, "device": self.device}
        size = self.scale.batches[-1]
        return Comparison(self.family, range(self.scale.images), self.root / "references", batch_size=size, **options)

    def setup(self, mode: str, batch: int, measure: Measure | None = None) -> Setup:
        """Samplers in this mode; plans use the seconds of levels measured in it, at this batch size."""
        calibration = self.family.fitted.calibration_for(self.family)
        timed = self.rows.find("levels", (mode, batch))
        if timed is None or "failed" in timed:
            raise ValueError(f"levels were not timed in {mode} at batch {batch}")
        if timed["flops"] != [level.flops for level in self.family.levels]:
            raise ValueError("the timed levels are not those of the family; move the rows away")
        family, seconds = copy.copy(self.family), {batch: tuple(timed["seconds"])}
        family.fitted = Fitted(replace(calibration, seconds=seconds, outside={batch: timed["outside"]}))
        count = self.scale.images if measure is None else self.scale.fid_images
        batches = blocks(range(count), self.scale.batches[-1])
        steps, precision = self.scale.reference_steps, MODES[mode].precision
        return Setup(family, batches, 0, steps, torch.device(self.device), precision, measure)


def fresh_family(scale: Scale, device: str) -> Family:
    """Levels with random weights."""
    torch.manual_seed(0)
    schedule, shape = NoiseSchedule.cosine(), scale.shape
    family = Family([Level(name, unet(name, shape).eval(), schedule, shape, data="noise") for name in scale.levels])
    for level in family.levels:
        level.network.to(device)
    return family


def speed_jobs(bench: Bench) -> Iterator[Job]:
    """Measurements without trained weights: seconds of levels, training, folders of samples."""
    scale = bench.scale
    for mode in scale.modes:
        for batch in scale.batches:
            yield Job("levels", (mode, batch), lambda m=mode, b=batch: _timed_levels(bench, m, b))
    for mode in scale.train_modes:
        for name in scale.trained:
            yield Job("training", (mode, name), lambda m=mode, n=name: _training(bench, m, n))
    for name in dict.fromkeys((scale.trained[0], scale.trained[-1])):
        yield Job("folder", (name,), lambda n=name: _folder(bench, n))


def _timed_levels(bench: Bench, mode: str, batch: int) -> dict[str, Any]:
    """Seconds per image of a call of each level, and of a step outside them."""
    family, how, device = bench.fresh, MODES[mode], bench.device
    networks = torch.nn.ModuleList(level.network for level in family.levels)
    with torch.inference_mode(), evaluating(networks), running(family.levels, how), autocast(how, device):
        seconds, outside = time_levels(family, batch, torch.device(device))
    return {"seconds": list(seconds), "outside": outside, "flops": [level.flops for level in family.levels]}


def _training(bench: Bench, mode: str, name: str) -> dict[str, Any]:
    """Training images per second, and steps relative to a bare loop."""
    scale, how = bench.scale, MODES[mode]
    size = scale.shape[-1]
    shards = ensure("dead_leaves", bench.root / "leaves", size=size, count=scale.train_images, progress=False)
    one = Training(name, scale.train_batch, bench.device, how.precision, how.compiled, scale.workers)
    ratios, rates = one.rates(shards, scale.rounds, scale.train_steps)
    torch.compiler.reset()
    images = [rate * scale.train_batch for rate in rates]
    return {"batch": scale.train_batch, "images_per_second": spread(images), "over_bare_loop": spread(ratios)}


def _folder(bench: Bench, name: str) -> dict[str, Any]:
    """A folder of samples in 20 steps of DDIM in bf16, from an empty folder to the manifest."""
    batch = bench.scale.batches[-1]
    sampler = Sampler(bench.fresh.level(name), solver="ddim", steps=20, device=bench.device, precision="bf16")
    sampler.run(range(batch))
    return folder_round(sampler, bench.scale.folder, batch)


def family_jobs(bench: Bench) -> Iterator[Job]:
    """What needs a trained family: errors, their seconds, parallel midpoints, FID."""
    family = bench.family
    _ = bench.references  # refuses a folder of others
    yield Job("family", (family.weights_hash,), lambda: _about(family))
    if len(bench.rows.of("family")) > 1:
        raise SystemExit(f"{bench.rows.out} has rows of another family; move it away, or choose another --out")
    top, fastest = family.level().name, bench.scale.sampling[0]
    for name in ("ddpm", "dpm_solver_pp"):
        yield Job("reference", (name,), lambda n=name: _reference(bench, n))
    for mode in bench.scale.sampling:
        for batch in bench.scale.batches:
            settings = [(one, n) for one in bench.scale.entries(batch, top) for n in one.steps]
            for entry, steps in settings:
                key = error_key(mode, batch, entry, steps)
                yield Job("errors", key, lambda m=mode, b=batch, e=entry, n=steps: _error(bench, m, b, e, n))
            with running(family.levels, MODES[mode]):
                for entry, steps in settings:
                    key = (mode, batch, entry.label, entry.target, steps)
                    yield Job("seconds", key, lambda m=mode, b=batch, e=entry, n=steps: _seconds(bench, m, b, e, n))
    yield from _parallel_jobs(bench)
    batch = bench.scale.batches[-1]
    with running(family.levels, MODES[fastest]):
        for entry in bench.scale.entries(batch, top):
            for steps in entry.steps:
                if steps <= bench.scale.fid_steps:
                    key = (fastest, batch, entry.label, entry.target, steps)
                    yield Job("fid", key, lambda e=entry, n=steps: _fid(bench, fastest, batch, e, n))


def error_key(mode: str, batch: int, entry: Entry, steps: int) -> tuple[str | int, ...]:
    """Key of a row of errors: those of a single level do not depend on the batch, and only on the mode's precision."""
    where = (MODES[mode].precision, 0) if entry.spec is None else (mode, batch)
    return (*where, entry.label, entry.target, steps)


def _about(family: Family) -> dict[str, Any]:
    first = family.levels[0].flops
    levels = [
        {"name": level.name, "flops": level.flops, "ratio": level.flops / first, "measured": level.measured}
        for level in family.levels
    ]
    return {"data": family.data, "shape": list(family.shape), "levels": levels}


def _reference(bench: Bench, name: str) -> dict[str, Any]:
    """Make references, and the error of bf16 alone, below which no sampler in bf16 can come."""
    truth, steps = bench.references.truth(name), bench.scale.reference_steps
    sampler = Sampler(bench.family.level(), solver=name, steps=steps, device=bench.device, precision="bf16")
    errors = [
        (sampler.run(block).x.cpu() - expected).square().flatten(1).mean(1)
        for block, expected in zip(bench.references.setup.blocks, truth.split(bench.scale.batches[-1]), strict=True)
    ]
    return {"steps": steps, "bf16_mse": torch.cat(errors).mean().item()}


def _run(setup: Setup, entry: Entry, steps: int) -> Run:
    """The one run of an entry in this many steps."""
    (run,) = setup.runs(replace(entry, steps=(steps,)))
    return run


def _error(bench: Bench, mode: str, batch: int, entry: Entry, steps: int) -> dict[str, Any]:
    """Error of each image to the many-step samples."""
    setup = bench.setup(mode, batch)
    run = _run(setup, entry, steps)
    truth, tally = bench.references.truth(run.solver.reference), Tally(setup, run)
    for block, expected in zip(setup.blocks, truth.split(len(setup.blocks[0])), strict=True):
        tally.add(block, setup.truth(expected))
    errors = tally.image_values["mse"]
    mse, stderr = mean_error(errors)
    images = [float(f"{error:.4g}") for error in errors.tolist()]
    about = {} if run.plan is None else {"predicted_mse": run.plan.about.get("predicted_mse")}
    calls = tally.row().calls
    return {"mse": mse, "stderr": stderr, "calls": calls, **about, "reference": run.solver.reference, "images": images}


def _seconds(bench: Bench, mode: str, batch: int, entry: Entry, steps: int) -> dict[str, Any]:
    """Seconds per image, wall-clock and outside networks."""
    setup = bench.setup(mode, batch)
    sampler = setup.sampler(_run(setup, entry, steps))
    sampler.run(range(batch))
    ledgers = [sampler.run(range(batch)).ledger for _ in range(bench.scale.rounds)]
    outside = [100 * (1 - ledger.network_seconds / ledger.wall_seconds) for ledger in ledgers]
    flops = sum(cost.flops for cost in ledgers[0].levels.values()) / batch
    seconds = spread([ledger.wall_seconds / batch for ledger in ledgers])
    return {"seconds": seconds, "outside_percent": statistics.median(outside), "flops": flops}


def _fid(bench: Bench, mode: str, batch: int, entry: Entry, steps: int) -> dict[str, Any]:
    """FID, and seconds per image of its samples, without the first batch, which sets up kernels."""
    setup = bench.setup(mode, batch, bench.score)
    run = _run(setup, entry, steps)
    setup.sampler(run).run(setup.blocks[0])
    tally = Tally(setup, run)
    tally.coupled = False  # there is no reference for so many images
    for block in setup.blocks:
        tally.add(block, None)
    row = tally.row()
    return {"scores": dict(row.scores), "seconds": row.seconds, "flops": row.flops}


def _parallel_jobs(bench: Bench) -> Iterator[Job]:
    """Parallel midpoints against sequential solvers at equal error: their runs, then seconds by batch and mode."""
    scale, level = bench.scale, bench.family.level()
    comparisons: list[Parallel] = []

    def comparison() -> Parallel:
        if not comparisons:
            comparisons.append(Parallel(level, bench.device, max(scale.parallel), scale.reference_steps, "bf16"))
        return comparisons[0]

    ours = ParallelMidpoint(scale.midpoints, tolerance=_TOLERANCE, window=scale.blocks * scale.midpoints)

    def equal() -> dict[str, Any]:
        runs = comparison().equal(ours, scale.blocks, "log_snr", scale.most)
        return {"runs": {name: [steps, grid] for name, (_, steps, grid) in runs.items()}}

    def timed(batch: int) -> dict[str, Any]:
        (found,) = bench.rows.of("equal error")
        runs: dict[str, Timed] = {
            name: (ours if name == ours.name else name, steps, grid) for name, (steps, grid) in found["runs"].items()
        }
        return {"solvers": comparison().timed(runs, batch, scale.rounds)}

    yield Job("equal error", ("bf16",), equal)
    for mode in scale.parallel_modes:
        with running([level], MODES[mode]):
            for batch in scale.parallel:
                yield Job("parallel", (mode, batch), lambda b=batch: timed(b))
