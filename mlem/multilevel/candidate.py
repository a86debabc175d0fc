"""Candidates for sampling, with their predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlem.multilevel.plan import Plan
from mlem.networks import Reuse

__all__ = ["SURE", "WIDE", "Candidate", "Check", "Recommendation"]

SURE = 1.28
"""Standard errors above the prediction at which a target counts as reached: nine times in ten."""
WIDE = 1.96
"""Standard errors on either side of an interval: 95 percent."""


@dataclass(frozen=True)
class Candidate:
    """One way to sample; `sample(family, **candidate.options)` runs it.

    Args:
        solver, steps, grid: as in `sample`.
        level: the level that runs alone; None: the plan runs several.
        plan: None: one level runs alone.
        reuse: of the deep features of the largest level; None: it runs whole.
        predicted_mse: mean squared error per pixel to the many-step run of the largest level from the same noise.
        interval: in which the error over as many images as were measured lies 95 times in 100.
        predicted_seconds: wall-clock seconds per image, at the requested batch size.
        extrapolated: whether its number of steps is outside the measured range.
    """

    solver: str
    steps: int
    grid: str
    level: str | None
    plan: Plan | None
    predicted_mse: float
    interval: tuple[float, float]
    predicted_seconds: float
    extrapolated: bool = False
    reuse: Reuse | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `sample`."""
        own: dict[str, Any] = {"solver": self.solver, "steps": self.steps, "grid": self.grid}
        own |= {"level": self.level} if self.plan is None else {"plan": self.plan}
        return own if self.reuse is None else own | {"reuse": self.reuse}

    @property
    def upper_mse(self) -> float:
        """The error below which it stays nine times in ten."""
        return self.predicted_mse * (self.interval[1] / self.predicted_mse) ** (SURE / WIDE)

    def __str__(self) -> str:
        what = self.level if self.plan is None else f"{self.plan.estimator} of {', '.join(self.plan.levels)}"
        kept = "" if self.reuse is None else f", features reused ({self.reuse})"
        return f"{self.solver}, {self.steps} steps on the {self.grid} grid, {what}{kept}"


@dataclass(frozen=True)
class Check:
    """What a candidate was measured to do.

    Args:
        images: number of samples.
        mse: mean squared error per pixel to the many-step run of the largest level from the same noise.
        stderr: its standard error.
    """

    images: int
    mse: float
    stderr: float

    @property
    def interval(self) -> tuple[float, float]:
        """In which the mean over all images lies 95 times in 100."""
        return max(0.0, self.mse - WIDE * self.stderr), self.mse + WIDE * self.stderr

    @property
    def upper_mse(self) -> float:
        """The error below which it stays nine times in ten."""
        return self.mse + SURE * self.stderr


@dataclass(frozen=True)
class Recommendation(Candidate):
    """The candidate to run.

    Args:
        check: how it was measured before it was recommended; None: it was not.
        alternatives: the other candidates, the best one of each kind, best first.
        why: one line.
    """

    alternatives: tuple[Candidate, ...] = ()
    why: str = ""
    check: Check | None = None
