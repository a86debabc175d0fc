"""Error against cost on a trained family: every level alone, and multilevel plans. Writes a figure and JSON.

    python train.py experiment=dead_leaves16
    python benchmarks/multilevel.py runs/dead_leaves16/family

Every sampler starts from the same noise and reads the same Brownian path as a many-step reference of the largest level.
Cost is measured in FLOPs, in units of an evaluation of the largest level; wall-clock time is also given. Rows are saved
immediately (`benchmarks/multilevel.json`), so an interrupted run continues.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from multilevel_runs import KINDS, Comparison, delta_jobs, jobs, settings, write_rows

from mlem.comparison.equal_error import cost_ratio, frontier
from mlem.multilevel.spec import PlanSpec
from mlem.sampling import Sampler


def ratios(comparison: Comparison, kind: str, ours: str, theirs: Any, draws: int = 400) -> list[dict[str, float]]:
    """Their cost over ours at equal error, with a 95 percent interval over images."""
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
    """Wall-clock time of PAIRS, run in turns on one batch: time of the level alone over time of the plan."""
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
                axes.errorbar(*places, bars, fmt=marker, label=f"plan: {name}", **style)
        solver, steps, _ = KINDS[kind]
        top = comparison.family.level().name
        axes.set(xscale="log", yscale="log", xlabel=f"cost per sample [evaluations of level {top}, by FLOPs]")
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
        "one point per draw of coins",
        fontsize=9,
    )
    figure.savefig(path)


def _draw_levels(axes: Any, comparison: Comparison, kind: str) -> None:
    """One line per solver and single level: the best of its grids at every cost."""
    plain: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in comparison.rows:
        if row["key"][:2] == [kind, "plain"]:
            plain.setdefault((row["key"][2], row["key"][3]), []).append(row)
    for (level, solver), rows in plain.items():
        costs, errors = frontier(settings(rows))
        shade = "0.2" if level == comparison.family.level().name else "0.75"
        label = f"level {level} alone: {solver}"
        names = comparison.family.names
        width = 1 + 0.7 * (len(names) - 1 - names.index(level))  # the smaller the level, the thicker
        axes.plot(np.exp(costs), np.exp(errors), LINES[solver], color=shade, linewidth=width, label=label)


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
