"""Gradients to a fixed Wasserstein-2 distance against dimension: randomized midpoint and underdamped Langevin.

    python benchmarks/logconcave.py [--quick] [--out benchmarks]

The distance is fixed in units of x, the same at every dimension d. That is the W2 <= eps of the theorems, whose costs
are then O~(d^(1/2)) (score frozen over a step) and O~(d^(1/3)) (randomized midpoint). Divided by sqrt(d) there would be
nothing to see: on a target with independent coordinates the scaled distance of the first method has no d in it at all.

**Law.** Target N(0, I), friction 2, from x = 0 and v ~ N(0, I). Both methods are linear there and keep the distribution
of x rotation invariant, so it is N(0, S I): S a number for the frozen score, and for the randomized midpoint a random
number, a function of the midpoints, which all coordinates of a chain share. Between such distributions W2 is that of
the radii, in one dimension: no bounds are used, and no x is drawn. S is computed with the library's own steps, for 4096
draws of midpoints; its mean over the draws is replaced by the exact one. `step`: gradients per unit of time in
stationarity; `run`: gradients from the start until W2 <= eps for good, with the best step. `covariance`: the same for
the randomized midpoint as if its distribution were N(0, E[S] I). That is what the covariance alone shows, or one
midpoint per coordinate: E[S] - 1 falls as h^3 on every Gaussian, which would give d^(1/6). The true distribution has
d^(1/3), because S, common to all coordinates, fluctuates by h^(3/2).

**Path.** A target that is neither Gaussian nor a product, `V(x) = |x|^2 / 2 + sum_i sqrt(1 + (x_i - x_{i+1})^2)`
(cyclic, m = 1, L = 5, friction 2 sqrt(L)). The distance is the root mean square of |x - x*| at time 4, x* on the same
Brownian path from the same start by the randomized midpoint in steps of 1/64. It bounds W2 to the law of the diffusion
at that time from above, and is what the theorems bound; W2 itself may fall faster. Starts are 48 steps of 1/8 old.

Exponents are slopes of log cost on log d. Intervals are 95 percent percentiles of a bootstrap over draws (Law, step) or
over chains (Path); they cover only the sampling error. The frozen score has none in Law: nothing is drawn. `run` is in
whole steps, and includes the logarithm hidden by O~: a time ln(sqrt(d) / eps), which adds 0.095 to the exponents here.

Writes `logconcave.json` to --out and, unless --quick, `docs/logconcave.png`.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import chi
from torch import Tensor

from mlem.files import atomic_write, write_json
from mlem.langevin import Kernel, randomized_midpoint_step, underdamped_step
from mlem.noise import NoiseStream

METHODS = ("underdamped", "randomized midpoint")
GRADIENTS = {"underdamped": 1, "randomized midpoint": 2, "covariance": 2}
THEORY = {"underdamped": "1/2", "randomized midpoint": "1/3", "covariance": "1/6"}
LOOKS = {
    "underdamped": {"color": "#000000", "marker": "o", "linestyle": "-"},
    "randomized midpoint": {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    "covariance": {"color": "#999999", "marker": "^", "linestyle": ":"},
}
REPLICATES = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer draws, chains and dimensions, no figure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of logconcave.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin, used = time.perf_counter(), time.process_time()
    dimensions = [2**j for j in range(3, 8 if options.quick else 12)]
    rows = measure_law(dimensions, 512 if options.quick else 4096)
    rows += measure_path(dimensions, 4 if options.quick else 24)
    report(rows)
    seconds = round(time.perf_counter() - begin, 1)
    work = round(time.process_time() - used, 1)
    print(f"{seconds} s, {work} s of processor time")
    settings = {"law": {"eps": LAW_EPS}, "path": {"eps": PATH_EPS, "time": PATH_TIME}}
    settings |= {"seconds": seconds, "processor seconds": work}
    write_json(options.out / "logconcave.json", {"settings": settings, "rows": rows})
    if not options.quick:
        draw(rows, Path(__file__).parents[1] / "docs" / "logconcave.png")


# --- Law -----------------------------------------------------------------------------------------------------------

LAW_EPS, LAW_FRICTION, LAW_TIME = 0.05, 2.0, 16.0
LAW_STEPS = {
    "underdamped": [2.0 ** (-j / 4) for j in range(4, 35)],
    "randomized midpoint": [2.0 ** (-j / 4) for j in range(-1, 15)],
}
GROUPS = 32  # of draws of S, each taken at its mean
PROBABILITIES = (np.arange(200) + 0.5) / 200


def linear_step(method: str, h: float, a: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(A, N): the library's step on V = x^2 / 2 is (x', v') = A (x, v) + N z, (B, 2, 2) and (B, 2, 4); a: (B,)."""
    units = torch.eye(6, dtype=torch.float64).expand(len(a), 6, 6)
    x, v, normals = units[:, 0], units[:, 1], units[:, 2:].movedim(1, 0).unflatten(0, (2, 2))
    if method == "underdamped":
        state = underdamped_step(-x, x, v, Kernel.of(LAW_FRICTION, h), *normals[0])
    else:
        state = randomized_midpoint_step(lambda x: -x, x, v, LAW_FRICTION, h, a, normals)
    matrix = torch.stack(state, 1).numpy()
    return matrix[..., :2], matrix[..., 2:]


def variances(method: str, h: float, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """The variance S of each coordinate of x after each step: (n, B), and its exact mean (n,)."""
    steps = math.ceil(LAW_TIME / h)
    nodes, weights = np.polynomial.legendre.leggauss(24)
    A, N = linear_step(method, h, torch.from_numpy((nodes + 1) / 2))
    mean_map = np.einsum("k,kij,klm->iljm", weights / 2, A, A).reshape(4, 4)
    mean_noise = np.einsum("k,kij,klj->il", weights / 2, N, N)
    mean, means = np.diag([0.0, 1.0]), []
    covariance, values = np.tile(mean, (draws, 1, 1)), []
    stream, indices = NoiseStream(0, "logconcave/law"), torch.arange(draws)
    for i in range(steps):
        mean = (mean_map @ mean.ravel()).reshape(2, 2) + mean_noise
        means.append(mean[0, 0])
        if method != "underdamped":
            A, N = linear_step(method, h, stream.uniform(indices, [i], torch.float64)[0])
            covariance = A @ covariance @ A.swapaxes(1, 2) + N @ N.swapaxes(1, 2)
            values.append(covariance[:, 0, 0])
    return np.array(values) if values else np.array(means)[:, None], np.array(means)


def spread(values: np.ndarray, mean: float) -> np.ndarray:
    """Square roots of S, of mean `mean`, in groups of equal probability: (GROUPS,), or (1,) for one value."""
    ordered = np.sort(values - values.mean() + mean)
    return np.sqrt(ordered.reshape(min(len(ordered), GROUPS), -1).mean(1))


@functools.cache
def chi_tables(d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantiles of chi_d at PROBABILITIES, and a table of its distribution function."""
    r = np.linspace(0, 2 * chi.ppf(PROBABILITIES[-1], d), 4000)
    return chi.ppf(PROBABILITIES, d), r, chi.cdf(r, d)


def radial_distance(scales: np.ndarray, d: int) -> float:
    """W2 between the mixture of N(0, s^2 I) over s in `scales`, rising, and N(0, I), in d dimensions."""
    if len(scales) == 1:
        return math.sqrt(d) * abs(scales[0] - 1)
    exact, table, distribution = chi_tables(d)
    r = np.linspace(0.9 * exact[0] * scales[0], 1.1 * exact[-1] * scales[-1], 400)
    cdf = np.interp(r[:, None] / scales, table, distribution).mean(1)
    return math.sqrt(np.mean((np.interp(PROBABILITIES, cdf, r) - exact) ** 2))


def measure_law(dimensions: Sequence[int], draws: int) -> list[dict[str, Any]]:
    """Rows for `step` and `run` of both methods and of the covariance alone."""
    rows = []
    for method in METHODS:
        steps = LAW_STEPS[method]
        laws = [variances(method, h, draws) for h in steps]
        ends = [(values[-1], means[-1]) for values, means in laws]
        generator = np.random.default_rng(0)
        choices: list[Any] = [slice(None)]
        if method != "underdamped":
            choices += [generator.integers(draws, size=draws) for _ in range(REPLICATES)]
        spreads = [[spread(values[choice], mean) for values, mean in ends] for choice in choices]
        costs = [
            [step_cost(method, steps, [radial_distance(s, d) for s in row], LAW_EPS) for d in dimensions]
            for row in spreads
        ]
        rows.append(_row("law, step", method, dimensions, np.array(costs)))
        runs = [min(_run(method, h, law, d) for h, law in zip(steps, laws, strict=True)) for d in dimensions]
        rows.append(_row("law, run", method, dimensions, np.array([runs])))
        if method != "underdamped":
            alone = [
                step_cost(method, steps, [math.sqrt(d) * abs(math.sqrt(mean) - 1) for _, mean in ends], LAW_EPS)
                for d in dimensions
            ]
            rows.append(_row("law, step", "covariance", dimensions, np.array([alone])))
        print(f"law, {method}: done", flush=True)
    return rows


def _run(method: str, h: float, law: tuple[np.ndarray, np.ndarray], d: int) -> float:
    """Gradients until W2 <= LAW_EPS for good, by bisection; infinite if never."""
    values, means = law

    def near(i: int) -> bool:
        return radial_distance(spread(values[i], means[i]), d) <= LAW_EPS

    if not near(len(means) - 1):
        return math.inf
    far, end = 0, len(means) - 1
    while end - far > 1:
        middle = (far + end) // 2
        far, end = (far, middle) if near(middle) else (middle, end)
    return GRADIENTS[method] * (end + 1)


def step_cost(method: str, steps: Sequence[float], errors: Sequence[float], eps: float) -> float:
    """Gradients in a unit of time at error eps, interpolated in logarithms; steps falling."""
    order = np.argsort(errors)
    log_h = np.interp(math.log(eps), np.log(errors)[order], np.log(steps)[order], left=math.nan, right=math.nan)
    return GRADIENTS[method] / math.exp(log_h)


# --- Path ----------------------------------------------------------------------------------------------------------

PATH_EPS, PATH_TIME, PATH_FRICTION = 0.4, 4.0, 2 * math.sqrt(5)
FINE, LEVELS = 1 / 64, 6  # steps of FINE 2^j, j = 1 .. LEVELS


def path_score(x: Tensor) -> Tensor:
    """-grad V for V = |x|^2 / 2 + sum_i sqrt(1 + (x_i - x_{i+1})^2), cyclic."""
    difference = x - x.roll(-1, -1)
    slope = difference * torch.rsqrt(1 + difference.square())
    return slope.roll(1, -1) - slope - x


class Noise(NamedTuple):
    """The noise of x and v over a stretch of time, given as a number or (B,): (B, d) each."""

    time: Any
    x: Tensor
    v: Tensor

    def then(self, later: Noise) -> Noise:
        k = Kernel.of(PATH_FRICTION, later.time).like(self.x)
        return Noise(self.time + later.time, self.x + k.x_from_v * self.v + later.x, k.decay * self.v + later.v)

    def normals(self) -> Tensor:
        """The standard normals that give this noise: (2, B, d)."""
        k = Kernel.of(PATH_FRICTION, self.time).like(self.x)
        z_x = self.x / k.noise_xx
        return torch.stack([z_x, (self.v - k.noise_vx * z_x) / k.noise_vv])

    def where(self, condition: Tensor, other: Noise) -> Noise:
        pick = condition[:, None]
        return Noise(
            torch.where(condition, self.time, other.time),
            torch.where(pick, self.x, other.x),
            torch.where(pick, self.v, other.v),
        )


class Stretch(NamedTuple):
    """The Brownian path over a step of length h, in two parts: before and after the midpoint of each chain."""

    h: float
    before: Noise
    after: Noise

    def join(self, later: Stretch, coin: Tensor) -> Stretch:
        """Both stretches; the midpoint is that of the first where coin, (B,), says so: uniform if both were."""
        return Stretch(
            self.h + later.h,
            self.before.where(coin, self.before.then(self.after).then(later.before)),
            self.after.then(later.before).then(later.after).where(coin, later.after),
        )

    def step(self, method: str, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The library's step on this path."""
        if method == "underdamped":
            noise = self.before.then(self.after)._replace(time=self.h)
            return underdamped_step(path_score(x), x, v, Kernel.of(PATH_FRICTION, self.h), *noise.normals())
        normals = torch.stack([self.before.normals(), self.after.normals()])
        return randomized_midpoint_step(path_score, x, v, PATH_FRICTION, self.h, self.before.time / self.h, normals)


class Source:
    """Fresh stretches of path for B chains in d dimensions."""

    def __init__(self, chains: int, d: int) -> None:
        self.indices, self.d, self.slot = torch.arange(chains), d, 0
        self._normals, self._uniforms = NoiseStream(0, f"logconcave/path/{d}"), NoiseStream(0, "logconcave/midpoint")

    def uniform(self) -> Tensor:
        self.slot += 1
        return self._uniforms.uniform(self.indices, [self.slot], torch.float64)[0]

    def stretch(self, h: float) -> Stretch:
        a = self.uniform()
        z = self._normals.normal(self.indices, [self.slot], (4, self.d), torch.float64)[0].movedim(1, 0)
        return Stretch(h, self._noise(h * a, z[:2]), self._noise(h * (1 - a), z[2:]))

    def _noise(self, time: Tensor, z: Tensor) -> Noise:
        still = torch.zeros_like(z[0])
        return Noise(time, *Kernel.of(PATH_FRICTION, time).drift(still, still, *z))


def path_errors(d: int, chains: int) -> dict[str, np.ndarray]:
    """|x - x*|^2 at PATH_TIME for each step FINE 2^j and chain: (LEVELS, B)."""
    source = Source(chains, d)
    x = torch.zeros(chains, d, dtype=torch.float64)
    v = source.stretch(1.0).after.v
    for _ in range(48):
        x, v = source.stretch(1 / 8).step("randomized midpoint", x, v)
    exact = (x, v)
    states = {method: [(x, v)] * LEVELS for method in METHODS}
    waiting: list[Stretch] = []
    for _ in range(round(PATH_TIME / FINE)):
        stretch, level = source.stretch(FINE), 0
        exact = stretch.step("randomized midpoint", *exact)
        # a binary counter: two stretches of one length make one of twice the length
        while waiting and waiting[-1].h == stretch.h and level < LEVELS:
            stretch = waiting.pop().join(stretch, source.uniform() < 0.5)
            for method in METHODS:
                states[method][level] = stretch.step(method, *states[method][level])
            level += 1
        if level < LEVELS:
            waiting.append(stretch)
    return {method: np.stack([(x - exact[0]).square().sum(1).numpy() for x, _ in states[method]]) for method in METHODS}


def measure_path(dimensions: Sequence[int], least: int) -> list[dict[str, Any]]:
    """One row per method; at least `least` chains, more for small d."""
    steps = [FINE * 2.0**j for j in range(1, LEVELS + 1)]
    costs: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    errors: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    generator = np.random.default_rng(0)
    for d in dimensions:
        chains = max(least, 4096 // d)
        squares = path_errors(d, chains)
        choices = [np.arange(chains), *generator.integers(chains, size=(REPLICATES, chains))]
        for method in METHODS:
            means = [np.sqrt(squares[method][:, choice].mean(1)) for choice in choices]
            errors[method].append(means[0].tolist())
            costs[method].append([step_cost(method, steps, mean.tolist(), PATH_EPS) for mean in means])
        print(f"path, d = {d}: done", flush=True)
    return [
        _row("path, step", method, dimensions, np.array(costs[method]).T) | {"steps": steps, "errors": errors[method]}
        for method in METHODS
    ]


# --- results -------------------------------------------------------------------------------------------------------


def _row(what: str, method: str, dimensions: Sequence[int], costs: np.ndarray) -> dict[str, Any]:
    """costs: (1 + replicates, D), the first measured; the slope of log cost on log d, and its interval.

    Without the dimensions for which the largest step was still too good.
    """
    known = np.isfinite(costs).all(0)
    costs, d = costs[:, known], np.array(dimensions)[known]
    x = np.log(d) - np.mean(np.log(d))
    slopes = np.log(costs) @ x / (x @ x)
    row = {"what": what, "method": method, "d": d.tolist(), "cost": costs[0].tolist(), "slope": slopes[0].item()}
    return row | {"interval": np.quantile(slopes[1:], (0.025, 0.975)).tolist() if len(costs) > 1 else None}


def report(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("measured", "method", "exponent of d", "95% interval", "theory", "cost, first and last d")
    for row in rows:
        interval = "-" if row["interval"] is None else "{:.3f} to {:.3f}".format(*row["interval"])
        ends = f"{row['cost'][0]:.3g} at {row['d'][0]}, {row['cost'][-1]:.4g} at {row['d'][-1]}"
        table.add_row(row["what"], row["method"], f"{row['slope']:.3f}", interval, THEORY[row["method"]], ends)
    Console(width=120).print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Cost against dimension, one panel per measurement."""
    from matplotlib.figure import Figure

    panels = {
        "law, step": ("Gaussian, exact distribution", f"gradients per unit of time at W2 = {LAW_EPS}"),
        "law, run": ("Gaussian, exact distribution, from the mode", f"gradients to W2 = {LAW_EPS}"),
        "path, step": ("not Gaussian, shared path", f"gradients per unit of time at distance {PATH_EPS}"),
    }
    figure = Figure(figsize=(11, 3.8), dpi=150, layout="constrained")
    for axes, (what, (title, label)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for row in (row for row in rows if row["what"] == what):
            name = "midpoint, covariance alone" if row["method"] == "covariance" else row["method"]
            interval = "" if row["interval"] is None else " ({:.2f} to {:.2f})".format(*row["interval"])
            line = f"{name}: {row['slope']:.2f}{interval}"
            axes.loglog(row["d"], row["cost"], markersize=4, label=line, **LOOKS[row["method"]])
        axes.set_title(title, fontsize="medium", loc="left")
        axes.set_xlabel("dimension d")
        axes.set_ylabel(label)
        axes.grid(which="major", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(title="exponent of d", fontsize="x-small", title_fontsize="x-small", frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    main()
