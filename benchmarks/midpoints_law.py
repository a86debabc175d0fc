"""The first half of midpoints.py: accuracy in distribution at equal evaluations."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from mixtures import COSINE, DIRECTIONS, SHORT, WEIGHTS, Problem, distance
from torch import Tensor

from mlem.solvers import GridPoint, Solver, make_solver

GRIDS = ("uniform", "log_snr", "karras", "ou_halving")
COMMON = "uniform"
PILOT = 1000  # the seed of pilot runs
CORRECTORS = ((1.0, 0.25), (0.5, 0.25), (0.5, 0.5))
"""(time, step) of the corrector, among which the pilot chooses."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("ddim", {}),
    "randomized_midpoint": ("randomized_midpoint", {}),
    "randomized_midpoint, ou": ("randomized_midpoint", {"clock": "ou"}),
    "heun": ("heun", {}),
    "dpm_solver_pp": ("dpm_solver_pp", {}),
    "ddpm": ("ddpm", {}),
    "predictor_corrector": ("predictor_corrector", {}),
}


def steps_within(solver: Solver, grid: str, evaluations: int) -> int:
    """The most steps with at most this many evaluations."""
    count = evaluations
    while count > 1 and solver.evaluations(GridPoint.of(COSINE, solver.grid(COSINE, count, grid))) > evaluations:
        count -= 1
    return count


def candidates(method: str) -> Iterator[tuple[Solver, dict[str, Any]]]:
    """The method with each of its options to choose from, and these options."""
    name, fixed = METHODS[method]
    choices = [{"time": t, "step": h} for t, h in CORRECTORS] if name == "predictor_corrector" else [{}]
    for chosen in choices:
        yield make_solver(name, **fixed, **chosen), fixed | chosen


def measure_corrector(
    dimensions: Sequence[int], evaluations: Sequence[int], samples: int, seeds: int
) -> dict[str, Any]:
    """Rows of the first table; see midpoints.py."""
    begin, rows, floors, checks = time.perf_counter(), [], [], []
    for d in dimensions:
        problem = Problem(d, distance=3.0, deviation=0.2, apart=1.0)
        quantiles, indices = problem.quantiles(samples), range(samples)

        def ode(seed: int, problem: Problem = problem, steps: int = 600) -> Tensor:
            return problem.slices(problem.run("dpm_solver_pp", steps, range(samples), seed, COMMON).x)

        pilot = ode(PILOT)
        odes = [ode(seed) for seed in range(seeds)]
        checks.append({"d": d, "600 steps against 1000": distance(odes[0], ode(0, steps=1000))})
        exact = [problem.exact(samples, seed) for seed in range(seeds)]
        floors.append({"d": d, "to the law": [distance(problem.slices(x), quantiles) for x in exact]})
        for method, count in itertools.product(METHODS, evaluations):
            trials = []
            for solver, chosen in candidates(method):
                for grid in dict.fromkeys((*GRIDS, solver.default_grid)):
                    steps = steps_within(solver, grid, count)
                    x = problem.run(solver, steps, indices, PILOT, grid).x
                    trials.append((distance(problem.slices(x), pilot), grid, steps, solver, chosen))
            best = min(trials, key=lambda trial: trial[0])
            # the default and the common grid with the options of the best
            for _, grid, steps, solver, chosen in trials:
                kinds = [
                    kind
                    for kind, name in (("best", best[1]), ("default", solver.default_grid), ("common", COMMON))
                    if grid == name and chosen == best[4]
                ]
                if not kinds:
                    continue
                row = {"d": d, "method": method, "asked": count, "kinds": kinds, "grid": grid, "options": chosen}
                row |= {"steps": steps, "to the law": [], "to the ODE": [], "weights": []}
                for seed in range(seeds):
                    result = problem.run(solver, steps, indices, seed, grid)
                    slices = problem.slices(result.x)
                    row["evaluations"] = result.ledger.evaluations
                    row["to the law"].append(distance(slices, quantiles))
                    row["to the ODE"].append(distance(slices, odes[seed]))
                    row["weights"].append(problem.weights(result.x).tolist())
                if solver.stochastic:
                    del row["to the ODE"]
                rows.append(row)
    settings = {"samples": samples, "seeds": seeds, "directions": DIRECTIONS, "grids": list(GRIDS)}
    settings["seconds"] = round(time.perf_counter() - begin, 1)
    return {"settings": settings, "rows": rows, "floors": floors, "checks": checks, "claims": claims(rows)}


def row_of(rows: list[dict[str, Any]], method: str, d: int, asked: int, kind: str) -> dict[str, Any]:
    return next(
        row for row in rows if (row["method"], row["d"], row["asked"]) == (method, d, asked) and kind in row["kinds"]
    )


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Randomized midpoints against DDIM in every cell: the ratio of mean distances, and how many seeds agree."""
    found = []
    for kind, against in itertools.product(("best", "common"), ("to the law", "to the ODE")):
        for d, asked in dict.fromkeys((row["d"], row["asked"]) for row in rows):
            ours, theirs = (row_of(rows, name, d, asked, kind)[against] for name in ("randomized_midpoint", "ddim"))
            lower = sum(a < b for a, b in zip(ours, theirs, strict=True))
            cell = {"grids": kind, "distance": against, "d": d, "evaluations": asked}
            found.append(cell | {"ratio": np.mean(ours) / np.mean(theirs), "seeds below": lower, "seeds": len(ours)})
    return found


def report_corrector(found: dict[str, Any]) -> None:
    """Print one table per distance, mean and standard deviation over seeds; the claim; the weights."""
    from rich.console import Console
    from rich.table import Table

    rows, console = found["rows"], Console(width=140)
    cells = list(dict.fromkeys((row["d"], row["asked"]) for row in rows))
    for against in ("to the law", "to the ODE"):
        table = Table(title=f"sliced W2 {against}, x 1000, best grid: mean ± deviation over seeds")
        for column in ("solver", *(f"d={d}, {asked}" for d, asked in cells)):
            table.add_column(column, justify="left" if column == "solver" else "right")
        for method in METHODS:
            picked = [row_of(rows, method, d, asked, "best") for d, asked in cells]
            if against in picked[0]:
                table.add_row(method, *(f"{_spread(row[against])}\n[dim]{SHORT[row['grid']]}[/]" for row in picked))
        if against == "to the law":
            floors = {floor["d"]: floor[against] for floor in found["floors"]}
            table.add_row("exact samples", *(_spread(floors[d]) for d, _ in cells))
        console.print(table)
    for kind, against in itertools.product(("best", "common"), ("to the law", "to the ODE")):
        group = [cell for cell in found["claims"] if (cell["grids"], cell["distance"]) == (kind, against)]
        below = sum(cell["ratio"] < 1 for cell in group)
        ratios = [cell["ratio"] for cell in group]
        print(
            f"randomized midpoint below DDIM, {kind} grids, distance {against}: in {below} of {len(group)} cells; "
            f"ratio {min(ratios):.2f} to {max(ratios):.2f}; seeds {sum(c['seeds below'] for c in group)} of "
            f"{sum(c['seeds'] for c in group)}"
        )
    table = Table("d", "evaluations", "T, h", "mean over seeds", "largest", "chi² / degrees of freedom")
    table.title = "weights of the modes by predictor_corrector, in standard errors from the truth"
    for d, asked in cells:
        row = row_of(rows, "predictor_corrector", d, asked, "best")
        z = np.array(row["weights"])
        shares = WEIGHTS.numpy()
        # three shares, two of them free: chi^2 = sum (n - N p)^2 / (N p) = sum z^2 (1 - p)
        chi = (np.square(z) * (1 - shares)).sum() / (2 * len(z))
        table.add_row(
            str(d),
            f"{row['evaluations']:g}",
            f"{row['options']['time']}, {row['options']['step']}",
            ", ".join(f"{value:+.1f}" for value in z.mean(0)),
            f"{np.abs(z).max():.1f}",
            f"{chi:.2f}",
        )
    console.print(table)
    for check in found["checks"]:
        away = check["600 steps against 1000"]
        print(f"d = {check['d']}: the ODE's solution in 600 steps is {away:.1e} from that in 1000")
    print(f"{found['settings']['seconds']} s")


def _spread(values: Sequence[float]) -> str:
    digits = 0 if np.mean(values) > 2e-2 else 1 if np.mean(values) > 2e-3 else 2
    return f"{1e3 * np.mean(values):.{digits}f}±{1e3 * np.std(values, ddof=1):.{digits}f}"
