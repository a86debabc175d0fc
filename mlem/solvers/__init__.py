"""Solvers, one file each; `make_solver("ddim")` finds them by name. `base.py` defines what a solver is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable

from mlem.arguments import hint
from mlem.solvers.base import (
    SOLVERS,
    EvaluationPoint,
    GridPoint,
    GridPoints,
    NoiseEstimate,
    ScatteredPoints,
    Solver,
    denoiser_at,
    model_input,
    quadrature_weights,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "SOLVERS",
    "EvaluationPoint",
    "GridPoint",
    "GridPoints",
    "NoiseEstimate",
    "ScatteredPoints",
    "Solver",
    "denoiser_at",
    "make_solver",
    "model_input",
    "quadrature_weights",
]


def make_solver(name: str | Solver, **options: object) -> Solver:
    """A solver by its name.

    Args:
        name: a key of `SOLVERS`, or a solver, returned unchanged.
        options: arguments of the solver's class, such as `clock="ou"`.

    Raises: ValueError, suggesting the nearest match, for an unknown name or option.
    """
    if isinstance(name, Solver):
        return name
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(sorted(SOLVERS))}, got {name!r}{hint(name, SOLVERS)}")
    known = [key for key in inspect.signature(SOLVERS[name]).parameters if key not in ("args", "kwargs")]
    if unknown := sorted(options.keys() - set(known)):
        listed = f"its options are {', '.join(known)}" if known else "it has none"
        raise ValueError(f"{name} has no option {unknown[0]!r}; {listed}{hint(unknown[0], known)}")
    make: Callable[..., Solver] = SOLVERS[name]
    return make(**options)
