"""The starting point of learning: copies of the levels for forward mode, and the first coefficients."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from mlem.denoiser import NetworkDenoiser
from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.multilevel.coefficients import Coefficients
from mlem.multilevel.learning.law import Law
from mlem.multilevel.learning.optimum import PathPoint, least_variance, optimal_path
from mlem.multilevel.planner import make_plan
from mlem.multilevel.predict import Predictor
from mlem.multilevel.spec import PlanSpec
from mlem.solvers import GridPoint, Solver, quadrature_weights

__all__ = ["LARGEST", "first_coefficients", "frozen", "law_path", "nearest_coefficients"]

LARGEST = 0.99
"""Upper bound of p_k for the nearest coefficients: a certain coin gives no gradient."""


def frozen(family: Family, device: str | torch.device = "cpu") -> list[NetworkDenoiser]:
    """Copies of the levels for forward mode: in eval mode, without gradients, and in contiguous memory format.

    (torch's group norm has no forward mode in channels_last, or for transposed tensors from attention.) The family's
    own networks stay as they are.
    """
    denoisers: list[NetworkDenoiser] = []
    for level in family.levels:
        network = copy.deepcopy(level.network).eval().requires_grad_(False)
        network.to(device=device, memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        for part in network.modules():
            if isinstance(part, nn.GroupNorm):
                part.register_forward_pre_hook(lambda norm, given: (given[0].contiguous(),))
        denoisers.append(NetworkDenoiser(network, family.schedule, level.prediction, level.schedule))
    return denoisers


def nearest_coefficients(family: Family, solver: Solver, grid: TimeGrid, budget: float, knots: int = 0) -> Tensor:
    """theta (2 + knots, K - 1) closest, in the logit, to the probabilities for `budget`.

    These are the calibrated ones, or those of theory for an uncalibrated family. budget: share of the largest level's
    cost, in (0, 1], in FLOPs. Raises ValueError if it is too small.
    """
    law = "calibrated" if family.fitted.has("calibration") else "theory"
    names = tuple(family.names)
    spec = PlanSpec(budget=budget, probabilities=law, estimator="jump", coins="bernoulli", cost="flops", levels=names)
    table = make_plan(spec, family, solver, grid).probabilities.clone()
    table[:, 1:].clamp_(max=LARGEST)
    alpha, beta = Coefficients.fit(table, family.schedule, _times(family, solver, grid), knots)
    return _rounded(torch.cat([alpha.view(len(beta), -1)[1:].T, beta[None, 1:]]))


def first_coefficients(family: Family, solver: Solver, grid: TimeGrid, budget: float, knots: int = 0) -> Tensor:
    """The start of learning, theta (2 + knots, K - 1): least predicted error at the cost `budget`.

    For an uncalibrated family, `nearest_coefficients`. Arguments and errors as there.
    """
    nearest = nearest_coefficients(family, solver, grid, budget, knots)
    if not family.fitted.has("calibration"):
        return nearest
    return _rounded(least_variance(*_law(family, solver, grid, knots), nearest, budget))


def law_path(family: Family, solver: Solver, grid: TimeGrid, knots: int = 0, points: int = 16) -> list[PathPoint]:
    """The predicted errors of the best laws against their costs, without any network.

    At costs evenly spaced in the logarithm, from slightly above the first level's to 0.95 of the largest's; those that
    the form of the law cannot have are left out. Raises ValueError for a family without a calibration.
    """
    law, worth = _law(family, solver, grid, knots)
    least, most = (law.costs[0] / law.costs[-1]).item(), 0.95
    middle = math.sqrt(least * most)
    costs = torch.linspace(math.log(1.1 * least), math.log(most), points, dtype=torch.float64).exp().tolist()
    start = nearest_coefficients(family, solver, grid, middle, knots)
    return optimal_path(law, worth, start, costs)


def _law(family: Family, solver: Solver, grid: TimeGrid, knots: int) -> tuple[Law, Tensor]:
    """The law, and the errors (R, K - 1) from losing each correction alone."""
    predictor = Predictor(family.fitted.calibration_for(family), family.schedule, solver, grid)
    *corrections, _ = predictor.groups(family.names)
    worth = torch.stack([predictor.worth(one).square() for one in corrections], 1)
    flops = torch.tensor([level.flops for level in family.levels], dtype=torch.float64)
    return Law(family.schedule, _times(family, solver, grid), flops / flops[-1], seed=0, knots=knots), worth


def _rounded(theta: Tensor) -> Tensor:
    """theta to six decimals: last digits of linear algebra depend on memory alignment; a resumed run must match."""
    return theta.round(decimals=6)


def _times(family: Family, solver: Solver, grid: TimeGrid) -> list[float]:
    """Times of the evaluations."""
    points = GridPoint.of(family.schedule, grid)
    return [point.t for point in quadrature_weights(solver, family.schedule, points)[1]]
