"""The samplers of `gpu.py`, and how much of everything is measured: at the papers' scale, and small."""

from __future__ import annotations

from dataclasses import dataclass

from mlem.comparison.entry import Entry
from mlem.multilevel.spec import PlanSpec

__all__ = ["LARGE", "SMALL", "Scale"]

UNIPC = "diffusers:UniPCMultistepScheduler"
Alone = tuple[str, str | None, tuple[int, ...]]
"""Solver, grid and steps of the largest level alone."""
Together = tuple[str, str, str | None, tuple[int, ...], tuple[float, ...]]
"""Estimator, solver, grid, steps and budgets of plans."""


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        levels, shape: of the family.
        batches: batch sizes; the largest is for errors and FID.
        modes: in which levels are timed; sampling: those for samplers, the fastest first.
        images, reference_steps: of errors, in fp32.
        rounds: how often a sampler, or training, is timed.
        alone, together: the samplers. cost: unit of budgets.
        fid_images, fid_steps: of FID; samplers with more steps are left out.
        parallel, parallel_modes: batch sizes and modes of parallel midpoints.
        blocks, midpoints, most: of parallel midpoints, and the most steps of their rivals.
        trained, train_modes, train_batch, train_steps, train_images, workers: of training throughput.
        folder: samples per folder.
    """

    levels: tuple[str, ...] = ("xs", "s", "m", "l", "xl")
    shape: tuple[int, int, int] = (3, 64, 64)
    batches: tuple[int, ...] = (1, 16, 64, 200)
    modes: tuple[str, ...] = ("fp32", "bf16", "bf16, graphs", "bf16, compiled", "bf16, compiled, graphs")
    sampling: tuple[str, ...] = ("bf16, compiled, graphs", "bf16")
    images: int = 200
    reference_steps: int = 1000
    rounds: int = 3
    alone: tuple[Alone, ...] = (
        ("ddpm", None, (16, 32, 58, 117, 233)),
        ("ddpm", "uniform", (58, 117, 233)),
        ("dpm_solver_pp_sde", None, (16, 32, 64, 128)),
        ("dpm_solver_pp", None, (8, 12, 16, 24, 32, 64)),
        ("heun", None, (12, 24)),
        ("ddim", None, (16, 32, 64)),
        (UNIPC, None, (8, 12, 16, 24)),
    )
    together: tuple[Together, ...] = (
        ("hindsight", "ddpm", None, (64, 250), (1 / 16, 1 / 8, 1 / 4)),
        ("jump", "ddpm", None, (250,), (1 / 16, 1 / 8, 1 / 4)),
        ("hindsight", "dpm_solver_pp", None, (48, 96), (1 / 8, 1 / 4, 1 / 2)),
    )
    cost: str = "seconds"
    fid_images: int = 5000
    fid_steps: int = 128
    parallel: tuple[int, ...] = (1, 4, 16)
    parallel_modes: tuple[str, ...] = ("bf16", "bf16, graphs")
    blocks: int = 6
    midpoints: int = 8
    most: int = 1000
    trained: tuple[str, ...] = ("xs", "s", "m", "l", "xl")
    train_modes: tuple[str, ...] = ("fp32", "bf16", "bf16, compiled")
    train_batch: int = 64
    train_steps: int = 30
    train_images: int = 2000
    workers: int = 4
    folder: int = 2000

    def entries(self, batch: int, top: str) -> list[Entry]:
        """The samplers, for a batch of this size."""
        found: list[Entry] = []
        for solver, grid, steps in self.alone:
            name = " ".join([solver.removeprefix("diffusers:"), *([grid] if grid else [])])
            found.append(Entry(solver, steps, grid, name=name, levels=(top,)))
        for estimator, solver, grid, several, budgets in self.together:
            coins = "bernoulli" if estimator == "jump" else None  # as published
            for steps in several:
                for budget in budgets:
                    shares = {"budget": budget, "cost": self.cost, "batch_size": batch}
                    spec = PlanSpec(**shares, estimator=estimator, coins=coins)
                    found.append(Entry(solver, (steps,), grid, spec, name=f"{estimator} {solver}"))
        return found


LARGE = Scale()
SMALL = Scale(
    levels=("xs", "s"),
    shape=(3, 8, 8),
    batches=(2,),
    modes=("bf16, graphs",),
    sampling=("bf16, graphs",),
    images=2,
    reference_steps=16,
    rounds=1,
    alone=(("ddpm", None, (4, 8)), (UNIPC, None, (4,))),
    together=(("hindsight", "ddpm", None, (8,), (1 / 2,)), ("jump", "ddpm", None, (8,), (3 / 4,))),
    cost="flops",  # the same on every machine
    fid_images=2,
    fid_steps=4,
    parallel=(1,),
    parallel_modes=("bf16, graphs",),
    blocks=2,
    midpoints=2,
    most=4,
    trained=("xs",),
    train_modes=("fp32",),
    train_batch=2,
    train_steps=1,
    train_images=20,
    workers=0,
    folder=2,
)
