"""Learning the coefficients of a family: the objective, its gradient, and the starting point."""

from mlem.multilevel.learning.objective import TANGENTS, GradientEstimate, Objective, interval
from mlem.multilevel.learning.optimum import PathPoint, optimal_path
from mlem.multilevel.learning.response import Response
from mlem.multilevel.learning.reverse import first_order
from mlem.multilevel.learning.start import (
    first_coefficients,
    frozen,
    law_path,
    nearest_coefficients,
    objective_for,
)

__all__ = [
    "TANGENTS",
    "GradientEstimate",
    "Objective",
    "PathPoint",
    "Response",
    "first_coefficients",
    "first_order",
    "frozen",
    "interval",
    "law_path",
    "nearest_coefficients",
    "objective_for",
    "optimal_path",
]
