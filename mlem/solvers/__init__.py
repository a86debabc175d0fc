"""Solvers, one file each; `make_solver("ddim")` finds them by name. What a solver is stands in `base.py`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from typing import Any

from mlem.solvers.base import (
    SOLVERS,
    EvaluationPoint,
    GridPoint,
    GridPoints,
    NoiseEstimate,
    Solver,
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
    "Solver",
    "make_solver",
    "model_input",
    "quadrature_weights",
]


def make_solver(name: str | Solver, **options: Any) -> Solver:
    """The solver called `name` with its options, or the solver given. Raises ValueError with the nearest name."""
    if isinstance(name, Solver):
        return name
    if name not in SOLVERS:
        near = difflib.get_close_matches(name, SOLVERS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"solver must be one of {', '.join(sorted(SOLVERS))}, got {name!r}{hint}")
    known = [key for key in inspect.signature(SOLVERS[name]).parameters if key not in ("args", "kwargs")]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"{name} has no option {unknown[0]!r}; {_listed(known)}")
    return SOLVERS[name](**options)


def _listed(options: list[str]) -> str:
    return f"its options are {', '.join(options)}" if options else "it has none"
