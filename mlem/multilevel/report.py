"""The calibration report: cost of each level, its difference to the level below, and fitted rates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mlem.multilevel.calibration import Calibration
from mlem.multilevel.scaling import fit_differences

__all__ = ["missing", "report"]

WIDE = 0.25
"""Relative standard error above which the report suggests more images."""

if TYPE_CHECKING:
    from rich.console import Console


def report(found: Calibration, console: Console) -> None:
    """Print the measurements like a multilevel Monte Carlo report."""
    from rich.table import Table

    levels = Table(title=f"levels ({found.about.get('images')} trajectories, {found.about.get('device')})")
    batches = sorted(found.seconds)
    columns = ["level", "MFLOPs", *(f"ms/image, batch {size}" for size in batches)]
    columns += ["E|f^k - f^(k-1)|²", "E|f^K - f^k|²", "ODE error alone", "SDE error alone"]
    for column in columns:
        levels.add_column(column, justify="left" if column == "level" else "right")
    for k, name in enumerate(found.names):
        row = [name, f"{found.flops[k] / 1e6:.1f}", *(f"{1e3 * found.seconds[size][k]:.3f}" for size in batches)]
        step = f"{found.differences[:, k, k - 1].mean():.2e}" if k else ""
        row += [step, f"{found.differences[:, k, -1].mean():.2e}"]
        for kind in ("ode", "sde"):
            row.append(f"{missing(found, kind, k):.2e}" if k + 1 < len(found.names) else "0")
        levels.add_row(*row)
    console.print(levels)
    for size, outside in sorted(found.outside.items()):
        each = ", ".join(f"{1e3 * seconds:.3f} ms/image ({kind.upper()})" for kind, seconds in outside.items())
        console.print(f"Outside the networks a step takes {each} in batches of {size}.")
    console.print("Last two columns: mean squared error of a sample if this level runs alone, by linear response.")
    _discretisation(found, console)
    if len(found.names) > 2:
        fit = fit_differences(found.image_differences.numpy(), found.flops)
        console.print(f"scaling law from level differences, cost in FLOPs: {fit.verdict}")


def missing(found: Calibration, kind: str, level: int) -> float:
    """Mean squared error of a sample if `level` (its number, from 0) replaces the largest throughout."""
    response = found.responses[kind]
    kappa_log = -found.log_snr / 2
    width = torch.gradient(-kappa_log)[0]
    factor = (1.0 if kind == "ode" else 2.0) * response.gain[level:] * width
    return torch.einsum("kt,ktls,ls->", factor, response.inner[level:, :, level:], factor).item()


def _cell(error: float | None, trimmed: float | None) -> str:
    """An error, and where a few images outweigh the others, what it is without them; "" for none."""
    if error is None:
        return ""
    return f"{error:.1e}" + (f" ({trimmed:.1e})" if trimmed is not None and trimmed < error / 2 else "")


def _discretisation(found: Calibration, console: Console) -> None:
    from rich.table import Table

    steps = sorted({count for errors in found.discretisation.values() for count in errors})
    table = Table(title=f"mean squared error of level {found.names[-1]} alone, by steps")
    for column in ("solver/grid", *map(str, steps)):
        table.add_column(column, justify="left" if column == "solver/grid" else "right")
    cells = {
        name: [_cell(errors.get(count), found.trimmed.get(name, errors).get(count)) for count in steps]
        for name, errors in found.discretisation.items()
    }
    for name, row in cells.items():
        table.add_row(name, *row)
    console.print(table)
    if any("(" in cell for row in cells.values() for cell in row):
        console.print("In brackets: without the worst twentieth of the images, where less than half is left.")
    if (unsure := found.uncertainty) is not None:
        images = found.about.get("pilot_images")
        remedy = "; on more images: calibrate --until 20%" if unsure > WIDE else ""
        console.print(f"Standard errors over {images} images: at most {100 * unsure:.0f} percent{remedy}")
