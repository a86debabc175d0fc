"""Orders of convergence, measured by slope in float64 where the score is exact.

    python benchmarks/orders.py [--quick] [--out benchmarks]

Data: an uneven mixture of two correlated Gaussians in three dimensions that overlap (between modes far apart, a sample
that changes sides makes an error of the size of the data, and a few of those hide every order); cosine schedule; t from
0.9 to 0.1, so that neither end of the schedule plays a part. Errors are Euclidean distances at t = 0.1 in EDM
coordinates `y = x / alpha`.

ODE solvers: against the ODE solved by DOP853 (scipy) to 1e-11. `root mean square` is over starting noises, every one
with midpoints of its own; `of the mean` is the error of the mean over midpoints from one fixed starting noise, with
what the finite number of draws adds to its square taken off. Grids: even in t, or even in OU time. SDE solvers: root
mean square on shared Brownian paths, against many steps of the solver that is their reference.

Every error stands beside the evaluations it took, so columns compare solvers at equal cost. Slopes are those of least
squares through all points of a row; intervals are 95 percent percentiles of a bootstrap over samples, the same for all
points of a row. They hold the sampling error, not the approach to the limit.

Writes `orders.json` into --out and, unless --quick, `docs/orders.png`.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from mlem.brownian import BrownianPath
from mlem.denoiser import MixtureDenoiser
from mlem.files import atomic_write, write_json
from mlem.grids import TimeGrid
from mlem.noise import NoiseStream
from mlem.schedule import NoiseSchedule
from mlem.solvers import SOLVERS, EvaluationPoint, GridPoint, GridPoints, make_solver, model_input

COSINE = NoiseSchedule.cosine()
BEGIN, END = 0.9, 0.1
FIXED = 3 * torch.tensor([[0.8, -0.3, 0.5]], dtype=torch.float64)
"""The starting noise, as y, from which the error of the mean is measured."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX"


class Case(NamedTuple):
    """A row: a solver with options on a grid, and the slope that it should have at least, or about."""

    label: str
    solver: str
    options: dict[str, Any]
    grid: str
    expected: str


RMS = (
    Case("DDIM", "ddim", {}, "t", "1"),
    Case("Heun", "heun", {}, "t", "2"),
    Case("DPM-Solver++ 2M", "dpm_solver_pp", {}, "t", "2"),
    Case("randomized midpoint, kappa", "randomized_midpoint", {}, "t", ">= 1.4"),
    Case("randomized midpoint, OU", "randomized_midpoint", {"clock": "ou"}, "t", ">= 1.4"),
    Case("randomized midpoint, kappa", "randomized_midpoint", {}, "OU", ">= 1.4"),
    Case("randomized midpoint, OU", "randomized_midpoint", {"clock": "ou"}, "OU", ">= 1.4"),
)
MEAN = tuple(case._replace(expected=">= 1.8") for case in RMS if case.solver == "randomized_midpoint")
STRONG = (
    Case("Euler-Maruyama", "euler_maruyama", {}, "t", "1"),
    Case("DDPM", "ddpm", {}, "t", "1"),
    Case("SDE-DPM-Solver++ 2M", "dpm_solver_pp_sde", {}, "t", "1"),
    Case("randomized midpoint, SDE", "randomized_midpoint_sde", {}, "t", "1"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples and steps, a few seconds, no figure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of orders.json")
    options = parser.parse_args()
    begin = time.perf_counter()
    sizes = {"evaluations": [40, 80, 160, 320], "samples": 2000, "draws": 40_000, "paths": 1000, "fine": 3072}
    if options.quick:
        sizes = {"evaluations": [40, 80, 160], "samples": 300, "draws": 4000, "paths": 200, "fine": 1536}
    tables = {
        "root mean square": measure_rms(sizes["evaluations"], sizes["samples"]),
        "of the mean": measure_mean(sizes["evaluations"], sizes["draws"]),
        "strong": measure_strong([48, 96, 192, 384][: len(sizes["evaluations"])], sizes["paths"], sizes["fine"]),
    }
    seconds = round(time.perf_counter() - begin, 1)
    report(tables)
    print(f"{seconds} s")
    settings = {"t": [BEGIN, END], "schedule": "cosine", "seed": 0, "quick": options.quick, "seconds": seconds}
    write_json(options.out / "orders.json", {"settings": settings | sizes, **tables})
    if not options.quick:
        caption = (
            f"mixture of two Gaussians in 3 dimensions, exact score, cosine schedule, t from {BEGIN} to {END}; "
            f"{sizes['samples']} starting noises; {sizes['draws']} draws of midpoints from one noise; "
            f"{sizes['paths']} Brownian paths; seed 0"
        )
        draw(tables, Path(__file__).parents[1] / "docs" / "orders.png", caption)


def mixture() -> MixtureDenoiser:
    """The exact denoiser of 0.3 N(m, C) + 0.7 N(-m / 2, C / 2)."""
    mean = torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64)
    covariance = torch.tensor([[1.0, 0.6, -0.2], [0.6, 0.8, 0.1], [-0.2, 0.1, 0.3]], dtype=torch.float64)
    means, covariances = torch.stack([mean, -mean / 2]), torch.stack([covariance, covariance / 2])
    return MixtureDenoiser(COSINE, torch.tensor([0.3, 0.7]), means, covariances)


DATA = mixture()


def eps(y: Tensor, place: EvaluationPoint) -> Tensor:
    """The exact noise estimate, in the form that solvers ask for."""
    return DATA(*model_input(COSINE, y, place))


def interval(grid: str, steps: int) -> GridPoints:
    """Points from BEGIN to END, even in t or in OU time."""
    if grid == "OU":
        first, last = (COSINE.ou_time(t).item() for t in (BEGIN, END))
        inner = COSINE.time_from_ou_time(torch.linspace(first, last, steps + 1, dtype=torch.float64)).tolist()
        times = (BEGIN, *inner[1:-1], END)
    else:
        times = tuple(BEGIN + (END - BEGIN) * i / steps for i in range(steps + 1))
    return GridPoint.of(COSINE, TimeGrid(grid, times))


def evaluations_per_step(case: Case) -> int:
    """None of the steps ends at kappa = 0, so all of them cost the same."""
    return 2 if case.solver in ("heun", "randomized_midpoint", "randomized_midpoint_sde") else 1


def run(case: Case, steps: int, y: Tensor, path: Any = None) -> Tensor:
    """y at END, (B, 3), from y at BEGIN; sample i has midpoints with index i, seed 0."""
    solver = make_solver(case.solver, **case.options)
    with torch.inference_mode():
        return solver.integrate(eps, y, interval(case.grid, steps), path, torch.arange(len(y)), 0)


def exact(y: Tensor) -> Tensor:
    """y at END on the solution of the ODE."""
    ends = [COSINE.kappa(t).item() for t in (BEGIN, END)]

    def slope(kappa: float, flat: np.ndarray) -> np.ndarray:
        now = torch.from_numpy(flat).view(y.shape)
        return eps(now, torch.full((len(now),), kappa, dtype=torch.float64)).flatten().numpy()

    found = solve_ivp(slope, ends, y.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-12, t_eval=ends[1:])
    return torch.from_numpy(found.y[:, -1]).view(y.shape)


def start(count: int) -> Tensor:
    """y at BEGIN of `count` samples: noise of variance 1, as x."""
    x = NoiseStream(0, "orders/start").normal(torch.arange(count), [0], (3,), torch.float64)[0]
    return x / COSINE.alpha(BEGIN).item()


def measure_rms(evaluations: Sequence[int], samples: int) -> list[dict[str, Any]]:
    """A row for each case: root mean square over starting noises."""
    y = start(samples)
    solution, rows = exact(y), []
    for case in RMS:
        steps = [count // evaluations_per_step(case) for count in evaluations]
        squares = torch.stack([(run(case, n, y) - solution).square().sum(1) for n in steps])
        rows.append(_row(case, steps, evaluations, _replicated(squares)))
    return rows


def measure_mean(evaluations: Sequence[int], draws: int) -> list[dict[str, Any]]:
    """A row for each randomized case: error of the mean over draws of midpoints, from one starting noise."""
    solution, rows, counts = exact(FIXED), [], _resamplings(draws)
    for case in MEAN:
        steps, errors = [count // evaluations_per_step(case) for count in evaluations], []
        noise = []
        for n in steps:
            away = (run(case, n, FIXED.expand(draws, 3)) - solution).numpy()
            variance = away.var(0).sum() / draws
            squares = np.square(counts @ away).sum(1)
            # a mean of N draws is off by their variance / N, a resampled one by twice that
            squares -= variance * np.r_[1, np.full(len(counts) - 1, 2)]
            errors.append(np.sqrt(squares.clip(variance / 100)))
            noise.append(float(np.sqrt(variance)))
        rows.append(_row(case, steps, evaluations, np.stack(errors)) | {"standard error": noise})
    return rows


def measure_strong(steps: Sequence[int], paths: int, fine: int) -> list[dict[str, Any]]:
    """A row for each SDE solver: root mean square over Brownian paths, against `fine` steps of its reference."""
    y, solutions, rows = start(paths), {}, []

    def path() -> BrownianPath:
        return BrownianPath(COSINE, 0, torch.arange(paths), (3,), torch.float64)

    for case in STRONG:
        reference = SOLVERS[case.solver].reference
        if reference not in solutions:
            solutions[reference] = run(case._replace(solver=reference), fine, y, path())
        squares = torch.stack([(run(case, n, y, path()) - solutions[reference]).square().sum(1) for n in steps])
        rows.append(_row(case, steps, [n * evaluations_per_step(case) for n in steps], _replicated(squares)))
    return rows


def _resamplings(count: int, replicates: int = 300) -> np.ndarray:
    """Weights of samples, (1 + replicates, count): all alike, then bootstrap resamplings."""
    generator = np.random.default_rng(0)
    samples = [np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(replicates)]
    return np.stack([np.ones(count), *samples]) / count


def _replicated(squares: Tensor) -> np.ndarray:
    """Root mean squares and their resamplings, (points, 1 + replicates), from squared errors (points, B)."""
    return np.sqrt(squares.numpy() @ _resamplings(squares.shape[1]).T)


def _row(case: Case, steps: Sequence[int], evaluations: Sequence[int], errors: np.ndarray) -> dict[str, Any]:
    x, y = np.log(np.asarray(steps, dtype=float)), -np.log(errors)
    x = x - x.mean()
    slopes = x @ (y - y.mean(0)) / (x @ x)
    low, high = np.quantile(slopes[1:], (0.025, 0.975)).tolist()
    return {
        "label": case.label,
        "solver": case.solver,
        "options": case.options,
        "grid": case.grid,
        "expected": case.expected,
        "slope": slopes[0].item(),
        "interval": [low, high],
        "steps": list(steps),
        "evaluations": list(evaluations),
        "error": errors[:, 0].tolist(),
    }


def report(tables: dict[str, list[dict[str, Any]]]) -> None:
    """The three tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120)
    for name, rows in tables.items():
        unit = "steps" if name == "strong" else "evaluations"
        table = Table(title=f"error, {name}, by {unit}")
        columns = ["solver", "even in", "order", "slope", "95 percent", *map(str, rows[0][unit])]
        for column in columns:
            table.add_column(column, justify="left" if column in ("solver", "even in") else "right", no_wrap=True)
        for row in rows:
            low, high = row["interval"]
            errors = [f"{error:.2e}" for error in row["error"]]
            table.add_row(
                row["label"],
                row["grid"],
                row["expected"],
                f"{row['slope']:.2f}",
                f"{low:.2f} to {high:.2f}",
                *errors,
            )
        console.print(table)


def draw(tables: dict[str, list[dict[str, Any]]], path: Path, caption: str) -> None:
    """Error against evaluations, a panel for each table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, 3)
    titles = ("ODE, root mean square", "ODE, error of the mean over midpoints", "SDE, root mean square on shared paths")
    labels = [row["label"] for row in tables["root mean square"][:5]]
    for axes, title, rows in zip(panels, titles, tables.values(), strict=True):
        for number, row in enumerate(rows):
            place = labels.index(row["label"]) if row["label"] in labels else number
            axes.loglog(
                row["evaluations"],
                row["error"],
                color=COLOURS[place],
                marker=MARKERS[place],
                markersize=4,
                linestyle="-" if row["grid"] == "t" else "--",
                label=f"{row['label']}{', even in OU time' if row['grid'] == 'OU' else ''}: {row['slope']:.2f}",
            )
        counts = sorted({count for row in rows for count in row["evaluations"]})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xticks([], minor=True)
        axes.set_title(title, fontsize="small", loc="left")
        axes.set_xlabel("evaluations per sample")
        axes.grid(which="major", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(title="slope in steps", fontsize="x-small", title_fontsize="x-small", frameon=False)
        # room for the legend below the curves
        low, high = axes.get_ylim()
        axes.set_ylim(low / (high / low) ** 0.5, high)
        axes.legend(title="slope in steps", fontsize="x-small", title_fontsize="x-small", frameon=False, loc=3)
    panels[0].set_ylabel("distance to the exact solution [y = x / alpha]")
    panels[2].set_ylabel("distance to many steps [y = x / alpha]")
    figure.suptitle(f"Orders of convergence: {caption}", fontsize="small", x=0.01, ha="left")
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    main()
