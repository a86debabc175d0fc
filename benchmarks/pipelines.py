"""Acceleration of a diffusers pipeline: error and seconds, compared with `sample()` under the same plan.

    python benchmarks/pipelines.py FAMILY [--steps 16 32] [--budgets 0.35 0.5] [--rounds 5] [--out FILE]

The largest level of a trained family becomes the network of a DDPMPipeline with a DPMSolverMultistepScheduler (a
DDIMPipeline takes only DDIM), the others its small networks. On the same noise: the mean squared error to 400 steps of
the largest level alone, of the original pipeline, of the accelerated one, and of `sample()` under the same plan; and
seconds of each, in turns. Run it on an idle machine.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from measuring import spread
from torch import Tensor

from mlem.family import Family
from mlem.files import write_json
from mlem.grids import TimeGrid
from mlem.provenance import processor
from mlem.sampling import Sampler
from mlem.scheduler_configs import to_diffusers

BATCH = 64
REFERENCE = 400


def pipeline_of(family: Family) -> Any:
    """The largest level as a pipeline."""
    top = family.level()
    config = to_diffusers(top.schedule, top.prediction)
    scheduler = DPMSolverMultistepScheduler.from_config(config, timestep_spacing="trailing")
    pipe: Any = DDPMPipeline(top.network, scheduler)  # pyright: ignore[reportArgumentType]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_pipeline(pipe: Any, steps: int) -> tuple[Tensor, float]:
    """Images (B, C, H, W) in [0, 1], and seconds."""
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    found = pipe(batch_size=BATCH, num_inference_steps=steps, generator=generator, output_type="np").images
    return torch.as_tensor(found).permute(0, 3, 1, 2), time.perf_counter() - begin


def run_sampler(sampler: Sampler) -> tuple[Tensor, float]:
    """The same for `sample()`."""
    begin = time.perf_counter()
    found = sampler.run(range(BATCH)).x
    return (found / 2 + 0.5).clamp(0, 1), time.perf_counter() - begin


def measured(family: Family, steps: int, budget: float, truth: Tensor, rounds: int) -> dict[str, Any]:
    """One row."""
    pipe, z = pipeline_of(family), torch.randn(BATCH, *family.shape, generator=torch.Generator().manual_seed(0))
    alone = run_pipeline(pipe, steps)
    small = list(family.levels[:-1])
    acceleration = mlem.accelerate(pipe, small=small, budget=budget, images=16, times=24)
    run_pipeline(pipe, steps)
    assert acceleration.plan is not None
    grid = TimeGrid("diffusers", acceleration.times)
    plan = replace(acceleration.plan, about={})
    sampler = Sampler(acceleration.family, solver="dpm_solver_pp", grid=grid, plan=plan, start=lambda indices, noise: z)
    plain = pipeline_of(family)
    ways: dict[str, Callable[[], tuple[Tensor, float]]] = {
        "pipeline": lambda: run_pipeline(plain, steps),
        "accelerated": lambda: run_pipeline(pipe, steps),
        "sample": lambda: run_sampler(sampler),
    }
    pictures = {name: way()[0] for name, way in ways.items()}
    assert torch.equal(pictures["pipeline"], alone[0])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(way()[1])
    acceleration.restore()
    row: dict[str, Any] = {"family": family.data, "steps": steps, "budget": budget, "calls": acceleration.calls}
    row["estimator"] = plan.estimator
    for name, found in pictures.items():
        row[f"mse of {name}"] = float((found - truth).square().mean())
    ratios = {"over pipeline": "pipeline", "over sample": "sample"}
    row |= {
        f"accelerated {what}": spread([a / b for a, b in zip(seconds["accelerated"], seconds[other], strict=True)])
        for what, other in ratios.items()
    }
    row["seconds of pipeline"] = spread(seconds["pipeline"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path, help="folder of a family")
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.35, 0.5])
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default 5)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("pipelines.json"))
    options = parser.parse_args()
    family = Family.load(options.family)
    truth, _ = run_pipeline(pipeline_of(family), REFERENCE)
    rows: list[dict[str, Any]] = []
    for steps in options.steps:
        for budget in options.budgets:
            rows.append(measured(family, steps, budget, truth, options.rounds))
            print(json.dumps(rows[-1]), flush=True)
    about = {"machine": processor(), "rounds": options.rounds, "images": BATCH, "reference steps": REFERENCE}
    write_json(options.out, about | {"rows": rows})


if __name__ == "__main__":
    main()
