"""Whether budgets in seconds are kept, and the share of a run outside the networks.

    python benchmarks/budgets.py FAMILY ... [--rounds 5] [--out FILE]

For calibrated families, in batches of 64 (the timed size): the wall-clock seconds of a plan over the prediction of its
calibration, and over `budget` times those of the largest level alone at every step, run in turns. The table at the end
has the shares outside, also for a hindsight plan with measurements at fixed rows: the second level at every 6th, the
third at every 12th, and so on. Run it on an idle machine.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import json
from pathlib import Path
from typing import Any

import torch
from measuring import spread

from mlem.family import Family
from mlem.files import write_json
from mlem.multilevel.plan import Plan
from mlem.provenance import processor
from mlem.sampling import Sampler

BATCH = 64
CASES = (("ddpm", 32), ("ddpm", 128), ("dpm_solver_pp", 32), ("dpm_solver_pp", 128))
BUDGETS = (0.5, 0.7)


def fixed_plan(levels: int, steps: int) -> Plan:
    """The hindsight plan with measurements at fixed rows."""
    every = torch.tensor([1, *(6 * 2**k for k in range(levels - 1))])
    return Plan.given(torch.arange(steps)[:, None] % every == 0)


def row_of(family: Family, solver: str, steps: int, budget: float | None, rounds: int) -> dict[str, Any]:
    """One plan against the largest level alone: with this budget, or with measurements at fixed rows."""
    plan = fixed_plan(len(family.levels), steps) if budget is None else family.plan(budget=budget)
    samplers = {"plan": Sampler(family, solver=solver, steps=steps, plan=plan)}
    samplers["alone"] = Sampler(family, solver=solver, steps=steps)
    about = samplers["plan"].plan.about if samplers["plan"].plan is not None else {}
    for sampler in samplers.values():
        sampler.run(range(BATCH))
    wall: dict[str, list[float]] = {name: [] for name in samplers}
    outside: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sampler in samplers.items():
            ledger = sampler.run(range(BATCH)).ledger
            wall[name].append(ledger.wall_seconds)
            outside[name].append(100 * (1 - ledger.network_seconds / ledger.wall_seconds))
    row: dict[str, Any] = {"family": family.data, "solver": solver, "steps": steps, "budget": budget or "fixed rows"}
    if budget is not None:
        promised = [budget * alone for alone in wall["alone"]]
        row["wall over promised"] = spread([a / b for a, b in zip(wall["plan"], promised, strict=True)])
        row["wall over predicted"] = spread([a / (BATCH * about["predicted_seconds"]) for a in wall["plan"]])
    row["percent outside, plan"] = spread(outside["plan"])
    row["percent outside, largest level"] = spread(outside["alone"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+", type=Path, help="folders of calibrated families")
    parser.add_argument("--rounds", type=int, default=5, help="how often each pair is measured (default 5)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("budgets.json"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for folder in options.families:
        family = Family.load(folder)
        for solver, steps in CASES:
            for budget in (None, *BUDGETS):
                try:
                    rows.append(row_of(family, solver, steps, budget, options.rounds))
                except ValueError as error:  # small levels that take nearly as long as the largest
                    print(f"left out: {family.data}, {solver}, {steps} steps: {error}", flush=True)
                    continue
                print(json.dumps(rows[-1]), flush=True)
    for row in rows:
        shares = (f"{row[f'percent outside, {what}']['median']:5.1f}" for what in ("plan", "largest level"))
        print(f"{row['family']:16s} {row['solver']:14s} {row['steps']:4d} {row['budget']!s:11s}", *shares)
    write_json(options.out, {"machine": processor(), "rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
