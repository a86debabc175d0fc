"""A calibrated family in closed form, and what plans for it are predicted to do and do."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from mlem.denoiser import MixtureDenoiser
from mlem.family import Family
from mlem.level import Level
from mlem.multilevel.calibrate import measure
from mlem.multilevel.calibration import Calibration
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.plan import Plan
from mlem.multilevel.planner import make_plan
from mlem.multilevel.predict import Predictor
from mlem.multilevel.probes import plan_samples
from mlem.multilevel.spec import PlanSpec
from mlem.noise import reserved_indices
from mlem.schedule import NoiseSchedule
from mlem.solvers import GridPoint, make_solver
from mlem.trajectory import samples
from tests.problems import MEAN

COSINE = NoiseSchedule.cosine()


class Waves(nn.Module):
    """The exact noise estimate of a mild mixture, and waves in v: as with networks, the error stays bounded.

    size: makes the FLOPs rise, and changes nothing else.
    """

    def __init__(self, size: int, error: float, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(512, 3, generator=torch.Generator().manual_seed(seed))[:size])
        means, variances = torch.stack([MEAN / 4, -MEAN / 4]), torch.tensor([0.5, 0.4])
        self.error, self.exact = error, MixtureDenoiser(COSINE, torch.tensor([0.3, 0.7]), means, variances)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        t = (timestep.double() + 1) / 1000
        wave = torch.cos(0.5 * x @ self.weight[:3].T + self.weight[:3, 0]) + 0 * (x @ self.weight.T)[:, :3]
        return self.exact(x, t) + self.error * COSINE.alpha(t)[:, None] * wave


def level(number: int, error: float, seed: int) -> Level:
    return Level(str(number), Waves(8**number, error, seed), COSINE, (3,), "eps", "points")


def fitted(levels: list[Level], images: int) -> Family:
    """A family with its calibration; the solver errors of ddpm and ddim are made up."""
    family = Family(levels)
    measured = measure(
        [one.denoiser for one in levels], COSINE, (3,), reserved_indices("calibration", images), times=24
    )
    seconds = {8: tuple(0.1 * 4.0**k for k in range(len(levels))), 64: tuple(8.0**k for k in range(len(levels)))}
    flops = tuple(float(one.flops) for one in levels)
    about = {"images": images, "seed": 0, "device": "cpu", "weights": family.weights_hash}
    errors = {name: {16: 4e-7, 64: 1e-7} for name in ("ddpm/uniform", "ddim/uniform", "ddim/log_snr")}
    family.fitted = Fitted(Calibration(tuple(family.names), flops, seconds, *measured, about, errors))
    return family


@functools.cache
def family() -> Family:
    """Three levels; the top one is exact."""
    return fitted([level(1, 0.03, 1), level(2, 0.01, 2), level(3, 0.0, 3)], 128)


def predictor(solver: str = "ddpm", steps: int = 48, grid: str | None = None, of: Family | None = None) -> Predictor:
    method, of = make_solver(solver), of or family()
    return Predictor(of.fitted.calibration_for(of), COSINE, method, method.grid(COSINE, steps, grid))


def plan(solver: str, steps: int, **options: Any) -> Plan:
    method = make_solver(solver)
    return make_plan(PlanSpec(**{"cost": "flops"} | options), family(), method, method.grid(COSINE, steps))


def measured_error(plans: list[Plan], by: Predictor) -> float:
    """Mean squared distance to the top level with the same solver, on 256 samples that calibration has not seen."""
    index = reserved_indices("pilots", 256)
    points = GridPoint.of(COSINE, by.grid)
    truth = samples(family().level().denoiser, by.solver, points, (3,), index, 0)
    found = [plan_samples(family(), one, by.solver, points, index, 0) for one in plans]
    errors = [(x - truth).square().mean().item() for x in found]
    return sum(errors) / len(errors)


def every(stride: int, rows: int, columns: int = 3, **options: Any) -> Plan:
    """Corrections measured at every `stride`-th row."""
    return Plan.given((torch.arange(rows) % stride == 0)[:, None].expand(-1, columns), **options)
