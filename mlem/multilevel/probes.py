"""Samples under a plan for those that measure plans, pilots and memorising: without a ledger or autocast."""

from __future__ import annotations

from torch import Tensor

from mlem.family import Family
from mlem.multilevel.denoiser import MultilevelDenoiser
from mlem.multilevel.plan import Plan
from mlem.solvers import GridPoints, Solver, quadrature_weights
from mlem.trajectory import samples

__all__ = ["plan_samples"]


def plan_samples(family: Family, plan: Plan, solver: Solver, points: GridPoints, indices: Tensor, seed: int) -> Tensor:
    """The samples of a family under a plan with these indices (B,): (B, *shape), float64."""
    denoiser = MultilevelDenoiser(family, plan)
    denoiser.start(indices, quadrature_weights(solver, points.schedule, points)[0].tolist())
    return samples(denoiser, solver, points, family.shape, indices, seed, revise=denoiser.revise)
