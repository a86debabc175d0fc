"""Class-conditional networks whose laws are known: for each class, and for no class, a Gaussian of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mlem.family import Family
from mlem.level import Level
from mlem.sampling import sample
from mlem.schedule import NoiseSchedule

__all__ = [
    "CLASSES",
    "DEVIATIONS",
    "PATHS",
    "LabelledGaussian",
    "gaussian_factor",
    "labelled_family",
    "labels",
    "shrunk",
]

CLASSES = 3
DEVIATIONS = torch.tensor([0.5, 0.2, 1.5, 0.8], dtype=torch.float64)
"""Standard deviations of classes 0, 1, 2 and of no class."""


PATHS: dict[str, tuple[NoiseSchedule, str]] = {
    "vp": (NoiseSchedule.cosine(), "eps"),
    "edm": (NoiseSchedule.edm(), "edm"),
    "flow": (NoiseSchedule.flow(), "flow"),
}
"""Name -> noise schedule and prediction of its networks."""


class LabelledGaussian(nn.Module):
    """The exact network of N(0, deviation^2) of each label, in two dimensions, in float64.

    size: makes the FLOPs rise, by a term that is zero. factor: of all deviations, 1 for the true ones. path: a key of
    PATHS.
    """

    def __init__(self, size: int, factor: float, path: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, size, dtype=torch.float64))
        self.register_buffer("variances", (factor * DEVIATIONS).square())
        self._schedule, self._path = PATHS[path][0], path

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
        time, variance = time.double()[:, None], self.variances[class_labels][:, None]
        if self._path == "flow":
            # x = (1 - r) x_0 + r z, z - x_0
            r = time / 1000
            data = (1 - r) * variance * x / ((1 - r) ** 2 * variance + r**2)
            answer = r * x / ((1 - r) ** 2 * variance + r**2) - data
        elif self._path == "edm":
            kappa, y = torch.exp(4 * time), x * (torch.exp(8 * time) + 0.25).sqrt()
            answer = (variance / (variance + kappa**2) - 0.25 / (kappa**2 + 0.25)) * y
            answer = answer * (kappa**2 + 0.25).sqrt() / (0.5 * kappa)
        else:
            alpha, sigma = (scale[:, None] for scale in self._schedule.scales((time[:, 0] + 1) / 1000))
            answer = sigma * x / (alpha**2 * variance + sigma**2)
        return answer + (x @ self.weight).sum(1, keepdim=True)


def labelled_family(factors: Sequence[float] = (1.3, 1.0), path: str = "vp") -> Family:
    """Levels "1", "2", .. whose deviations are off by these factors; use it where the default dtype is float64."""
    schedule, prediction = PATHS[path]
    return Family(
        [
            Level(
                str(number),
                LabelledGaussian(4**number, factor, path),
                schedule,
                (2,),
                prediction,
                "points",
                conditions={"class_labels": CLASSES},
            )
            for number, factor in enumerate(factors, 1)
        ]
    )


def labels(values: Sequence[int]) -> Callable[[Tensor], dict[str, Tensor]]:
    """Conditions: these labels, in turn."""
    return lambda indices: {"class_labels": torch.tensor(values)[indices % len(values)]}


def gaussian_factor(
    deviation: float, power: float = 1.0, low: float = 0.0, high: float | None = None, path: str = "vp"
) -> Tensor:
    """What y shrinks by from kappa = high to low where `dy/dkappa = power kappa y / (deviation^2 + kappa^2)`.

    So it does for the exact estimate of N(0, deviation^2) times `power`. high: by default where sampling begins.
    """
    begin = PATHS[path][0].kappa(1.0).item() if high is None else high
    return torch.tensor((deviation**2 + low**2) / (deviation**2 + begin**2)) ** (power / 2)


def shrunk(family: Family, value: int) -> Tensor:
    """By what factor the solution of the ODE shrinks y, for samples of class `value`: of all numbers, (5, 2)."""
    # even in r, a flow's own grid begins in pure noise; the others have their ends in log-SNR
    grid = "flow" if family.schedule.ends_in_noise else None
    options = {"solver": "heun", "steps": 240, "grid": grid, "conditions": labels([value])}
    found = sample(family, indices=range(5), return_noise=True, **options)
    assert found.x_T is not None
    return found.x / (found.x_T / family.schedule.alpha(1.0))
