"""How long the search for a plan takes, and how good a plan is predicted to be.

    python benchmarks/searching.py [FAMILY ...] [--out FILE] [--against FILE]

On families of two levels in closed form, whose costs are 1 : 16, and of four, 1 : 4 : 16 : 64, and on calibrated
families that are named. With `--against`, what an earlier run predicted stands beside it: the ratio of the errors.
"""

from __future__ import annotations

import mlem as mlem  # before torch, whose threads shall not spin

# isort: split
import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlem.denoiser import MixtureDenoiser
from mlem.family import Family
from mlem.files import write_json
from mlem.level import Level
from mlem.multilevel.calibrate import measure
from mlem.multilevel.calibration import Calibration
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.planner import make_plan
from mlem.multilevel.spec import PlanSpec
from mlem.noise import reserved_indices
from mlem.provenance import processor
from mlem.schedule import NoiseSchedule
from mlem.solvers import make_solver

COSINE = NoiseSchedule.cosine()
BUDGETS = (0.15, 0.25, 0.5)


class Waves(nn.Module):
    """The exact noise estimate of a mixture, and waves: an error that stays bounded, as those of networks do."""

    def __init__(self, size: int, error: float, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, 3, generator=torch.Generator().manual_seed(seed)))
        means = torch.tensor([[0.4, -0.2, 0.1], [-0.4, 0.2, -0.1]])
        self.error, self.exact = (
            error,
            MixtureDenoiser(COSINE, torch.tensor([0.3, 0.7]), means, torch.tensor([0.5, 0.4])),
        )

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        t = (timestep.double() + 1) / 1000
        wave = torch.cos(0.5 * x @ self.weight[:3].T + self.weight[:3, 0])
        return self.exact(x, t) + self.error * COSINE.alpha(t)[:, None] * wave


def synthetic(errors: Sequence[tuple[float, int]]) -> Family:
    """A calibrated family in closed form, of levels with these errors and costs."""
    levels = [Level(str(k), Waves(8, e, k), COSINE, (3,), "eps", "points", flops=n) for k, (e, n) in enumerate(errors)]
    family = Family(levels)
    indices = reserved_indices("calibration", 128)
    measured = measure([one.denoiser for one in levels], COSINE, (3,), indices, times=24)
    flops = tuple(float(one.flops) for one in levels)
    about = {"images": 128, "seed": 0, "device": "cpu", "weights": family.weights_hash}
    family.fitted = Fitted(Calibration(tuple(family.names), flops, {64: flops}, *measured, about))
    return family


def row_of(name: str, family: Family, solver_name: str, steps: int, budget: float) -> dict[str, Any]:
    """One search: its time, the levels and the cost of its plan, and what error is predicted of it."""
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
    families = {
        "two levels": synthetic(((0.1, 1), (0.0, 16))),
        "four levels": synthetic(((0.1, 1), (0.05, 4), (0.02, 16), (0.0, 64))),
    }
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
