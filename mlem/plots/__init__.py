"""The figures of numbers alone: curves, error by noise level, probabilities, scaling laws. Numbers in, PNG out.

Figures of samplers are in `mlem.comparison.figures`; how all of them look is in `style.py`.
"""

from mlem.plots.law import scaling_law
from mlem.plots.lines import curves, error_by_noise_level, probabilities

__all__ = ["curves", "error_by_noise_level", "probabilities", "scaling_law"]
