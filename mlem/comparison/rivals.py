"""Recommendations for a list of errors, measured together with their rivals, and the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlem.comparison.coupled import Comparison
from mlem.comparison.entry import Entry
from mlem.comparison.fastest import RECOMMENDED, Advice, Alternative, Fastest, Measured
from mlem.comparison.row import Row
from mlem.comparison.setup import Run
from mlem.multilevel.candidate import Candidate, Recommendation
from mlem.multilevel.plan import Plan
from mlem.provenance import machine

__all__ = ["advice_of", "fastest", "recommended"]


def recommended(choice: Recommendation, target: float) -> Entry:
    """The recommendation for this error, as an entry of a comparison."""
    own: dict[str, Any] = {"levels": (choice.level,)} if choice.plan is None else {"made": choice.plan}
    own |= {"name": f"{RECOMMENDED}, mse {target:g}", "rival": RECOMMENDED, "reuse": choice.reuse}
    return Entry(choice.solver, (choice.steps,), choice.grid, **own)


def fastest(
    comparison: Comparison,
    runs: Sequence[Run],
    advice: Mapping[float, Recommendation],
    targets: Sequence[float],
    kind: str,
    source: str,
) -> Fastest:
    """The rows of these runs, with the recommendation for the middle one of the targets that have one.

    Args:
        advice: by target.
        targets: mean squared errors.
        kind: "ode" or "sde".
        source: of the family, as `family=` names it.
    """
    setup, falling = comparison.setup, sorted(targets, reverse=True)
    about = {"family": comparison.family.data, "source": source, "kind": kind}
    about |= {"images": setup.count, "batch_size": len(setup.blocks[0])}
    references = " and ".join(dict.fromkeys(run.solver.reference for run in runs))
    about |= {"machine": machine(), "reference": f"{references}, {setup.reference_steps} steps"}
    about |= {"levels": comparison.family.names, "caption": comparison.caption}
    rows = [_measured(run, row) for run in runs if (row := comparison.row(run)) is not None]
    known = [target for target in falling if target in advice]
    middle = known[len(known) // 2] if known else None
    told = None if middle is None else advice_of(advice[middle], middle)
    return Fastest(about, tuple(rows), told, tuple(falling))


def _measured(run: Run, row: Row) -> Measured:
    group = row.rival or row.sampler
    detail = row.sampler.removeprefix(group).removeprefix(", ")
    solver = run.solver.name if run.reuse is not None else row.solver  # its name includes the reuse
    calls = {name: count for name, count in row.calls.items() if count > 0}
    return Measured(group, solver, row.grid, row.steps, detail, row.seconds, row.mse, row.mse_stderr, calls)


def advice_of(choice: Recommendation, target: float) -> Advice:
    """The recommendation for this error, as plain data."""
    own = choice.options
    options: dict[str, Any] = {name: value for name, value in own.items() if not isinstance(value, Plan)}
    if choice.plan is not None:
        options["plan"] = {"estimator": choice.plan.estimator, "levels": list(choice.plan.levels)}
    others = tuple(Alternative(**_expected(one)) for one in choice.alternatives)
    return Advice(**_expected(choice), target=target, why=choice.why, options=options, alternatives=others)


def _expected(one: Candidate) -> dict[str, Any]:
    numbers = {"mse": one.predicted_mse, "interval": one.interval, "seconds": one.predicted_seconds}
    return {"text": str(one)} | numbers
