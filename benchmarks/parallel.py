"""Wall-clock time of parallel midpoints against sequential solvers at equal error, on a family's largest level.

    python benchmarks/parallel.py FAMILY [--batches 1 4 16] [--device cuda] [--out parallel.json]

Errors are mean squared errors per pixel to a run of DPM-Solver++ 2M in many steps from the same noise, over as many
images as the largest batch has. A sequential solver gets the fewest steps (to 3 percent, on its best of three grids)
whose error is at most that of the parallel one. Then both run in turns, several rounds per batch size; it prints
medians of seconds and, with lowest and highest, of the ratio of the two within a round. Rounds are sequential network
calls; calls are evaluations per image. Parallel midpoints trade calls for rounds: they win if a larger batch takes no
longer, on a GPU with few images, and lose on a CPU.

Writes JSON only with --out.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlem.family import Family
from mlem.files import write_json
from mlem.level import Level
from mlem.sampling import Sampler
from mlem.solvers import Solver
from mlem.solvers.parallel_midpoint import ParallelMidpoint

SEQUENTIAL = ("ddim", "dpm_solver_pp", "randomized_midpoint")
GRIDS = ("uniform", "log_snr", "karras")
Run = tuple[Solver | str, int, str]
"""Solver, steps and grid."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path, help="folder of a trained family")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="batch sizes (default 1 4 16)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each pair is timed (default 5)")
    parser.add_argument("--blocks", type=int, default=6, help="steps of the parallel solver (default 6)")
    parser.add_argument("--midpoints", type=int, default=8, help="midpoints in a block (default 8)")
    parser.add_argument("--tolerance", type=float, default=0.02, help="of the parallel solver (default 0.02)")
    parser.add_argument("--grid", choices=GRIDS, default="log_snr", help="of the parallel solver (default log_snr)")
    parser.add_argument("--reference", type=int, default=300, help="steps of the reference (default 300)")
    parser.add_argument("--most", type=int, default=1000, help="most steps of a sequential solver (default 1000)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="file for the measurements; without it they are only printed")
    options = parser.parse_args()
    level = Family.load(options.family).level()
    comparison = Comparison(level, options.device, max(options.batches), options.reference)
    window = options.blocks * options.midpoints
    ours = ParallelMidpoint(options.midpoints, tolerance=options.tolerance, window=window)
    runs = comparison.equal(ours, options.blocks, options.grid, options.most)
    rows = [row for batch in options.batches for row in comparison.timed(runs, batch, options.rounds)]
    report(rows, level, comparison)
    if options.out is not None:
        device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
        about = {"level": level.name, "data": level.data, "shape": level.shape, "device": device}
        given = {key: value for key, value in vars(options).items() if key not in ("family", "out", "device")}
        about |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "options": given}
        write_json(options.out, {"about": about, "rows": rows})


class Comparison:
    """Runs samplers of one level on the same images."""

    def __init__(self, level: Level, device: str, images: int, steps: int, precision: str = "fp32") -> None:
        self.level, self.device, self.images, self._precision = level, device, images, precision
        self._samplers: dict[tuple[Any, ...], Sampler] = {}
        self._truth: Tensor = self._sampler("dpm_solver_pp", steps, "log_snr").run(range(images)).x

    def _sampler(self, solver: Solver | str, steps: int, grid: str) -> Sampler:
        key = (solver, steps, grid)
        if key not in self._samplers:
            options: dict[str, Any] = {"grid": grid, "device": self.device, "precision": self._precision}
            self._samplers[key] = Sampler(self.level, solver=solver, steps=steps, **options)
        return self._samplers[key]

    def error(self, solver: Solver | str, steps: int, grid: str) -> float:
        """Mean squared error per pixel to the reference."""
        return (self._sampler(solver, steps, grid).run(range(self.images)).x - self._truth).square().mean().item()

    def equal(self, ours: ParallelMidpoint, blocks: int, grid: str, most: int) -> dict[str, Run]:
        """Runs of equal error: parallel midpoints, and every sequential solver that reaches it in `most` steps."""
        runs: dict[str, Run] = {"parallel_midpoint": (ours, blocks, grid)}
        error = self.error(*runs["parallel_midpoint"])
        for solver in SEQUENTIAL:
            found = self.fewest(solver, error, most)
            if found is None:
                print(f"{solver} does not reach {error:.2e} in {most} steps on any grid: left out")
            else:
                runs[solver] = (solver, *found)
        return runs

    def fewest(self, solver: str, error: float, most: int) -> tuple[int, str] | None:
        """The fewest steps, and the grid, with at most this error; None if `most` are too few."""
        best: tuple[int, str] | None = None
        for grid in GRIDS:
            low, high = 0, 4
            # a grid that fails with one step fewer than the best is no better
            limit = most if best is None else best[0] - 1
            if best is not None and (limit < 1 or self.error(solver, limit, grid) > error):
                continue
            while high < limit and self.error(solver, high, grid) > error:
                low, high = high, 2 * high
            if high >= limit:
                high = limit
                if best is None and self.error(solver, high, grid) > error:
                    continue
            while high - low > max(1, 0.03 * high):
                middle = (low + high) // 2 if low == 0 else round(math.sqrt(low * high))
                low, high = (middle, high) if self.error(solver, middle, grid) > error else (low, middle)
            best = (high, grid)
        return best

    def timed(self, runs: dict[str, Run], batch: int, rounds: int) -> list[dict[str, Any]]:
        """One row per run with this batch size; the order of runs changes from round to round."""
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        ledgers = {name: self._sampler(*run).run(range(batch)).ledger for name, run in runs.items()}
        names = list(runs)
        for number in range(rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                seconds[name].append(self._sampler(*runs[name]).run(range(batch)).ledger.wall_seconds)
        rows = []
        for name, (_, steps, grid) in runs.items():
            ratios = [a / b for a, b in zip(seconds[name], seconds["parallel_midpoint"], strict=True)]
            row: dict[str, Any] = {"batch": batch, "solver": name, "steps": steps, "grid": grid}
            row |= {"mse": self.error(*runs[name]), "rounds": ledgers[name].rounds}
            row |= {"calls": ledgers[name].evaluations, "seconds": _spread(seconds[name]), "ratio": _spread(ratios)}
            rows.append(row)
        return rows


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def report(rows: list[dict[str, Any]], level: Level, comparison: Comparison) -> None:
    """The table; a ratio above 1 is a win of the parallel solver."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"level {level.name}, {level.data} {level.shape}, {comparison.device}")
    columns = ("batch", "solver", "steps, grid", "MSE", "rounds", "calls", "seconds", "time / parallel's")
    for column in columns:
        table.add_column(column, justify="left" if column == "solver" else "right")
    for batch, group in itertools.groupby(rows, key=lambda row: row["batch"]):
        for row in group:
            ratio, seconds = row["ratio"], row["seconds"]
            table.add_row(
                str(batch),
                row["solver"],
                f"{row['steps']} {row['grid']}",
                f"{row['mse']:.2e}",
                f"{row['rounds']:.0f}",
                f"{row['calls']:.0f}",
                f"{seconds['median']:.3f}",
                f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})",
            )
        table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
