"""Forecasts of the largest level alone, as calibrations measure them and recommendations consider them."""

from __future__ import annotations

from dataclasses import dataclass

from mlem.multilevel.plan import Plan

__all__ = ["FORECASTS", "Ahead"]


@dataclass(frozen=True)
class Ahead:
    """The level runs at steps 0, N, 2 N, .., and its outputs are extrapolated in between; see `Plan.forecast`.

    Args:
        every: N.
        order: of the polynomial.
    """

    every: int
    order: int

    def __str__(self) -> str:
        return f"forecast every {self.every}, order {self.order}"

    def plan(self, level: str, steps: int) -> Plan:
        """For this level and so many steps of one evaluation."""
        return Plan.forecast([row % self.every == 0 for row in range(steps)], level, order=self.order)


FORECASTS = (Ahead(2, 1), Ahead(2, 2))
"""Kinds of forecasts whose errors are measured, with UniPC."""
