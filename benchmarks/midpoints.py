"""Randomized midpoints on mixtures with exact scores: closeness in law at equal evaluations, and parallel rounds.

    python benchmarks/midpoints.py [--quick] [--out benchmarks] [--only corrector|parallel]

**corrector.** Mixtures of three well-separated Gaussians in d = 2, 16 and 64 (weights 0.2, 0.3, 0.5, deviations 0.2,
means in random directions at distance 3 from 0, no two of them nearer to each other), sampled at 50, 100 and 200
evaluations per sample. Two distances, both sliced Wasserstein-2 (root mean square over random directions):

- to the law: against the exact quantiles of the projected mixture. Its floor is that of as many exact samples, of which
  there is a row: the weights of far modes fluctuate, and that alone is a distance;
- to the ODE: against a tight solution of the ODE from the same starting noise, so that those fluctuations are on both
  sides. Only for ODE solvers: there it is free of the floor.

Every solver runs on its default grid, on the common grid even in t, and on the best of four grids, chosen for each
solver, d and number of evaluations by a pilot run with another seed, by the distance to the ODE's solution; of
predictor_corrector the pilot also chooses the corrector's time and step. The tables have the best; all rows are in the
JSON. A solver that cannot spend the evaluations exactly stays below. predictor_corrector also has its modes' weights.

**parallel.** Rounds (network calls one after another) that parallel midpoints need to come within a fixed Euclidean
distance of a tight solution of the ODE, root mean square over samples, against the dimension: the distance is the same
in every dimension, so each coordinate has to be better the more there are. The best of a small search over blocks,
midpoints, window, tolerance and grid. Beside it the evaluations that sequential solvers need for the same, each on its
best of three grids. Data: three modes with means at distance 1 and deviations 0.5: they overlap, since between modes
far apart, a sample that changes sides makes an error of the size of the data, in any solver.

Writes `midpoints.json` into --out and, unless --quick, `docs/midpoints.png`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlem.denoiser import MixtureDenoiser
from mlem.files import atomic_write, read_json, write_json
from mlem.noise import NoiseStream
from mlem.sampling import Sampler
from mlem.schedule import NoiseSchedule
from mlem.solvers import Solver, make_solver
from mlem.solvers.parallel_midpoint import ParallelMidpoint

COSINE = NoiseSchedule.cosine()
WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
GRIDS = ("uniform", "log_snr", "karras", "ou_halving")
COMMON = "uniform"
SHORT = {"uniform": "t", "log_snr": "snr", "karras": "karras", "ou_halving": "ou"}
DIRECTIONS = 100
PILOT = 1000  # the seed of pilot runs
CORRECTORS = ((1.0, 0.25), (0.5, 0.25), (0.5, 0.5))
"""(time, step) of the corrector that the pilot chooses from."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("ddim", {}),
    "randomized_midpoint": ("randomized_midpoint", {}),
    "randomized_midpoint, ou": ("randomized_midpoint", {"clock": "ou"}),
    "heun": ("heun", {}),
    "dpm_solver_pp": ("dpm_solver_pp", {}),
    "ddpm": ("ddpm", {}),
    "predictor_corrector": ("predictor_corrector", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer of everything, a few seconds, no figure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of midpoints.json")
    parser.add_argument("--only", choices=["corrector", "parallel"], help="one half; the other is kept as it was")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    path, found = options.out / "midpoints.json", {}
    if options.only and path.exists():
        found = read_json(path)
    if options.only != "parallel":
        found["corrector"] = measure_corrector(
            dimensions=(2, 16) if options.quick else (2, 16, 64),
            evaluations=(50,) if options.quick else (50, 100, 200),
            samples=500 if options.quick else 4000,
            seeds=2 if options.quick else 5,
        )
        report_corrector(found["corrector"])
    if options.only != "corrector":
        found["parallel"] = (
            measure_parallel((4, 16, 64), batches=2, blocks=(4, 6), midpoints=(16,), tolerances=(2.0,))
            if options.quick
            else measure_parallel((4, 16, 64, 256, 1024, 4096), 8, (6, 4, 8), (32, 16, 64), (2.0, 0.5))
        )
        report_parallel(found["parallel"])
    write_json(path, found)
    if not options.quick and len(found) == 2:
        draw(found, Path(__file__).parents[1] / "docs" / "midpoints.png")


# --- closeness in law ----------------------------------------------------------------------------------------------


class Problem:
    """A mixture of round Gaussians in d dimensions: its denoiser, its exact samples, its projections."""

    def __init__(self, dimension: int, distance: float, deviation: float, apart: float = 0.0) -> None:
        """apart: the least distance between two means, in units of theirs from 0."""
        stream = NoiseStream(0, "midpoints/means")
        draws = (stream.normal(torch.arange(3), [slot], (dimension,), torch.float64)[0] for slot in itertools.count())
        # in two dimensions random directions may nearly agree: two modes in one
        spread = (draw / draw.norm(dim=1, keepdim=True) for draw in draws)
        directions = next(draw for draw in spread if torch.pdist(draw).min() > apart)
        self.means, self.deviation = distance * directions, deviation
        self.denoiser = MixtureDenoiser(COSINE, WEIGHTS, self.means, torch.full((3,), deviation**2))
        self.shape = (dimension,)
        slopes = NoiseStream(0, "midpoints/slices").normal(torch.arange(DIRECTIONS), [0], (dimension,), torch.float64)[
            0
        ]
        self._slices = slopes / slopes.norm(dim=1, keepdim=True)

    def run(self, solver: str | Solver, steps: int, indices: Sequence[int], seed: int, grid: str | None = None) -> Any:
        """The result of these samples, as one batch."""
        options: dict[str, Any] = {"schedule": COSINE, "shape": self.shape, "seed": seed, "grid": grid}
        return Sampler(self.denoiser, solver=solver, steps=steps, **options).run(indices)

    def exact(self, count: int, seed: int) -> Tensor:
        """Samples of the mixture itself, (count, d)."""
        stream, indices = NoiseStream(seed, "midpoints/exact"), torch.arange(count)
        modes = torch.searchsorted(WEIGHTS.cumsum(0), stream.uniform(indices, [0], torch.float64)[0])
        return (
            self.means[modes.clamp(max=2)] + self.deviation * stream.normal(indices, [1], self.shape, torch.float64)[0]
        )

    def slices(self, x: Tensor) -> Tensor:
        """Projections of x (N, d), each sorted: (N, DIRECTIONS)."""
        return (x @ self._slices.T).sort(0).values

    def quantiles(self, count: int) -> Tensor:
        """What `slices` of `count` samples would be if they were the exact quantiles."""
        middles, levels = (self.means @ self._slices.T).numpy(), (np.arange(count) + 0.5) / count
        found = []
        for column in middles.T:
            values = np.linspace(column.min() - 8 * self.deviation, column.max() + 8 * self.deviation, 20_001)
            away = torch.from_numpy((values - column[:, None]) / self.deviation)
            found.append(np.interp(levels, (WEIGHTS[:, None] * torch.special.ndtr(away)).sum(0).numpy(), values))
        return torch.from_numpy(np.stack(found, 1))

    def weights(self, x: Tensor) -> Tensor:
        """The share of samples nearest to each mean, as deviations from WEIGHTS in standard errors: (3,)."""
        share = torch.bincount(torch.cdist(x, self.means).argmin(1), minlength=3) / len(x)
        return (share - WEIGHTS) / (WEIGHTS * (1 - WEIGHTS) / len(x)).sqrt()


def distance(one: Tensor, other: Tensor) -> float:
    """Wasserstein-2 of sorted projections, root mean square over directions."""
    return (one - other).square().mean().sqrt().item()


def steps_within(solver: Solver, grid: str, evaluations: int) -> int:
    """The most steps that cost at most so many evaluations."""
    count = evaluations
    while count > 1 and solver.evaluations(solver.grid(COSINE, count, grid)) > evaluations:
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
    """Rows of the first table; see the module docstring."""
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


def _row(rows: list[dict[str, Any]], method: str, d: int, asked: int, kind: str) -> dict[str, Any]:
    return next(
        row for row in rows if (row["method"], row["d"], row["asked"]) == (method, d, asked) and kind in row["kinds"]
    )


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Randomized midpoints against DDIM in every cell: the ratio of mean distances, and how many seeds agree."""
    found = []
    for kind, against in itertools.product(("best", "common"), ("to the law", "to the ODE")):
        for d, asked in dict.fromkeys((row["d"], row["asked"]) for row in rows):
            ours, theirs = (_row(rows, name, d, asked, kind)[against] for name in ("randomized_midpoint", "ddim"))
            lower = sum(a < b for a, b in zip(ours, theirs, strict=True))
            cell = {"grids": kind, "distance": against, "d": d, "evaluations": asked}
            found.append(cell | {"ratio": np.mean(ours) / np.mean(theirs), "seeds below": lower, "seeds": len(ours)})
    return found


def report_corrector(found: dict[str, Any]) -> None:
    """One table for each distance, mean and standard deviation over seeds; the claim; the weights."""
    from rich.console import Console
    from rich.table import Table

    rows, console = found["rows"], Console(width=140)
    cells = list(dict.fromkeys((row["d"], row["asked"]) for row in rows))
    for against in ("to the law", "to the ODE"):
        table = Table(title=f"sliced W2 {against}, x 1000, best grid: mean ± deviation over seeds")
        for column in ("solver", *(f"d={d}, {asked}" for d, asked in cells)):
            table.add_column(column, justify="left" if column == "solver" else "right")
        for method in METHODS:
            picked = [_row(rows, method, d, asked, "best") for d, asked in cells]
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
        row = _row(rows, "predictor_corrector", d, asked, "best")
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


# --- parallel rounds -----------------------------------------------------------------------------------------------

ERROR = 0.05
BATCH = 8
SEQUENTIAL = ("ddim", "randomized_midpoint", "heun", "dpm_solver_pp")


class _EnoughRounds(Exception):
    """More rounds than the best so far needs."""


class Distance:
    """Root mean square distance to the ODE's solution, over batches of BATCH samples."""

    def __init__(self, d: int, batches: int) -> None:
        self.problem, self.d = Problem(d, distance=1.0, deviation=0.5), d
        self.batches = [range(BATCH * i, BATCH * (i + 1)) for i in range(batches)]
        self.solution, self.check = (
            [self.problem.run("dpm_solver_pp", steps, batch, 0, "log_snr").x for batch in self.batches]
            for steps in (1000, 700)
        )

    def to(self, found: Sequence[Tensor]) -> float:
        """Of the samples of each batch."""
        squares = [(x - y).square().sum(1) for x, y in zip(found, self.solution, strict=True)]
        return torch.cat(squares).mean().sqrt().item()

    def sequential(self, solver: str, steps: int, grid: str) -> float:
        """The error of so many steps."""
        return self.to([self.problem.run(solver, steps, batch, 0, grid).x for batch in self.batches])

    def parallel(self, solver: Solver, steps: int, grid: str, most: float) -> tuple[float, float, float]:
        """Error, rounds and calls per sample. Raises _EnoughRounds when a batch has had more rounds than `most`."""
        left = 0.0

        def counted(x: Tensor, t: Tensor) -> Tensor:
            nonlocal left
            left -= 1
            if left < 0:
                raise _EnoughRounds
            return self.problem.denoiser(x, t)

        counted.any_dtype = True  # type: ignore[attr-defined]
        options: dict[str, Any] = {"schedule": COSINE, "shape": (self.d,), "grid": grid}
        sampler, results = Sampler(counted, solver=solver, steps=steps, **options), []
        for batch in self.batches:
            left = most
            results.append(sampler.run(batch))
        rounds, calls = (
            np.mean([getattr(result.ledger, name) for result in results]).item() for name in ("rounds", "evaluations")
        )
        return self.to([result.x for result in results]), rounds, calls


def fewest(error: Callable[[int], float], guess: int) -> int:
    """The fewest steps with an error of at most ERROR, to 3 percent; errors fall with steps."""
    low, high = 0, max(2, guess)
    while error(high) > ERROR:
        low, high = high, 2 * high
    while high - low > max(1, 0.03 * high):
        middle = (low + high) // 2 if low == 0 else round(math.sqrt(low * high))
        low, high = (middle, high) if error(middle) > ERROR else (low, middle)
    return high


def needed(errors: Distance, solver: str, guess: int) -> dict[str, Any]:
    """The fewest steps of a sequential solver, and its evaluations, on its best grid."""
    per_step = {"randomized_midpoint": 2, "heun": 2}.get(solver, 1)
    best: tuple[float, str] = (math.inf, "")
    for grid in ("uniform", "log_snr", "karras"):
        # a grid that fails with one step fewer than the best is no better
        if best[0] < math.inf and errors.sequential(solver, max(1, int(best[0]) - 1), grid) > ERROR:
            continue
        steps = fewest(lambda n, grid=grid: errors.sequential(solver, n, grid), min(guess, best[0]))  # type: ignore[type-var,arg-type]
        best = min(best, (steps, grid))
    return {"steps": best[0], "evaluations": best[0] * per_step - (solver == "heun"), "grid": best[1]}


def search(
    errors: Distance, blocks: Sequence[int], midpoints: Sequence[int], tolerances: Sequence[float]
) -> dict[str, Any]:
    """The parallel solver with the fewest rounds; among equals, the fewest calls.

    tolerances: in units of ERROR / sqrt(d), the largest root mean square per coordinate. Window: one block, or all.
    """
    best: dict[str, Any] = {"rounds": math.inf, "calls": math.inf}
    choices = list(itertools.product(blocks, midpoints, tolerances, ("log_snr", "uniform"), (True, False)))
    for count, parts, tolerance, grid, whole in choices:
        options: dict[str, Any] = {"midpoints": parts, "rounds": 100, "window": parts * (count if whole else 1)}
        options["tolerance"] = tolerance * ERROR / math.sqrt(errors.d)
        try:
            error, rounds, calls = errors.parallel(ParallelMidpoint(**options), count, grid, best["rounds"] + 2)
        except (_EnoughRounds, FloatingPointError):
            continue
        if error <= ERROR and (rounds, calls) < (best["rounds"], best["calls"]):
            best = {"rounds": rounds, "calls": calls, "error": error, "blocks": count, "grid": grid, "options": options}
    return best | {"tried": len(choices)}


def measure_parallel(
    dimensions: Sequence[int],
    batches: int,
    blocks: Sequence[int],
    midpoints: Sequence[int],
    tolerances: Sequence[float],
) -> dict[str, Any]:
    """Rows of the second table, and fits of rounds to the dimension; at most so many batches."""
    begin, rows = time.perf_counter(), []
    guesses = dict.fromkeys(SEQUENTIAL, 8)
    for d in dimensions:
        errors = Distance(d, max(1, min(batches, 4096 // d)))
        row: dict[str, Any] = {"d": d, "samples": BATCH * len(errors.batches), "check": errors.to(errors.check)}
        for solver in SEQUENTIAL:
            row[solver] = needed(errors, solver, guesses[solver])
            guesses[solver] = row[solver]["steps"]
        row["parallel_midpoint"] = search(errors, blocks, midpoints, tolerances)
        rows.append(row)
        seconds = time.perf_counter() - begin
        print(f"d = {d}: {row['parallel_midpoint']['rounds']:g} rounds, {seconds:.0f} s so far", flush=True)
    searched = {"blocks": blocks, "midpoints": midpoints, "tolerances": tolerances}
    settings = {"error": ERROR, "batch": BATCH, "seconds": round(time.perf_counter() - begin, 1)} | searched
    return {"settings": settings, "rows": rows, "fits": fits(rows)}


def fits(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """rounds = a + b ln^k d for k = 1, 2, and powers of d, by least squares; slopes with 95 percent intervals."""
    from scipy.stats import linregress, t

    log_d = np.log([row["d"] for row in rows])
    rounds = np.array([row["parallel_midpoint"]["rounds"] for row in rows])
    pairs = {"log d": (log_d, rounds), "log^2 d": (log_d**2, rounds), "power": (log_d, np.log(rounds))}
    for solver in SEQUENTIAL:
        pairs[f"power, {solver}"] = (log_d, np.log([row[solver]["steps"] for row in rows]))
    found = {}
    for name, (x, y) in pairs.items():
        line: Any = linregress(x, y)
        margin = t.ppf(0.975, len(x) - 2) * line.stderr
        numbers = {"a": line.intercept, "b": line.slope, "R2": 0.0 if y.std() == 0 else line.rvalue**2}
        found[name] = {key: float(value) for key, value in numbers.items()}
        found[name]["interval"] = [float(line.slope - margin), float(line.slope + margin)]
    return found


def report_parallel(found: dict[str, Any]) -> None:
    """Rounds and steps by dimension, the fits, and both claims."""
    from rich.console import Console
    from rich.table import Table

    rows, console = found["rows"], Console(width=140)
    table = Table(title=f"what an error of {ERROR} takes: rounds one after another (and calls per sample)")
    columns = ("d", "parallel midpoint", "its blocks, grid", *SEQUENTIAL, "ddim / rounds", "best / rounds")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        ours = row["parallel_midpoint"]
        steps = [row[solver]["evaluations"] for solver in SEQUENTIAL]
        table.add_row(
            str(row["d"]),
            f"{ours['rounds']:.1f} ({ours['calls']:.0f})",
            f"{ours['blocks']} x {ours['options']['midpoints']}, {SHORT[ours['grid']]}",
            *(f"{count}, {SHORT[row[solver]['grid']]}" for solver, count in zip(SEQUENTIAL, steps, strict=True)),
            f"{row['ddim']['steps'] / ours['rounds']:.1f}",
            f"{min(steps) / ours['rounds']:.1f}",
        )
    console.print(table)
    for name, fit in found["fits"].items():
        low, high = fit["interval"]
        what = (
            f"{name}: {math.exp(fit['a']):.2f} d^b"
            if name.startswith("power")
            else f"rounds = {fit['a']:.2f} + b {name}"
        )
        print(f"{what}, b = {fit['b']:.3f} ({low:.3f} to {high:.3f}), R² = {fit['R2']:.3f}")
    first, last = rows[0], rows[-1]
    growth = last["parallel_midpoint"]["rounds"] / first["parallel_midpoint"]["rounds"]
    allowed = (math.log(last["d"]) / math.log(first["d"])) ** 2
    print(
        f"rounds at most like log^2 d: they grow {growth:.2f} times from d = {first['d']} to {last['d']}, "
        f"log^2 d {allowed:.1f} times: {'holds' if growth <= allowed else 'does not hold'}"
    )
    least = min(row["ddim"]["steps"] / row["parallel_midpoint"]["rounds"] for row in rows)
    print(
        f"at least 5 times fewer rounds than DDIM has steps: {least:.1f} or more: "
        f"{'holds' if least >= 5 else 'does not hold'}"
    )
    print(f"{found['settings']['seconds']} s")


# --- the figure ----------------------------------------------------------------------------------------------------


def draw(found: dict[str, Any], path: Path) -> None:
    """Distances against evaluations in the largest dimension, for both distances; rounds against dimension."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, 3)
    corrector, d = found["corrector"], max(row["d"] for row in found["corrector"]["rows"])
    asked = sorted({row["asked"] for row in corrector["rows"]})
    for axes, against in zip(panels, ("to the law", "to the ODE"), strict=False):
        for number, method in enumerate(METHODS):
            rows = [_row(corrector["rows"], method, d, count, "best") for count in asked]
            if against not in rows[0]:
                continue
            means, spreads = ([f(row[against]) for row in rows] for f in (np.mean, lambda x: np.std(x, ddof=1)))
            axes.errorbar(
                [row["evaluations"] for row in rows],
                means,
                yerr=spreads,
                color=COLOURS[number],
                marker=MARKERS[number],
                markersize=4,
                capsize=2,
                elinewidth=0.8,
                label=method,
            )
        axes.set(xscale="log", yscale="log", xlabel="evaluations per sample")
        axes.set_xticks(asked, [str(count) for count in asked])
        axes.set_xticks([], minor=True)
    floor = next(floor["to the law"] for floor in corrector["floors"] if floor["d"] == d)
    panels[0].axhspan(min(floor), max(floor), color="0.85", label="exact samples, lowest to highest")
    panels[0].set_ylabel("sliced W2 to the law [units of the data]")
    panels[1].set_ylabel("sliced W2 to the ODE's solution [units of the data]")
    settings = corrector["settings"]
    panels[0].set_title(
        f"three modes far apart, d = {d}, {settings['samples']} samples,\n{settings['seeds']} seeds (mean, deviation)",
        fontsize="small",
        loc="left",
    )
    panels[1].set_title("the same, on the same starting noise", fontsize="small", loc="left")
    axes, rows = panels[2], found["parallel"]["rows"]
    dimensions = [row["d"] for row in rows]
    for solver in SEQUENTIAL:
        place = list(METHODS).index(solver)
        counts = [row[solver]["evaluations"] for row in rows]
        axes.loglog(dimensions, counts, color=COLOURS[place], marker=MARKERS[place], markersize=4, label=solver)
    rounds = [row["parallel_midpoint"]["rounds"] for row in rows]
    axes.loglog(dimensions, rounds, color="#000000", marker="X", label="parallel_midpoint")
    fit = found["parallel"]["fits"]["log^2 d"]
    line = [fit["a"] + fit["b"] * math.log(d) ** 2 for d in dimensions]
    axes.loglog(dimensions, line, color="0.5", linestyle=":", label=f"{fit['a']:.1f} + {fit['b']:.3f} ln² d")
    axes.set(xlabel="dimension d", ylabel="calls one after another")
    axes.set_xticks(dimensions, [str(d) for d in dimensions])
    axes.set_xticks([], minor=True)
    axes.set_title(
        f"three modes that overlap, calls for an error of {ERROR},\n"
        f"{rows[-1]['samples']} to {rows[0]['samples']} samples, seed 0",
        fontsize="small",
        loc="left",
    )
    for axes in panels:
        axes.grid(which="major", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="x-small", frameon=False)
    title = "Mixtures of Gaussians with exact scores, cosine schedule; every solver on its best grid"
    figure.suptitle(title, fontsize="small", x=0.01, ha="left")
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    main()
