"""Figures from plain numbers: curves, error by noise level, probabilities, strips of calls, scaling laws.

Numbers in, PNG out. `mlem.comparison.figures` has the figures of samplers; `style.py` the common style.
"""

from mlem.plots.law import scaling_law
from mlem.plots.lines import curves, error_by_noise_level, probabilities
from mlem.plots.trajectories import level_rates, trajectory_strips

__all__ = ["curves", "error_by_noise_level", "level_rates", "probabilities", "scaling_law", "trajectory_strips"]
