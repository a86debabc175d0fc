"""Ways to sample, as they are predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlem.multilevel.plan import Plan
from mlem.networks import Reuse

__all__ = ["SURE", "WIDE", "Candidate", "Recommendation"]

SURE = 1.28
"""Standard errors above the prediction at which a target counts as reached: nine times in ten."""
WIDE = 1.96
"""Standard errors on either side of an interval: 95 percent."""


@dataclass(frozen=True)
class Candidate:
    """One way to sample; `sample(family, **candidate.options)` goes it.

    Args:
        solver, steps, grid: as `sample` has them.
        level: the level that runs alone; None: the plan runs several.
        plan: None: one level runs alone.
        reuse: of the deep features of the largest level; None: it runs whole.
        predicted_mse: mean squared error per pixel to the many-step run of the largest level from the same noise.
        interval: 95 percent, of that.
        predicted_seconds: wall seconds an image, in batches of the size that was asked for.
        extrapolated: whether its steps are fewer or more than any that were measured.
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
        """The error that it stays below nine times in ten."""
        return self.predicted_mse * (self.interval[1] / self.predicted_mse) ** (SURE / WIDE)

    def __str__(self) -> str:
        what = self.level if self.plan is None else f"{self.plan.estimator} of {', '.join(self.plan.levels)}"
        kept = "" if self.reuse is None else f", features reused ({self.reuse})"
        return f"{self.solver}, {self.steps} steps on the {self.grid} grid, {what}{kept}"


@dataclass(frozen=True)
class Recommendation(Candidate):
    """The candidate to run.

    Args:
        alternatives: the other candidates, the best one of each kind, best first.
        why: one line.
    """

    alternatives: tuple[Candidate, ...] = ()
    why: str = ""
