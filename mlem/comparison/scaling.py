"""The scaling law of a trained family ([J], Fig. 2): both fits, a figure, and a text summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlem.conditions import of_labels
from mlem.family import Family
from mlem.metrics.denoising import denoising_errors
from mlem.multilevel.scaling import ScalingFit, fit_differences, fit_errors
from mlem.networks import evaluating
from mlem.plots import scaling_law

__all__ = ["ERRORS", "costs_of", "draw_scaling", "held_out_errors", "plain_fits", "scaling_fits"]

ERRORS = "denoising error - floor"
"""Name of the fit of floor and gamma jointly."""


def held_out_errors(
    family: Family,
    images: Tensor,
    index: Tensor,
    seed: int = 0,
    batch_size: int = 256,
    labels: Tensor | None = None,
) -> np.ndarray:
    """Mean squared error of the noise estimate of each level on each image: (K, N), all levels from the same noise.

    Args:
        family: of K levels.
        images: (N, C, H, W), in [-1, 1].
        index: (N,); keys the noise, as in the test of a family after training.
        seed: of the noise.
        batch_size: images per batch.
        labels: (N,), if images have them.
    """
    whole = {"image": images, "index": index} | ({} if labels is None else {"label": labels})
    table = []
    for level in family.levels:
        parts = []
        with torch.inference_mode(), evaluating(level.network):
            for rows in torch.arange(len(images)).split(batch_size):
                part = {name: values[rows] for name, values in whole.items()}
                denoiser = level.denoiser.given(of_labels(level.conditions, part))
                errors = denoising_errors(denoiser, denoiser.schedule, part["image"], part["index"], seed)
                parts.append(torch.stack(list(errors.values())).mean(0))
        table.append(torch.cat(parts).double())
    return torch.stack(table).numpy()


def costs_of(family: Family, unit: str) -> list[float]:
    """FLOPs or seconds per image of each level. Raises ValueError if seconds were not measured."""
    if unit == "flops":
        return [float(level.flops) for level in family.levels]
    missing = [level.name for level in family.levels if "seconds" not in level.measured]
    if missing:
        raise ValueError(f"level {missing[0]} was not timed in training; use cost=flops")
    return [float(level.measured["seconds"]) for level in family.levels]


def scaling_fits(
    family: Family, errors: np.ndarray, unit: str = "flops", replicates: int = 1000
) -> dict[str, ScalingFit]:
    """Floor and gamma jointly, from `held_out_errors`; and gamma from the calibrated level differences, if any.

    Raises ValueError for fewer than 3 levels.
    """
    costs = costs_of(family, unit)
    fits = {ERRORS: fit_errors(errors, costs, replicates)}
    if family.fitted.calibrated(family):
        differences = family.fitted.calibration_for(family).image_differences.numpy()
        fits["level differences"] = fit_differences(differences, costs, replicates)
    return fits


def draw_scaling(
    family: Family, fits: dict[str, ScalingFit], images: int, path: Path, unit: str = "flops"
) -> list[str]:
    """Draw the fits. Returns one line each, starting with "warning: " if gamma is not above 2."""
    steps = ", ".join(f"{level.name} {level.measured.get('steps', '?')}" for level in family.levels)
    caption = f"{family.data}, {images} held-out images; training steps: {steps}; 95 percent bootstrap bands"
    words = {"flops": "FLOPs", "seconds": "seconds"}[unit]
    scaling_law({name: fit.curve() for name, fit in fits.items()}, path, caption, f"{words} per image")
    lines = []
    for name, fit in fits.items():
        # the errors do not level off: a floor and a power law cannot be distinguished
        bounded = name == ERRORS and fit.floor_interval[0] < 1e-3 * fit.values.min()
        warning = "" if 2 < fit.gamma < np.inf and not bounded else "warning: "
        doubt = "; but the floor is at its bound, 0, so this gamma says little" if bounded else ""
        lines.append(f"{warning}scaling law, {name}: {fit.verdict}{doubt}")
    return lines


def plain_fits(fits: dict[str, ScalingFit], names: Sequence[str]) -> dict[str, Any]:
    """The fits as plain data, for JSON: None for an infinite gamma."""

    def finite(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    return {
        name: {
            "levels": list(names[-len(fit.costs) :]),
            "costs": fit.costs.tolist(),
            "values": fit.values.tolist(),
            "gamma": finite(fit.gamma),
            "gamma_interval": [finite(end) for end in fit.gamma_interval],
            "gamma_plotted": finite(fit.gamma_plotted),
            "floor": fit.floor,
            "floor_interval": list(fit.floor_interval),
        }
        for name, fit in fits.items()
    }
