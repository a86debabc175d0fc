"""Error against cost on a trained family: every level alone, and plans that share the work. Writes a figure and JSON.

    python train.py experiment=dead_leaves16
    python benchmarks/multilevel.py runs/dead_leaves16/family

Every sampler starts from the same noise and reads the same Brownian path as a many-step reference of the largest level.
Cost is counted in FLOPs, in evaluations of the largest level; wall time stands beside it. Rows are kept as they come
(`benchmarks/multilevel.json`): a run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlem import Family
from mlem.comparison.equal_error import Setting, cost_ratio, frontier
from mlem.files import write_text
from mlem.multilevel.spec import PlanSpec
from mlem.sampling import Sampler, blocks

KINDS = {"sde": ("ddpm", 1000, (2e-2, 1e-2, 5e-3, 2e-3)), "ode": ("dpm_solver_pp", 300, (1e-3, 1e-4, 1e-5))}
"""Reference solver, its steps, and the errors at which costs are compared."""
PLAIN: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {
    "sde": [
        (solver, grid, (8, 12, 16, 24, 32, 48, 64, 96))
        for solver in ("ddpm", "dpm_solver_pp_sde")
        for grid in ("uniform", "log_snr", "karras")
    ],
    "ode": [
        *[("dpm_solver_pp", grid, (6, 8, 12, 16, 24, 32, 48, 64, 80)) for grid in ("log_snr", "uniform")],
        ("dpm_solver_pp", "karras", (12, 24, 48, 80)),
        *[("heun", grid, (8, 16, 24)) for grid in ("log_snr", "uniform", "karras")],
        ("ddim", "uniform", (8, 16, 32, 48)),
    ],
}
"""Solver, grid and steps of the largest level alone."""
SPENT: dict[str, tuple[float, ...]] = {
    "sde": (5, 6, 8, 11, 15, 20, 28, 40, 56),
    "ode": (6, 8, 10, 12, 16, 20, 28, 40, 52),
}
"""Costs of plans, in evaluations of the largest level."""
HELD: dict[str, list[tuple[str, str, int, int]]] = {
    "sde": [("ddpm", "uniform", steps, 0) for steps in (48, 64, 128, 256)],
    "ode": [
        *[("dpm_solver_pp", "log_snr", steps, 1) for steps in (32, 48, 96, 128)],
        ("dpm_solver_pp", "uniform", 48, 1),
    ],
}
"""Solver, grid, steps and order of held corrections."""


class Comparison:
    """Runs samplers on fixed images and keeps a row for each."""

    def __init__(self, folder: Path, images: int, batch_size: int, out: Path, device: str) -> None:
        self.family, self.out, self.device = Family.load(folder), out, device
        self.blocks, self._images = blocks(range(images), batch_size), images
        kept = json.loads(out.read_text()) if out.exists() else {"rows": []}
        self.about = {
            "family": self.family.data,
            "weights": self.family.weights_hash,
            "images": images,
            "device": device,
        }
        if kept["rows"] and kept["about"] != self.about:
            raise SystemExit(f"{out} holds other measurements ({kept['about']}); move it away, or choose another --out")
        self.rows: list[dict[str, Any]] = kept["rows"]
        self._truths: dict[str, torch.Tensor] = {}

    def truth(self, kind: str) -> torch.Tensor:
        """The reference samples, run once."""
        if kind not in self._truths:
            solver, steps, _ = KINDS[kind]
            path = self.out.with_name(f"{self.out.stem}_{kind}_reference_{self.about['weights']}_{self._images}.pt")
            if not path.exists():
                print(f"reference: {solver}, {steps} steps", flush=True)
                torch.save(self._run(self.family.level(), solver, steps, None, None)[0], path)
            self._truths[kind] = torch.load(path, weights_only=True)
        return self._truths[kind]

    def _run(
        self, model: Any, solver: str, steps: int, grid: str | None, plan: Any
    ) -> tuple[torch.Tensor, Sampler, Any]:
        sampler = Sampler(model, solver=solver, steps=steps, grid=grid, plan=plan, device=self.device)
        results = [sampler.run(block) for block in self.blocks]
        ledger = results[0].ledger
        for result in results[1:]:
            ledger.add(result.ledger)
        return torch.cat([result.x for result in results]).cpu(), sampler, ledger

    def measure(
        self, kind: str, name: str, level: str, solver: str, grid: str, steps: int, spec: PlanSpec | None
    ) -> None:
        """Add the row of this sampler, unless it is there."""
        key = [kind, name, level, solver, grid, steps, None if spec is None else [spec.budget, spec.seed]]
        key[-1] = key[-1] if spec is None else [*key[-1], spec.delta]
        if any(row["key"] == key for row in self.rows):
            return
        model = self.family.level(level) if spec is None else self.family
        try:
            x, sampler, ledger = self._run(model, solver, steps, grid, spec)
        except ValueError as error:
            print(f"left out: {name} {solver} {steps}: {error}", flush=True)
            return
        errors = (x - self.truth(kind)).square().flatten(1).mean(1)
        flops = sum(cost.flops for cost in ledger.levels.values()) / ledger.images / self.family.level().flops
        about = {} if sampler.plan is None else dict(sampler.plan.about)
        calls = {one: cost.calls / ledger.images for one, cost in ledger.levels.items()}
        self.rows.append(
            {
                "key": key,
                "cost": flops,
                "calls": calls,
                "seconds": ledger.wall_seconds / ledger.images,
                "network_seconds": ledger.network_seconds / ledger.images,
                "mse": errors.mean().item(),
                "image_mse": [float(f"{error:.4g}") for error in errors.tolist()],
                "predicted_mse": about.get("predicted_mse"),
                "predicted_cost": about.get("expected_cost"),
            }
        )
        write_rows(self.out, {"about": self.about, "rows": self.rows})
        words = f"{name:22s} {level or '+'.join(calls):10s} {solver} {grid} {steps}"
        print(
            f"{words:60s} cost {flops:6.2f}  MSE {errors.mean():.2e}  predicted {about.get('predicted_mse') or 0:.2e}",
            flush=True,
        )


def write_rows(path: Path, found: dict[str, Any]) -> None:
    """JSON with a line for each row of its lists: indented, the errors of the images would take one each."""
    parts = []
    for name, value in found.items():
        lines = [json.dumps(one, allow_nan=False) for one in value] if isinstance(value, list) else []
        text = "[\n" + ",\n".join(lines) + "\n]" if lines else json.dumps(value, allow_nan=False)
        parts.append(f"{json.dumps(name)}: {text}")
    write_text(path, "{" + ",\n".join(parts) + "}\n")


def jobs(comparison: Comparison, plans: int) -> Iterator[tuple[str, str, str, str, str, int, PlanSpec | None]]:
    """What is measured: the most telling first."""
    top = comparison.family.level().name
    for kind in KINDS:
        for (solver, grid, steps, order), spent in itertools.product(HELD[kind], SPENT[kind]):
            spec = PlanSpec(budget=min(1.0, float(spent) / steps), order=order, cost="flops")
            yield kind, "hindsight", "", solver, grid, steps, spec
        for solver, grid, several in PLAIN[kind]:
            for steps in several:
                yield kind, "plain", top, solver, grid, steps, None
        for level in comparison.family.names[:-1]:
            for steps in (8, 16, 32, 64):
                yield kind, "plain", level, *PLAIN[kind][0][:2], steps, None
    for coins, spent, seed in itertools.product(("bernoulli", "systematic"), (8, 16, 32, 64), range(plans)):
        if seed >= plans // 2 and (spent == 64 or coins == "systematic"):  # half as many where they cost or spread less
            continue
        options: dict[str, Any] = {"budget": spent / 128, "cost": "flops", "estimator": "jump", "coins": coins}
        yield "sde", f"jump, {coins}", "", "ddpm", "uniform", 128, PlanSpec(**options, seed=seed)
    for spent, seed in itertools.product((96, 128), range(plans // 2)):  # what Bernoulli coins need for small errors
        options = {"budget": spent / 256, "cost": "flops", "estimator": "jump", "coins": "bernoulli"}
        yield "sde", "jump, bernoulli", "", "ddpm", "uniform", 256, PlanSpec(**options, seed=seed)
    for kind, (solver, grid, steps, order) in (("sde", HELD["sde"][2]), ("ode", HELD["ode"][1])):
        for spent in SPENT[kind][2::2]:
            spec = PlanSpec(budget=min(1.0, spent / steps), order=order, cost="flops", estimator="held")
            yield kind, "held", "", solver, grid, steps, spec


def delta_jobs(trials: int) -> Iterator[tuple[str, str, str, str, str, int, PlanSpec | None]]:
    """Learned coefficients under shifts Delta, `trials` draws each, as in Fig. 1 of [J]."""
    for delta, seed in itertools.product((-3.0, -2.0, -1.0, 0.0, 1.0), range(trials)):
        spec = PlanSpec(
            delta=delta, probabilities="learned", estimator="jump", coins="systematic", cost="flops", seed=seed
        )
        yield "sde", "learned, systematic", "", "ddpm", "uniform", 64, spec


def settings(rows: list[dict[str, Any]]) -> list[Setting]:
    """Rows that differ in nothing but the seed of the coins are draws of one setting."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        _, name, level, solver, grid, steps, dial = row["key"]
        groups.setdefault((name, level, solver, grid, steps, dial and (dial[0], dial[2])), []).append(row)
    return [
        Setting(np.array([row["cost"] for row in group]), np.array([row["image_mse"] for row in group]))
        for group in groups.values()
    ]


def ratios(comparison: Comparison, kind: str, ours: str, theirs: Any, draws: int = 400) -> list[dict[str, float]]:
    """Cost of theirs over cost of ours at equal error, with a 95 percent interval over images."""
    mine = settings([row for row in comparison.rows if row["key"][0] == kind and row["key"][1] == ours])
    others = settings([row for row in comparison.rows if row["key"][0] == kind and theirs(row["key"])])
    random = np.random.default_rng(0)
    found = []
    for error in KINDS[kind][2]:
        one = cost_ratio(others, mine, error, random, draws=draws)
        found.append({"mse": error, "cost": one.cost, "ratio": one.ratio, "low": one.low, "high": one.high})
    return found


RIVALS = (
    ("sde", "hindsight", "plain DDPM", lambda key: key[1] == "plain" and key[3] == "ddpm"),
    ("sde", "hindsight", "plain SDE, any", lambda key: key[1] == "plain"),
    ("sde", "hindsight", "Bernoulli coins", lambda key: key[1] == "jump, bernoulli"),
    ("sde", "held", "plain DDPM", lambda key: key[1] == "plain" and key[3] == "ddpm"),
    ("sde", "jump, systematic", "plain DDPM", lambda key: key[1] == "plain" and key[3] == "ddpm"),
    ("sde", "jump, systematic", "Bernoulli coins", lambda key: key[1] == "jump, bernoulli"),
    ("ode", "hindsight", "plain ODE, any", lambda key: key[1] == "plain"),
    ("ode", "held", "plain ODE, any", lambda key: key[1] == "plain"),
)


def summary(comparison: Comparison) -> list[dict[str, Any]]:
    """Print and return the cost ratios at equal error."""
    table = []
    for kind, ours, rival, theirs in RIVALS:
        if not any(row["key"][:2] == [kind, ours] for row in comparison.rows):
            continue
        for found in ratios(comparison, kind, ours, theirs):
            # JSON has no NaN: null where one side was not measured down to that error
            known = {name: value if math.isfinite(value) else None for name, value in found.items()}
            table.append({"kind": kind, "ours": ours, "rival": rival} | known)
            print(
                f"{kind} {ours:18s} against {rival:18s} at MSE {found['mse']:.0e}: cost {found['cost']:6.2f}, ratio "
                f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
            )
    predicted = [
        (row["predicted_mse"] / row["mse"], row["key"][0])
        for row in comparison.rows
        if row["predicted_mse"] and row["key"][1] == "hindsight"
    ]
    for kind in KINDS:
        found = np.array([ratio for ratio, of in predicted if of == kind])
        if len(found):
            low, middle, high = np.percentile(found, (10, 50, 90))
            spread = f"[10 to 90 percent: {low:.2f}, {high:.2f}]"
            print(f"{kind}: predicted over measured MSE of hindsight plans: {middle:.2f} {spread}")
    return table


PAIRS = (
    ("sde", ("ddpm", "uniform", 32), ("ddpm", "uniform", 64, 15.0)),
    ("ode", ("dpm_solver_pp", "log_snr", 32), ("dpm_solver_pp", "log_snr", 48, 16.0)),
)
"""The largest level alone, and a plan of about the same error at the cost given last."""


def paired(comparison: Comparison, rounds: int) -> list[dict[str, Any]]:
    """Wall time of PAIRS, run in turns on one batch: time of the level alone over time of the plan."""
    found = []
    for kind, (solver, grid, steps), (same, plan_grid, plan_steps, spent) in PAIRS if rounds else ():
        spec = PlanSpec(budget=spent / plan_steps, cost="flops")
        top = comparison.family.level()
        alone = Sampler(top, solver=solver, steps=steps, grid=grid, device=comparison.device)
        shared = Sampler(
            comparison.family, solver=same, steps=plan_steps, grid=plan_grid, plan=spec, device=comparison.device
        )
        block, ratios_, flops, errors = comparison.blocks[0], [], [], []
        for _ in range(rounds):
            results = [sampler.run(block) for sampler in (alone, shared)]
            seconds = [result.ledger.wall_seconds for result in results]
            ratios_.append(seconds[0] / seconds[1])
            flops = [sum(cost.flops for cost in result.ledger.levels.values()) for result in results]
            truth = comparison.truth(kind)[: len(block)]
            errors = [(result.x.cpu() - truth).square().mean().item() for result in results]
        words = f"{kind}: {solver} {grid} {steps} over a plan of {plan_steps} steps"
        words += f": MSE {errors[0]:.2e} and {errors[1]:.2e}"
        spread = f"[{min(ratios_):.2f}, {max(ratios_):.2f}]"
        print(f"{words}; FLOPs {flops[0] / flops[1]:.2f}, wall time {np.median(ratios_):.2f} {spread}, {rounds} rounds")
        one = {"kind": kind, "mse": errors, "flops_ratio": flops[0] / flops[1], "wall_ratios": ratios_}
        found.append(one | {"batch": len(block), "threads": torch.get_num_threads()})
    return found


STYLES = {
    "hindsight": ("#D55E00", "o"),
    "held": ("#E69F00", "s"),
    "jump, systematic": ("#009E73", "^"),
    "jump, bernoulli": ("#CC79A7", "v"),
    "learned, systematic": ("#56B4E9", "D"),
}
LINES = {"ddpm": "-", "ddim": "-.", "dpm_solver_pp": "-", "dpm_solver_pp_sde": "--", "heun": ":"}


def draw(comparison: Comparison, path: Path) -> None:
    """The error-against-cost figure: one panel each for the SDE and the ODE."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", dpi=150)
    for axes, kind in zip(panels, KINDS, strict=True):
        _draw_levels(axes, comparison, kind)
        for name, (colour, marker) in STYLES.items():
            points = [row for row in comparison.rows if row["key"][:2] == [kind, name]]
            if points:
                bars = [np.std(row["image_mse"], ddof=1) / math.sqrt(len(row["image_mse"])) for row in points]
                places = [row["cost"] for row in points], [row["mse"] for row in points]
                style = {"color": colour, "markersize": 4, "elinewidth": 0.6}
                axes.errorbar(*places, bars, fmt=marker, label=f"levels together: {name}", **style)
        solver, steps, _ = KINDS[kind]
        top = comparison.family.level().name
        axes.set(xscale="log", yscale="log", xlabel=f"cost of a sample [evaluations of level {top}, by FLOPs]")
        axes.set_ylabel("mean squared error to the reference")
        title = {"sde": "SDE", "ode": "ODE"}[kind]
        axes.set_title(f"{title}; reference: {solver}, level {top}, {steps} steps, same noise", fontsize=9)
        axes.grid(which="major", color="0.9")
        axes.legend(fontsize=6, frameon=False)
    ratios_ = " : ".join(f"{level.flops / comparison.family.levels[0].flops:.0f}" for level in comparison.family.levels)
    names = ", ".join(comparison.family.names)
    figure.suptitle(
        f"{comparison.family.data}, levels {names} (FLOPs {ratios_}), {comparison.about['images']} images, seed 0; "
        f"{comparison.about['device']}; alone: the best grid; bars: one standard error over images; "
        "a point a draw of coins",
        fontsize=9,
    )
    figure.savefig(path)


def _draw_levels(axes: Any, comparison: Comparison, kind: str) -> None:
    """A line for each solver and level alone: the best of its grids at every cost."""
    plain: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in comparison.rows:
        if row["key"][:2] == [kind, "plain"]:
            plain.setdefault((row["key"][2], row["key"][3]), []).append(row)
    for (level, solver), rows in plain.items():
        costs, errors = frontier(settings(rows))
        shade = "0.2" if level == comparison.family.level().name else "0.75"
        label = f"level {level} alone: {solver}"
        axes.plot(np.exp(costs), np.exp(errors), LINES[solver], color=shade, linewidth=1, label=label)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--plans", type=int, default=10, help="draws of every plan with coins")
    parser.add_argument("--trials", type=int, default=0, help="draws at each Delta of learned coefficients")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/multilevel.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/multilevel.png"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="sde or ode")
    parser.add_argument("--rounds", type=int, default=5, help="of the paired timing; 0: none")
    options = parser.parse_args()
    comparison = Comparison(options.family, options.images, options.batch_size, options.out, options.device)
    for job in (*jobs(comparison, options.plans), *delta_jobs(options.trials)):
        if not options.only or job[0] == options.only:
            comparison.measure(*job)
    found = {"about": comparison.about, "summary": summary(comparison), "paired": paired(comparison, options.rounds)}
    write_rows(options.out, found | {"rows": comparison.rows})
    draw(comparison, options.figure)


if __name__ == "__main__":
    main()
