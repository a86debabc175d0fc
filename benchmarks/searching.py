"""The time of the search for a plan, and the predicted error of the plan.

    python benchmarks/searching.py [FAMILY ...] [--out FILE] [--against FILE]

For families in closed form, of two levels with costs 1 : 16 and of four with 1 : 4 : 16 : 64, and for the calibrated
families named. With `--against`, also the ratio of errors to those predicted in an earlier run.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

from synthetic import HIERARCHIES, measured, synthetic

from mlem.family import Family
from mlem.files import write_json
from mlem.multilevel.planner import make_plan
from mlem.multilevel.spec import PlanSpec
from mlem.provenance import processor
from mlem.solvers import make_solver

BUDGETS = (0.15, 0.25, 0.5)


def row_of(name: str, family: Family, solver_name: str, steps: int, budget: float) -> dict[str, Any]:
    """One search: its time, and the levels, cost and predicted error of its plan."""
    solver = make_solver(solver_name)
    grid = solver.grid(family.schedule, steps, None)
    begin = time.perf_counter()
    plan = make_plan(PlanSpec(budget=budget, cost="flops"), family, solver, grid)
    seconds = time.perf_counter() - begin
    row = {"family": name, "solver": solver_name, "steps": steps, "budget": budget, "seconds": round(seconds, 3)}
    return row | {"levels": list(plan.levels), "cost": plan.about["cost"], "mse": plan.about["predicted_mse_of_plan"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", type=Path, help="folders of calibrated families")
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 64, 200, 1000])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("searching.json"))
    parser.add_argument("--against", type=Path, help="what an earlier run wrote")
    options = parser.parse_args()
    families = {name.replace("-", " "): measured(synthetic(name)) for name in HIERARCHIES}
    loaded = [Family.load(folder) for folder in options.families]
    families |= {family.data: family for family in loaded}
    rows: list[dict[str, Any]] = []
    for steps, (name, family), solver, budget in itertools.product(
        options.steps, families.items(), ("ddpm", "dpm_solver_pp"), BUDGETS
    ):
        rows.append(row_of(name, family, solver, steps, budget))
        print(json.dumps(rows[-1]), flush=True)
    write_json(options.out, {"machine": processor(), "rows": rows})
    if options.against is None:
        return
    keys = ("family", "solver", "steps", "budget")
    before = {tuple(row[key] for key in keys): row for row in json.loads(options.against.read_text())["rows"]}
    for row in rows:
        if (old := before.get(tuple(row[key] for key in keys))) is not None:
            ratio = row["mse"] / old["mse"] if old["mse"] else float(row["mse"] == 0)
            print(*(row[key] for key in keys), f"error x {ratio:.4f}", f"{old['seconds']} s -> {row['seconds']} s")


if __name__ == "__main__":
    main()
