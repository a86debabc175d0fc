"""Samples under a plan, for pilots and memorising: without ledger or autocast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mlem.conditions import ConditionSource
from mlem.multilevel.denoiser import MultilevelDenoiser
from mlem.multilevel.plan import Plan
from mlem.networks import deep_cache_in
from mlem.solvers import GridPoints, Solver, quadrature_weights
from mlem.trajectory import starting_noise, trajectory

if TYPE_CHECKING:
    from mlem.family import Family

__all__ = ["plan_samples", "start_caches"]


def start_caches(family: Family) -> None:
    """Begin a trajectory: no level reuses features of the previous one."""
    for level in family.levels:
        if (cache := deep_cache_in(level.network)) is not None:
            cache.start()


def plan_samples(
    family: Family,
    plan: Plan,
    solver: Solver,
    points: GridPoints,
    indices: Tensor,
    seed: int,
    conditions: ConditionSource | None = None,
) -> Tensor:
    """The samples of a family under a plan with these indices (B,): (B, *shape), float64."""
    start_caches(family)
    weights: list[float] = quadrature_weights(solver, points.schedule, points)[0].tolist()
    run = MultilevelDenoiser(family, plan).begin(indices, weights, conditions)
    x_T = starting_noise(seed, indices, family.shape)
    return trajectory(run.estimate, solver, points, x_T, indices, seed, revise=run.revise)
