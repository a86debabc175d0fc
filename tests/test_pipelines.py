"""Accelerated pipelines: the real classes of diffusers, shrunk; see `tests/pipelines.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

import mlem
from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.interop.pipelines import Acceleration
from mlem.multilevel.spec import PlanSpec
from tests.pipelines import PIPELINES, STABLE, Tiny

pytestmark = [  # of diffusers
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:(?s).*steps_offset:FutureWarning"),
]
QUICK: dict[str, Any] = {"images": 2, "times": 4}

ALONE = Family.plan(probabilities=(1.0, 1.0))
STEPS = 5


def held(budget: float = 0.7, estimator: str = "held") -> PlanSpec:
    return PlanSpec(budget=budget, cost="flops", estimator=estimator)


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DDIM": lambda: DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "DDPM": lambda: DDPMScheduler(clip_sample=True, variance_type="fixed_large"),
    "DPM-Solver++": lambda: DPMSolverMultistepScheduler(**STABLE),
    "DPM-Solver++ SDE": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "UniPC": lambda: UniPCMultistepScheduler(**STABLE),
    "Euler": lambda: EulerDiscreteScheduler(**STABLE, timestep_spacing="trailing"),
    "Euler, ancestral": lambda: EulerAncestralDiscreteScheduler(**STABLE),
}
FLOWS: dict[str, Callable[[], Any]] = {
    "flow Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow DPM-Solver++": lambda: DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    ),
    "flow UniPC": lambda: UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    ),
}
EVERY = [(name, "flow Euler" if tiny.flow else "DDIM") for name, tiny in PIPELINES.items()]
OTHERS = [("StableDiffusionPipeline", name) for name in SCHEDULERS if name != "DDIM"]
OTHERS += [("WanPipeline", "flow UniPC"), ("SanaPipeline", "flow DPM-Solver++"), ("DDPMPipeline", "DDPM")]


def pipeline(name: str, scheduler: str) -> tuple[Tiny, Any]:
    tiny = PIPELINES[name]
    return tiny, tiny.make((FLOWS if tiny.flow else SCHEDULERS)[scheduler]())


def pictures(tiny: Tiny, pipe: Any, steps: int = STEPS, prompts: int = 2, each: int = 1, **options: Any) -> Tensor:
    torch.manual_seed(0)  # of schedulers that are given no generator
    found = pipe(**tiny.inputs(prompts, each), num_inference_steps=steps, **options)
    return torch.as_tensor(found.frames if hasattr(found, "frames") else found.images)


def traces(pipe: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    kept = {name: value for name, value in vars(pipe).items() if not name.startswith("_")}
    return kept, {name: type(value) for name, value in vars(pipe.scheduler).items()}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("name", "scheduler"), EVERY + OTHERS)
def test_with_the_large_network_alone_it_is_the_pipeline(name: str, scheduler: str, tmp_path: Path) -> None:
    """Bit for bit, and restored without a trace."""
    tiny, pipe = pipeline(name, scheduler)
    own, before = pictures(tiny, pipe), traces(pipe)
    with mlem.accelerate(pipe, small=tiny.small(), plan=ALONE, cache=tmp_path) as accelerated:
        assert accelerated is pipe
        assert getattr(pipe, tiny.place) is not before[0][tiny.place]
        assert torch.equal(pictures(tiny, pipe), own)
    assert traces(pipe) == before
    assert torch.equal(pictures(tiny, pipe), own)


@pytest.mark.parametrize(("name", "scheduler"), EVERY + OTHERS)
def test_calls_do_not_know_of_one_another(name: str, scheduler: str, tmp_path: Path) -> None:
    """Other steps, a call that was broken off and two pictures a prompt give what a fresh pipeline gives."""
    tiny, pipe = pipeline(name, scheduler)
    estimator = "held" if "UniPC" in scheduler else "hindsight"

    def accelerated(pipe: Any) -> Acceleration:
        return mlem.accelerate(pipe, small=tiny.small(), plan=held(estimator=estimator), cache=tmp_path, **QUICK)

    acceleration = accelerated(pipe)
    first = pictures(tiny, pipe, 6)
    plan = acceleration.plan
    assert plan is not None
    assert plan.estimator == estimator
    calls = dict(zip(plan.levels, plan.calls.tolist(), strict=True))
    rows = acceleration.calls["large"] / calls["large"]
    assert acceleration.calls == {name: count * rows for name, count in calls.items()}
    other, two = pictures(tiny, pipe, 4), pictures(tiny, pipe, 6, 1, 2)
    _broken_off(tiny, pipe)
    assert torch.equal(pictures(tiny, pipe, 6), first)
    for expected, arguments in ((other, (4,)), (two, (6, 1, 2))):
        fresh_tiny, fresh = pipeline(name, scheduler)
        accelerated(fresh)
        assert torch.equal(pictures(fresh_tiny, fresh, *arguments), expected)


def _broken_off(tiny: Tiny, pipe: Any) -> None:
    """A call whose network fails at its third call."""
    calls: list[int] = []

    def fail(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("stop")

    handle = getattr(pipe, tiny.place).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        pictures(tiny, pipe, 6)
    handle.remove()


MLEMS = {
    "DDIM": (lambda: DDIMScheduler(timestep_spacing="trailing", clip_sample=False), "ddim"),
    "DDIM, v": (
        lambda: DDIMScheduler(timestep_spacing="trailing", clip_sample=False, prediction_type="v_prediction"),
        "ddim",
    ),
    "DPM-Solver++": (lambda: DPMSolverMultistepScheduler(timestep_spacing="trailing"), "dpm_solver_pp"),
    "Euler": (lambda: EulerDiscreteScheduler(timestep_spacing="trailing"), "ddim"),
    "flow Euler": (FLOWS["flow Euler"], "ddim"),
}


@pytest.mark.parametrize("estimator", ["held", "hindsight"])
@pytest.mark.parametrize("name", MLEMS)
def test_a_plan_gives_what_sample_gives(name: str, estimator: str, tmp_path: Path) -> None:
    """The same levels, told and guided alike, on the same noise and grid, by mlem's own solver: to 1e-4."""
    make, solver = MLEMS[name]
    tiny = PIPELINES["StableDiffusion3Pipeline" if "flow" in name else "StableDiffusionPipeline"]
    pipe = tiny.make(make())
    acceleration = mlem.accelerate(pipe, small=tiny.small(), plan=held(estimator=estimator), cache=tmp_path, **QUICK)
    theirs = pictures(tiny, pipe, 10)
    assert acceleration.plan is not None
    latents = tiny.inputs(2, 1)["latents"]
    ours = mlem.sample(
        acceleration.family,
        solver=solver,
        grid=TimeGrid("diffusers", acceleration.times),
        indices=range(2),
        plan=replace(acceleration.plan, about={}),
        start=lambda indices, z: latents[indices],
    ).x
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
