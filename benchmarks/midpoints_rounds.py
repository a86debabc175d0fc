"""The second half of midpoints.py: rounds of parallel midpoints against the dimension."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from mixtures import COSINE, SHORT, Problem
from torch import Tensor

from mlem.sampling import Sampler
from mlem.solvers import Solver
from mlem.solvers.parallel_midpoint import ParallelMidpoint

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
        """The error of this many steps."""
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
    """The fewest steps of a sequential solver, with its evaluations, on its best grid."""
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
    """Rows of the second table, and fits of rounds to the dimension; at most this many batches."""
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
