"""The runs of `multilevel.py`: which samplers, at which costs, and their rows. An interrupted run continues."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlem import Family
from mlem.comparison.equal_error import Setting
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
    """Runs samplers on fixed images and keeps one row for each."""

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
    """JSON with one line per row of its lists: plain indentation would give each image error its own line."""
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
        _, name, level, solver, grid, steps, target = row["key"]
        groups.setdefault((name, level, solver, grid, steps, target and (target[0], target[2])), []).append(row)
    return [
        Setting(np.array([row["cost"] for row in group]), np.array([row["image_mse"] for row in group]))
        for group in groups.values()
    ]
