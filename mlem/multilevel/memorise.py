"""Memorised plans: coins do not depend on the state, so the best of many draws can be reused ([J], Fig. 1)."""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch
from torch import Tensor

from mlem.arguments import MOST_STEPS, check_whole
from mlem.conditions import ConditionSource
from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.multilevel.identity import identity
from mlem.multilevel.plan import Plan
from mlem.multilevel.planner import make_plan
from mlem.multilevel.probes import plan_samples
from mlem.multilevel.spec import PlanSpec
from mlem.networks import evaluating
from mlem.noise import reserved_indices
from mlem.solvers import GridPoint, Solver, make_solver
from mlem.trajectory import samples

__all__ = ["memorise"]


def memorise(
    family: Family,
    spec: PlanSpec,
    *,
    solver: str = "ddpm",
    steps: int = 128,
    grid: str | None = None,
    draws: int = 15,
    images: int = 16,
    reference_steps: int = 1000,
    device: str | torch.device = "cpu",
    conditions: ConditionSource | None = None,
) -> Plan:
    """The best of `draws` plans, by the mean squared error on a training set of `images` samples.

    Args:
        spec: of all plans; its seed is that of the first draw.
        solver, steps, grid: of sampling.
        images: samples to choose by, and as many others for evaluation.
        reference_steps: steps of the reference.
        device: where the family's networks are moved, and stay.
        conditions: of the samples; by default classes take turns.

    Returns: the plan. Its `about` has the error by which it was chosen (chosen_mse), its error on the other samples
        (judged_mse), and the mean and standard deviation of the latter over all draws (others_mse, others_spread).

    Raises: ValueError for fewer than two draws, no images or reference steps, a specification without coins, or one
        that the solver cannot follow.
    """
    if draws < 2:
        raise ValueError(f"draws must be >= 2, got {draws}; the best is chosen among them")
    if images < 1:
        raise ValueError(f"images must be >= 1, got {images}; the best is chosen by its error on them")
    check_whole("reference_steps", reference_steps, most=MOST_STEPS)
    if spec.searched:
        raise ValueError("this spec tosses no coins, so all its draws are equal; add coins=systematic")
    method = make_solver(solver)
    times = method.grid(family.schedule, steps, grid)
    plans = [make_plan(replace(spec, seed=spec.seed + n), family, method, times) for n in range(draws)]
    networks = torch.nn.ModuleList(level.network for level in family.levels).to(device)
    with torch.inference_mode(), evaluating(networks):
        parts = [reserved_indices("memorising", images, device, skip=part * images) for part in range(2)]
        chosen, judged = (_errors(family, plans, method, times, reference_steps, index, conditions) for index in parts)
    best = chosen.index(min(chosen))
    found = {"draws": draws, "images": images, "chosen_mse": chosen[best], "judged_mse": judged[best]}
    found |= {"others_mse": statistics.mean(judged), "others_spread": statistics.stdev(judged)}
    own = identity(family, method, GridPoint.of(family.schedule, times))
    return replace(plans[best], about=plans[best].about | found | own)


def _errors(
    family: Family,
    plans: list[Plan],
    solver: Solver,
    grid: TimeGrid,
    reference_steps: int,
    indices: Tensor,
    conditions: ConditionSource | None,
) -> list[float]:
    """Mean squared error of each plan on these samples, against the many-step run of the largest level."""
    teacher = make_solver(solver.reference)
    fine = GridPoint.of(family.schedule, teacher.grid(family.schedule, reference_steps))
    denoiser = family.level().denoiser_for(indices, conditions)
    truth = samples(denoiser, teacher, fine, family.shape, indices, 0)
    points = GridPoint.of(family.schedule, grid)
    found = (plan_samples(family, plan, solver, points, indices, 0, conditions) for plan in plans)
    return [(x - truth).square().mean().item() for x in found]
