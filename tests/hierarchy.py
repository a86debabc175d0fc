"""Small hierarchies of denoisers, and one trajectory under a plan."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlem.brownian import BrownianPath
from mlem.denoiser import Denoiser
from mlem.family import Family
from mlem.multilevel.denoiser import MultilevelDenoiser
from mlem.multilevel.plan import Plan
from mlem.schedule import NoiseSchedule
from mlem.solvers import EvaluationPoint, GridPoint, make_solver, model_input, quadrature_weights
from tests.problems import closed_family, level

COSINE = NoiseSchedule.cosine()
TIMES = [1.0, 0.7, 0.45, 0.2, 0.05]
TABLE = torch.tensor([[1.0, 0.5, 0.2], [0.8, 0.6, 0.6], [1.0, 1.0, 0.3]], dtype=torch.float64)
HELD: list[dict[str, Any]] = [
    {"estimator": "held", "order": 0},
    {"estimator": "held", "order": 1},
    {"estimator": "hindsight", "order": 0},
    {"estimator": "hindsight", "order": 1},
]
ALL: list[dict[str, Any]] = [{"estimator": "jump"}, *HELD]


def denoisers(count: int = 3) -> list[Denoiser]:
    """Levels of different accuracy, float64."""
    return [one.denoiser for one in closed_family((0.5, 0.2, 0.05)[:count]).levels]


def noise(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(t: float, batch: int) -> Tensor:
    return torch.full((batch,), t, dtype=torch.float64)


def call(multilevel: MultilevelDenoiser, x: Tensor, times: Sequence[float]) -> Tensor:
    """One call for each time, at the same x: (R, B, 3)."""
    return torch.stack([multilevel(x, at(t, len(x))) for t in times])


def trajectory(
    levels: Sequence[Denoiser], plan: Plan | None, solver_name: str, steps: int, batch: int = 16
) -> tuple[Tensor, Tensor]:
    """y at the end and what it began with, float64; without a plan, of the top level alone."""
    solver = make_solver(solver_name)
    points = GridPoint.of(COSINE, solver.grid(COSINE, steps, "log_snr"))
    y, index = noise(batch) / points[0].alpha, torch.arange(batch)
    estimate, revise = levels[-1], None
    if plan is not None:
        multilevel = estimate = MultilevelDenoiser(levels, plan, schedule=COSINE)
        hindsight = plan.estimator == "hindsight"
        multilevel.start(index, quadrature_weights(solver, COSINE, points)[0].tolist() if hindsight else None)
        revise = multilevel.revise if hindsight else None

    def eps(y: Tensor, place: EvaluationPoint) -> Tensor:
        return estimate(*model_input(COSINE, y, place))

    path = BrownianPath(COSINE, 0, index, (3,), torch.float64)
    return solver.integrate(eps, y, points, path, index, 0, revise=revise), y


@functools.cache
def networks() -> Family:
    """Untrained levels xs and s, float32."""
    return Family([level("xs"), level("s", seed=1)])


def measured(rows: int, *places: Sequence[int], **options: Any) -> Plan:
    table = torch.zeros(rows, len(places) + 1, dtype=torch.bool)
    for number, ones in enumerate(places, 1):
        table[list(ones), number] = True
    return Plan.given(table, **options)
