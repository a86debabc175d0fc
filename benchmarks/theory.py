"""Cost against error on a synthetic hierarchy of drifts, with the levels and probabilities of [J, Theorem 1].

    python benchmarks/theory.py [--quick] [--out benchmarks]

The equation is `dx = f dt + sqrt(2) dW` on [0, 1], `f(x, t) = sin(x + t) / 2`, x(0) uniform on [0, 2 pi). Its levels
are `f^k = f + 2^-k g_k`, `g_k(x, t) = cos(x + t + psi + 2.4 k)`, psi a phase drawn with each path, uniformly, so that
no level is luckier than another; each evaluation of f^k has an accounted cost of 2^(gamma k) (nothing is timed). The
error is the root mean square over paths of the distance at time 1 to Euler-Maruyama with f in 32 times the steps of
the finest run, on the same Brownian path. Nothing is searched for: eps fixes the levels and probabilities
(`mlem.multilevel.theory`) and the step, eps/2. Euler-Maruyama (EM) runs the top level alone.

Weights are collected: F = sum_k w_k f^k, w_k = B_k/p_k - B_{k+1}/p_{k+1}, and f^k counts as evaluated where w_k is not
0. Intervals are 95 percent percentiles of a bootstrap over paths, the same paths for all runs; they cover the sampling
error of the slope, not its approach to the limit.

Second, the limit of small steps at fixed rates p_k / eta. The base level runs in every step, so its cost grows as the
step falls: that is not part of the theorem's statement, and has its own column. The other column is the cost of all the
levels above it, all with p < 1. The error there is the distance to Euler-Maruyama with f in the
same steps, what multilevel adds. Cost at equal error: cost (error / error of the first row)^gamma, as a ratio.

Writes `theory.json` into --out and, unless --quick, `docs/theory.png`.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlem.files import atomic_write, write_json
from mlem.multilevel.coins import COINS
from mlem.multilevel.theory import Theory
from mlem.noise import NoiseStream

GAMMAS = (1.5, 2.5, 3.0, 4.0)
LIPSCHITZ, LENGTH = 0.5, 1.0
METHODS = ("EM", "bernoulli", "systematic")
FINER = 32  # steps of the reference in one step of the finest run
CHUNK = 250  # paths whose coins are in memory at once
LOOKS = {
    "EM": {"color": "#000000", "marker": "o", "linestyle": "-"},
    "bernoulli": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "systematic": {"color": "#0072B2", "marker": "^", "linestyle": ":"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer paths and errors, a few seconds, no figure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of theory.json")
    options = parser.parse_args()
    begin = time.perf_counter()
    paths, halvings = (250, range(3, 7)) if options.quick else (1000, range(5, 12))
    slopes = measure_slopes(GAMMAS, halvings, paths, progress=True)
    limit = measure_limit(steps=(128, 256, 512, 1024), paths=1000 if options.quick else 4000, progress=True)
    report(slopes, limit)
    seconds = round(time.perf_counter() - begin, 1)
    print(f"{seconds} s")
    settings = {"paths": paths, "eps": [2.0**-j for j in halvings], "seconds": seconds}
    write_json(options.out / "theory.json", {"settings": settings, "slopes": slopes, "small steps": limit})
    if not options.quick:
        draw(slopes, Path(__file__).parents[1] / "docs" / "theory.png", f"{paths} paths, seed 0")


class Paths:
    """Solutions of `dx = f dt + sqrt(2) dW` on [0, 1], and what other runs share with them.

    start, psi: (B,). increments: (steps, B), sqrt(2) dW over the steps of the finest run. reference: (B,), x(1) with
    f in `FINER` times as many steps. Everything is float64.
    """

    def __init__(self, count: int, steps: int) -> None:
        indices, fine = torch.arange(count), FINER * steps
        self.start, self.psi = 2 * math.pi * NoiseStream(0, "theory/start").uniform(indices, [0, 1], torch.float64)
        normals, size = NoiseStream(0, "theory/brownian"), math.gcd(steps, 64)
        blocks, x = [], self.start
        # a block of time at once: the fine path of all the time would fill the memory
        for block in range(steps // size):
            noise = normals.normal(indices, [block], (FINER * size,), torch.float64)[0].T.contiguous()
            noise *= math.sqrt(2 * LENGTH / fine)
            x = _euler(x, noise, LENGTH / fine, first=block * len(noise))
            blocks.append(noise.view(size, FINER, count).sum(1))
        self.increments, self.reference = torch.cat(blocks), x

    def run(self, steps: int, cosine: Tensor | float = 0.0, sine: Tensor | float = 0.0) -> Tensor:
        """x(1) by Euler-Maruyama, (B,); the drift is f + cosine cos(x + t + psi) - sine sin(x + t + psi).

        cosine, sine: numbers, or (steps, B): `coefficients` of the levels.
        """
        noise = self.increments.view(steps, -1, len(self.start)).sum(1)
        a, b = (torch.as_tensor(value, dtype=torch.float64).expand(noise.shape) for value in (cosine, sine))
        # a cos(u + psi) - b sin(u + psi), by the sines and cosines of u alone
        cosine = a * torch.cos(self.psi) - b * torch.sin(self.psi)
        sine = a * torch.sin(self.psi) + b * torch.cos(self.psi)
        return _euler(self.start, noise, LENGTH / steps, 0, (cosine, LIPSCHITZ - sine))


def _euler(x: Tensor, noise: Tensor, eta: float, first: int, factors: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x after the steps first, first + 1, .., one for each row of noise; `factors` of cos and sin, or f alone."""
    for n in range(len(noise)):
        u = x + (first + n) * eta
        drift = (
            LIPSCHITZ * torch.sin(u) if factors is None else factors[0][n] * torch.cos(u) + factors[1][n] * torch.sin(u)
        )
        x = x + eta * drift + noise[n]
    return x


def coefficients(levels: range) -> Tensor:
    """The factors of cos(u) and -sin(u) in `2^-k cos(u + 2.4 k)`, u = x + t + psi: (K, 2)."""
    k = torch.tensor(levels, dtype=torch.float64)
    return 2.0 ** -k[:, None] * torch.stack([torch.cos(2.4 * k), torch.sin(2.4 * k)], 1)


def multilevel(paths: Paths, theory: Theory, steps: int, coins: str, seed: int) -> tuple[Tensor, Tensor]:
    """x(1) of each path, (B,), and how often each level was evaluated on it, (B, K), with coins of its own."""
    p = theory.probabilities(LENGTH / steps)
    sums, calls = [], []
    for indices in torch.arange(len(paths.start)).split(CHUNK):
        ratio = torch.ones(len(indices), steps, len(p) + 1, dtype=torch.float64)
        ratio[..., -1] = 0
        random = (p < 1).nonzero()[:, 0]
        if len(random):
            counts = COINS[coins].toss(p[random].expand(steps, -1), seed, indices)
            ratio[..., random] = counts / p[random]
        # f^(kmin-1) = 0, and the weights add to 1: the exact drift is taken once
        weights = -ratio.diff(dim=-1)
        calls.append((weights != 0).sum(1))
        sums.append((weights @ coefficients(theory.levels)).transpose(0, 1))
    cosine, sine = torch.cat(sums, 1).unbind(-1)
    return paths.run(steps, cosine, sine), torch.cat(calls)


def measure_slopes(
    gammas: Sequence[float], halvings: Sequence[int], paths: int, progress: bool = False
) -> list[dict[str, Any]]:
    """A row for each gamma and method: error and mean cost for each eps = 2^-j, j in halvings; slope and interval."""
    steps = [2 ** (j + 1) for j in halvings]
    data = Paths(paths, steps[-1])
    rows = []
    for gamma in gammas:
        theories = [_theory(gamma, 1.0, 2.0**-j) for j in halvings]
        for method in METHODS:
            squares, costs = [], []
            for seed, (theory, count) in enumerate(zip(theories, steps, strict=True)):
                x, cost = _single(data, theory, count) if method == "EM" else _sum(data, theory, count, method, seed)
                squares.append((x - data.reference).square())
                costs.append(cost)
            row = _fit(torch.stack(squares).numpy(), torch.stack(costs).numpy())
            rows.append({"gamma": gamma, "method": method, "eps": [t.eps for t in theories], "steps": steps, **row})
            if progress:
                print(f"gamma {gamma:g}, {method}: slope {row['slope']:.2f}", flush=True)
    return rows


def _theory(gamma: float, c: float, eps: float) -> Theory:
    with warnings.catch_warnings():
        # gamma <= 2 is measured on purpose
        warnings.simplefilter("ignore")
        return Theory(gamma, c, LIPSCHITZ, LENGTH, eps)


def _single(data: Paths, theory: Theory, steps: int) -> tuple[Tensor, Tensor]:
    cosine, sine = coefficients(theory.levels)[-1].tolist()
    return data.run(steps, cosine, sine), torch.full_like(data.start, steps * theory.costs()[-1].item())


def _sum(data: Paths, theory: Theory, steps: int, coins: str, seed: int) -> tuple[Tensor, Tensor]:
    x, calls = multilevel(data, theory, steps, coins, seed)
    return x, calls.double() @ theory.costs()


def _fit(squares: np.ndarray, costs: np.ndarray, replicates: int = 500) -> dict[str, Any]:
    """The slope of log cost on log 1/error, from (E, B) squared errors and costs, and its bootstrap interval."""
    count = squares.shape[1]
    generator = np.random.default_rng(0)
    samples = [np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(replicates)]
    counts = np.stack([np.ones(count), *samples], 1) / count
    errors, means = np.sqrt(squares @ counts), costs @ counts
    x, y = -np.log(errors), np.log(means)
    x, y = x - x.mean(0), y - y.mean(0)
    slopes = (x * y).sum(0) / (x * x).sum(0)
    low, high = np.quantile(slopes[1:], (0.025, 0.975)).tolist()
    return {
        "error": errors[:, 0].tolist(),
        "cost": means[:, 0].tolist(),
        "slope": slopes[0].item(),
        "interval": [low, high],
        "decades": math.log10(errors[0, 0] / errors[-1, 0]),
    }


def measure_limit(
    steps: Sequence[int], paths: int, gamma: float = 3.0, base: int = 2, progress: bool = False
) -> list[dict[str, Any]]:
    """A row for each kind of coins and number of steps, at the rates of one eps: error, cost, cost at equal error."""
    theory = _theory(gamma, 2.0**-base, 2.0 ** -(base + 1))
    data = Paths(paths, steps[-1])
    rows = []
    for coins in ("systematic", "poisson"):
        for count in steps:
            x, calls = multilevel(data, theory, count, coins, seed=0)
            cost = calls.double().mean(0) * theory.costs()
            row = {
                "coins": coins,
                "steps": count,
                "largest p": theory.probabilities(LENGTH / count)[1].item(),
                "error": (x - data.run(count)).square().mean().sqrt().item(),
                "error to reference": (x - data.reference).square().mean().sqrt().item(),
                "cost of base": cost[0].item(),
                "cost above": cost[1:].sum().item(),
            }
            first = next((r for r in rows if r["coins"] == coins), row)
            ratio = row["cost above"] / first["cost above"] * (row["error"] / first["error"]) ** gamma
            rows.append({**row, "at equal error": ratio})
        if progress:
            print(f"small steps, {coins}: done", flush=True)
    return rows


def report(slopes: list[dict[str, Any]], limit: list[dict[str, Any]]) -> None:
    """Both tables, plain."""
    print("\ngamma  method      slope  95% interval    decades  last error    last cost   cost of EM / cost there")
    for row in slopes:
        em = next(r for r in slopes if r["gamma"] == row["gamma"] and r["method"] == "EM")
        low, high = row["interval"]
        print(
            f"{row['gamma']:5g}  {row['method']:10s}  {row['slope']:5.2f}  {low:5.2f} to {high:5.2f}"
            f"  {row['decades']:7.2f}  {row['error'][-1]:10.2e}  {row['cost'][-1]:11.3e}   {gain(em, row):8.3g}"
        )
    print("\ncoins       steps  largest p  error     to reference  cost of base  cost above  at equal error")
    for row in limit:
        print(
            f"{row['coins']:10s}  {row['steps']:5d}  {row['largest p']:9.3f}  {row['error']:.2e}  "
            f"{row['error to reference']:12.2e}  {row['cost of base']:12.1f}  {row['cost above']:10.1f}"
            f"  {row['at equal error']:14.3f}"
        )


def gain(em: dict[str, Any], row: dict[str, Any]) -> float:
    """How many times more EM costs at the smallest error of `row`, on the fitted line of EM."""
    x, y = -np.log(em["error"]), np.log(em["cost"])
    line = y.mean() + em["slope"] * (-math.log(row["error"][-1]) - x.mean())
    return math.exp(line) / row["cost"][-1]


def draw(slopes: list[dict[str, Any]], path: Path, caption: str) -> None:
    """Cost against error, one panel per gamma."""
    from matplotlib.figure import Figure

    gammas = list(dict.fromkeys(row["gamma"] for row in slopes))
    figure = Figure(figsize=(3 * len(gammas), 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(gammas), squeeze=False)[0]
    for gamma, axes in zip(gammas, panels, strict=True):
        for row in (row for row in slopes if row["gamma"] == gamma):
            low, high = row["interval"]
            label = f"{row['method']}: {row['slope']:.2f} ({low:.2f} to {high:.2f})"
            axes.loglog(row["error"], row["cost"], markersize=4, label=label, **LOOKS[row["method"]])
        axes.set_title(rf"$\gamma$ = {gamma:g}", fontsize="medium", loc="left")
        axes.set_xlabel("root-mean-square error")
        axes.grid(which="major", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(title="slope of log cost", fontsize="x-small", title_fontsize="x-small", frameon=False)
    panels[0].set_ylabel("cost [evaluations of level 0]")
    title = f"Synthetic hierarchy, parameters from the theorem; {caption}"
    figure.suptitle(title, fontsize="small", x=0.01, ha="left")
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    main()
