"""`sample()`: samples by index, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mlem.arguments import called, check_whole
from mlem.conditions import ConditionSource
from mlem.grids import TimeGrid
from mlem.ledger import Ledger
from mlem.multilevel.plan import Plan
from mlem.multilevel.spec import PlanSpec
from mlem.networks import Reuse
from mlem.noise import check_indices
from mlem.sampling.bars import with_bar
from mlem.sampling.hooks import Revise, Start, Watch
from mlem.sampling.metered import Model
from mlem.sampling.sampler import NonFiniteError, Result, Sampler
from mlem.schedule import NoiseSchedule
from mlem.solvers import Solver

__all__ = ["blocks", "sample"]


def blocks(indices: Sequence[int], batch_size: int) -> list[list[int]]:
    """`indices` cut into batches.

    Raises: ValueError for missing, repeated, reserved, negative or fractional indices, or a batch size below 1.
    """
    check_whole("batch_size", batch_size)
    listed = check_indices(indices)
    if not listed or len(set(listed)) < len(listed):
        raise ValueError(f"indices must be distinct whole numbers >= 0, at least one; got {len(listed)} of them")
    return [listed[i : i + batch_size] for i in range(0, len(listed), batch_size)]


@called("sample")
def sample(
    model: Model,
    *,
    indices: Sequence[int],
    solver: str | Solver = "ddim",
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 64,
    grid: str | TimeGrid | None = None,
    level: str | None = None,
    plan: Plan | PlanSpec | None = None,
    reuse: Reuse | None = None,
    schedule: NoiseSchedule | None = None,
    shape: Sequence[int] | None = None,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    spread: bool = False,
    conditions: ConditionSource | None = None,
    start: Start | None = None,
    watch: Watch | None = None,
    revise: Revise | None = None,
    return_noise: bool = False,
    progress: bool = False,
) -> Result:
    """Sample the images with these indices.

    Args:
        model: a Family (its largest level, or `level`, or several under `plan`), a Level, or any denoiser together
            with `schedule` and `shape`.
        indices: sample indices, each in [0, 10**9); index and seed fix an image, whatever the batch size.
        solver: a name, such as "ddim" or "dpm_solver_pp", or a Solver.
        steps: number of steps of the time grid.
        seed: fixes all randomness, together with the index.
        batch_size: images per batch.
        grid: name of a time grid, or a TimeGrid, which sets its own steps; by default the solver's choice.
        level: name of a level of the family.
        plan: which levels run when: a Plan, or a specification, `family.plan(...)`.
        reuse: run the whole UNet of the level (under a plan, of the largest level) only at every Nth of its
            evaluations: `Reuse(every=3)`, DeepCache. A plan's cost ignores this.
        schedule, shape: for a bare denoiser: its schedule, and the shape of one sample.
        device: where to run; by default where the network is.
        precision: "fp32", "bf16" or "fp16" (autocast of the network).
        spread: under torch.distributed, ranks share the rows of every call.
        conditions: what networks take besides x and t: a function of indices (B,) returning name -> tensor with B
            rows, such as `lambda indices: {"class_labels": indices % 10}`; see `mlem.conditions`. By default classes
            take turns.
        start: where samples start: a function of indices (B,) and their noise (B, *shape); by default the noise.
            Required if the grid begins below t = 1, see `TimeGrid.below` and `mlem.sampling.noised`.
        watch: called with a `mlem.sampling.Step` after each step of each batch.
        revise: called with a `Step` before each step; returns the x to continue from.
        return_noise: also return `x_T`.
        progress: show a bar.

    Returns: the samples, not clipped, and a ledger of what they cost.

    Raises:
        ValueError: options out of range.
        NonFiniteError: samples became NaN or infinite; all others are in the error's `result`.
    """
    sampler = Sampler(
        model,
        solver=solver,
        steps=steps,
        seed=seed,
        grid=grid,
        level=level,
        plan=plan,
        reuse=reuse,
        schedule=schedule,
        shape=shape,
        device=device,
        precision=precision,
        spread=spread,
        conditions=conditions,
        start=start,
        watch=watch,
        revise=revise,
    )
    results: list[Result] = []
    kept: list[int] = []
    error: NonFiniteError | None = None
    for block in with_bar(blocks(indices, batch_size), progress):
        try:
            result, good = sampler.run(block), block
        except NonFiniteError as caught:
            error = error or caught
            result, good = caught.result, caught.indices
        results.append(result if return_noise else Result(result.x, result.ledger))
        kept += good
    whole = _joined(results)
    if error is not None:
        error.result, error.indices = whole, kept
        raise error
    return whole


def _joined(results: Sequence[Result]) -> Result:
    """The results of several batches, joined."""
    ledger = Ledger()
    for result in results:
        ledger.add(result.ledger)
    noises = [result.x_T for result in results if result.x_T is not None]
    return Result(torch.cat([result.x for result in results]), ledger, torch.cat(noises) if noises else None)
