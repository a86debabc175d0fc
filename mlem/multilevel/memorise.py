"""Memorised plans: coins do not depend on the state, so the best of many draws can be kept ([J], Fig. 1)."""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch

from mlem.family import Family
from mlem.multilevel.denoiser import MultilevelDenoiser
from mlem.multilevel.plan import Plan
from mlem.multilevel.planner import make_plan
from mlem.multilevel.spec import PlanSpec
from mlem.multilevel.trial import MEMORY, check_reference_steps, trial, trial_indices
from mlem.networks import evaluating
from mlem.solvers import make_solver


def memorise(
    family: Family,
    *,
    solver: str = "ddpm",
    steps: int = 128,
    grid: str | None = None,
    draws: int = 15,
    images: int = 16,
    reference_steps: int = 1000,
    device: str | torch.device = "cpu",
    **spec: object,
) -> Plan:
    """The best of `draws` plans, by the mean squared error on a training set of `images` samples.

    spec: fields of `PlanSpec`; its seed is that of the first draw. `about` of the plan says the error it was chosen by
    (chosen_mse), its error on as many other samples (judged_mse), and theirs of all draws, mean and standard deviation
    (others_mse, others_spread). Raises ValueError for fewer than two draws, for no images or steps
    of the reference, for a spec that tosses no coins, and for one that the solver cannot follow.
    """
    if draws < 2:
        raise ValueError(f"draws must be >= 2, got {draws}; the best is chosen among them")
    if images < 1:
        raise ValueError(f"images must be >= 1, got {images}; the best is chosen by its error on them")
    check_reference_steps(reference_steps)
    first = PlanSpec(**spec)  # type: ignore[arg-type]
    if first.searched:
        raise ValueError("this spec tosses no coins, so that all its draws are equal; add coins=systematic")
    method = make_solver(solver)
    times = method.grid(family.schedule, steps, grid)
    plans = [make_plan(replace(first, seed=first.seed + n), family, method, times) for n in range(draws)]
    networks = torch.nn.ModuleList(level.network for level in family.levels).to(device)
    errors = []
    with torch.inference_mode(), evaluating(networks):
        for part in range(2):
            index = trial_indices(MEMORY + part * images, images, device)
            teacher = make_solver(method.reference)
            fine = teacher.grid(family.schedule, reference_steps)
            truth = trial(family.level().denoiser, family.schedule, family.shape, teacher, fine, index, 0)
            errors.append(
                [
                    (
                        trial(MultilevelDenoiser(family, plan), family.schedule, family.shape, method, times, index, 0)
                        - truth
                    )
                    .square()
                    .mean()
                    .item()
                    for plan in plans
                ]
            )
    chosen, judged = errors
    best = chosen.index(min(chosen))
    found = {"draws": draws, "images": images, "chosen_mse": chosen[best], "judged_mse": judged[best]}
    found |= {"others_mse": statistics.mean(judged), "others_spread": statistics.stdev(judged)}
    return replace(plans[best], about=plans[best].about | found | {"weights": family.weights_hash})
