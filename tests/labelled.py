"""Class-conditional networks whose laws are known: for each class, and for no class, a Gaussian of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mlem.family import Family
from mlem.level import Level
from mlem.sampling import sample
from mlem.schedule import NoiseSchedule

__all__ = ["CLASSES", "DEVIATIONS", "LabelledGaussian", "gaussian_factor", "labelled_family", "labels", "shrunk"]

CLASSES = 3
DEVIATIONS = torch.tensor([0.5, 0.2, 1.5, 0.8], dtype=torch.float64)
"""Standard deviations of classes 0, 1, 2 and of no class."""


class LabelledGaussian(nn.Module):
    """The exact noise estimate of N(0, deviation^2) of each label, in two dimensions, in float64.

    size: makes the FLOPs rise, by a term that is zero. factor: of all deviations, 1 for the true ones.
    """

    def __init__(self, size: int, factor: float, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, size, dtype=torch.float64))
        self.register_buffer("variances", (factor * DEVIATIONS).square())
        self._schedule = schedule

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        alpha, sigma = self._schedule.scales((timestep.double() + 1) / 1000)
        variance = alpha**2 * self.variances[class_labels] + sigma**2
        return (sigma / variance)[:, None] * x + (x @ self.weight).sum(1, keepdim=True)


def labelled_family(factors: Sequence[float] = (1.3, 1.0), schedule: NoiseSchedule | None = None) -> Family:
    """Levels "1", "2", .. whose deviations are off by these factors; use it where the default dtype is float64."""
    schedule = schedule or NoiseSchedule.cosine()
    return Family(
        [
            Level(
                str(number),
                LabelledGaussian(4**number, factor, schedule),
                schedule,
                (2,),
                "eps",
                "points",
                conditions={"class_labels": CLASSES},
            )
            for number, factor in enumerate(factors, 1)
        ]
    )


def labels(values: Sequence[int]) -> Callable[[Tensor], dict[str, Tensor]]:
    """Conditions: these labels, in turn."""
    return lambda indices: {"class_labels": torch.tensor(values)[indices % len(values)]}


def gaussian_factor(deviation: float, power: float = 1.0, low: float = 0.0, high: float | None = None) -> Tensor:
    """What y shrinks by from kappa = high to low where `dy/dkappa = power kappa y / (deviation^2 + kappa^2)`.

    So it does for the exact estimate of N(0, deviation^2) times `power`. high: by default where sampling begins.
    """
    begin = NoiseSchedule.cosine().kappa(1.0).item() if high is None else high
    return torch.tensor((deviation**2 + low**2) / (deviation**2 + begin**2)) ** (power / 2)


def shrunk(family: Family, value: int) -> Tensor:
    """By what factor the solution of the ODE shrinks y, for samples of class `value`: of all numbers, (5, 2)."""
    found = sample(family, indices=range(5), steps=240, solver="heun", conditions=labels([value]), return_noise=True)
    assert found.x_T is not None
    return found.x / (found.x_T / family.schedule.alpha(1.0))
