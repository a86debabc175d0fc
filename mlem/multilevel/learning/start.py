"""The starting point of learning: the levels to learn for, the first coefficients, and the objective of a family.

Levels that are not worth their cost are left out, as by a calibrated plan: among the subsets that contain the largest
level, the one whose best law is predicted to err least at the cost asked for. No network is evaluated.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mlem.conditions import conditions_of
from mlem.denoiser import NetworkDenoiser
from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.multilevel.coefficients import Coefficients
from mlem.multilevel.learning.chance import CHANCES
from mlem.multilevel.learning.law import Law
from mlem.multilevel.learning.objective import Objective, refuse_one_level
from mlem.multilevel.learning.optimum import PathPoint, least_variance, optimal_path
from mlem.multilevel.learning.response import Response
from mlem.multilevel.planner import make_plan
from mlem.multilevel.predict import Predictor
from mlem.multilevel.spec import PlanSpec
from mlem.solvers import GridPoint, Solver, quadrature_weights

__all__ = ["LARGEST", "first_coefficients", "frozen", "law_path", "nearest_coefficients", "objective_for"]

LARGEST = 0.99
"""Upper bound of p_k for the nearest coefficients: a certain coin gives no gradient."""
_EXACT = 1e-4
"""Tolerance on the cost of laws that are compared."""


def frozen(
    family: Family, device: str | torch.device = "cpu", levels: Sequence[str] | None = None
) -> list[NetworkDenoiser]:
    """Copies of these levels, or all, for forward mode: in eval mode, without gradients, in contiguous memory format.

    (torch's group norm has no forward mode in channels_last, or for transposed tensors from attention.) The family's
    own networks stay as they are.
    """
    denoisers: list[NetworkDenoiser] = []
    for level in map(family.level, levels or family.names):
        network = copy.deepcopy(level.network).eval().requires_grad_(False)
        network.to(device=device, memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        for part in network.modules():
            if isinstance(part, nn.GroupNorm):
                part.register_forward_pre_hook(lambda norm, given: (given[0].contiguous(),))
        denoisers.append(NetworkDenoiser(network, family.schedule, level.prediction, level.schedule))
    return denoisers


def objective_for(
    family: Family,
    solver: Solver,
    grid: TimeGrid,
    levels: Sequence[str],
    *,
    seed: int = 0,
    coins: str = "bernoulli",
    knots: int = 0,
) -> Objective:
    """J for these levels of a family, in FLOPs, with linear response as the control variate if it is calibrated."""
    used = [family.level(name) for name in levels]
    return Objective(
        frozen(family, levels=levels),
        family.schedule,
        family.shape,
        solver,
        grid,
        _flops(family, levels),
        seed=seed,
        coins=coins,
        response=Response.of(family, solver, grid, levels),
        conditions=lambda indices: conditions_of(used, None, indices),
        knots=knots,
    )


def nearest_coefficients(
    family: Family,
    solver: Solver,
    grid: TimeGrid,
    budget: float,
    knots: int = 0,
    levels: Sequence[str] | None = None,
) -> Tensor:
    """theta (2 + knots, K - 1) closest, in the logit, to the probabilities for `budget`.

    These are the calibrated ones, or those of theory for an uncalibrated family.

    Args:
        budget: share of the largest level's cost, in (0, 1], in FLOPs.
        levels: K names, cheapest first; None: all.

    Raises:
        ValueError: the budget is too small.
    """
    law = "calibrated" if family.fitted.has("calibration") else "theory"
    names = tuple(levels or family.names)
    spec = PlanSpec(budget=budget, probabilities=law, estimator="jump", coins="bernoulli", cost="flops", levels=names)
    table = make_plan(spec, family, solver, grid).probabilities.clone()
    table[:, 1:].clamp_(max=LARGEST)
    alpha, beta = Coefficients.fit(table, family.schedule, _times(family, solver, grid), knots)
    return _rounded(torch.cat([alpha.view(len(beta), -1)[1:].T, beta[None, 1:]]))


def first_coefficients(
    family: Family,
    solver: Solver,
    grid: TimeGrid,
    budget: float,
    knots: int = 0,
    levels: Sequence[str] | None = None,
    coins: str = "bernoulli",
) -> tuple[tuple[str, ...], Tensor]:
    """The start of learning, of least predicted error at the cost `budget`: names of levels, and their theta.

    Args:
        budget: share of the largest level's cost, in (0, 1], in FLOPs.
        levels: names, cheapest first; None: the subset with the largest level that is predicted best, or, for an
            uncalibrated family, all.
        coins: for which subsets are compared.

    Raises:
        ValueError: the budget is too small, or the family has one level.
    """
    refuse_one_level(len(levels or family.names))
    asked, names = (family, solver, grid, budget, knots), tuple(family.names)
    if not family.fitted.has("calibration"):
        names = tuple(levels or names)
        return names, nearest_coefficients(*asked, names)
    predictor = Predictor(family.fitted.calibration_for(family), family.schedule, solver, grid)
    found: list[tuple[float, float, tuple[str, ...], Tensor]] = []
    for subset in _subsets(names) if levels is None else [tuple(levels)]:
        law, worth = _law(family, predictor, subset, knots)
        if levels is None and subset != names and law.costs[0].item() >= budget:
            continue
        theta = least_variance(law, worth, nearest_coefficients(*asked, subset), budget)
        missed = max(_EXACT, abs(law.cost(theta).item() - budget))  # not every law can have every cost
        found.append((missed, _predicted(law, theta, predictor, subset, coins), subset, theta))
    _, _, best, theta = min(found, key=lambda one: one[:2])
    return best, _rounded(theta)


def law_path(family: Family, solver: Solver, grid: TimeGrid, knots: int = 0, points: int = 16) -> list[PathPoint]:
    """The predicted errors of the best laws against their costs, each on its best levels, without any network.

    At costs evenly spaced in the logarithm, from slightly above the first level's to 0.95 of the largest's; those that
    the form of the law cannot have are left out. Raises ValueError for a family without a calibration, or of one level.
    """
    refuse_one_level(len(family.names))
    predictor = Predictor(family.fitted.calibration_for(family), family.schedule, solver, grid)
    most, best = 0.95, dict[float, PathPoint]()
    ends = math.log(1.1 * _flops(family, family.names)[0].item()), math.log(most)
    costs = torch.linspace(*ends, points, dtype=torch.float64).exp().tolist()
    for levels in _subsets(family.names):
        law, worth = _law(family, predictor, levels, knots)
        least = law.costs[0].item()
        if not (within := [cost for cost in costs if cost > least]):
            continue
        start = nearest_coefficients(family, solver, grid, math.sqrt(least * most), knots, levels)
        for point in optimal_path(law, worth, start, within):
            place = min(costs, key=lambda cost: abs(cost - point.cost))
            if place not in best or point.error < best[place].error:
                best[place] = replace(point, levels=levels)
    return [best[cost] for cost in costs if cost in best]


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The sets of at least two levels with the largest, all of them first."""
    *smaller, largest = names
    for size in range(len(smaller), 0, -1):
        yield from ((*part, largest) for part in itertools.combinations(smaller, size))


def _law(family: Family, predictor: Predictor, levels: Sequence[str], knots: int) -> tuple[Law, Tensor]:
    """The law of these levels, and the errors (R, K - 1) from losing each correction alone."""
    *corrections, _ = predictor.groups(levels)
    worth = torch.stack([predictor.worth(one).square() for one in corrections], 1)
    times = [point.t for point in predictor.evaluations]
    return Law(family.schedule, times, _flops(family, levels), seed=0, knots=knots), worth


def _predicted(law: Law, theta: Tensor, predictor: Predictor, levels: Sequence[str], coins: str) -> float:
    """The error that these coins are predicted to add on average."""
    response = Response.predicted(predictor, levels)
    return CHANCES[coins](law.seed).expected(law, theta, response.matrix)[0].item()


def _flops(family: Family, levels: Sequence[str]) -> Tensor:
    """Costs of one evaluation of these levels, the last of which is 1."""
    flops = torch.tensor([family.level(name).flops for name in levels], dtype=torch.float64)
    return flops / flops[-1]


def _rounded(theta: Tensor) -> Tensor:
    """theta to six decimals: last digits of linear algebra depend on memory alignment; a resumed run must match."""
    return theta.round(decimals=6)


def _times(family: Family, solver: Solver, grid: TimeGrid) -> list[float]:
    """Times of the evaluations."""
    points = GridPoint.of(family.schedule, grid)
    return [point.t for point in quadrature_weights(solver, family.schedule, points)[1]]
