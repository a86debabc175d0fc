"""Solvers, one file each; `make_solver("ddim")` finds them by name. What a solver is stands in `base.py`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from mlem.solvers.base import SOLVERS, Estimate, Place, Point, Solver, model_input, response

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["SOLVERS", "Estimate", "Place", "Point", "Solver", "make_solver", "model_input", "response"]


def make_solver(name: str | Solver) -> Solver:
    """The solver called `name`, or the given solver itself. Raises ValueError with the nearest name."""
    if isinstance(name, Solver):
        return name
    if name not in SOLVERS:
        near = difflib.get_close_matches(name, SOLVERS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"solver must be one of {', '.join(sorted(SOLVERS))}, got {name!r}{hint}")
    return SOLVERS[name]()
