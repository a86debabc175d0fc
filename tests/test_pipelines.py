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
from mlem.interop.pipelines import Acceleration, acceleration
from mlem.level import Level
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

    def faster(pipe: Any) -> Acceleration:
        return mlem.accelerate(pipe, small=tiny.small(), plan=held(estimator=estimator), cache=tmp_path, **QUICK)

    accelerated = faster(pipe)
    first = pictures(tiny, pipe, 6)
    plan = accelerated.plan
    assert plan is not None
    assert plan.estimator == estimator
    calls = dict(zip(plan.levels, plan.calls.tolist(), strict=True))
    rows = accelerated.calls["large"] / calls["large"]
    assert accelerated.calls == {name: count * rows for name, count in calls.items()}
    other, two = pictures(tiny, pipe, 4), pictures(tiny, pipe, 6, 1, 2)
    _broken_off(tiny, pipe)
    assert torch.equal(pictures(tiny, pipe, 6), first)
    for expected, arguments in ((other, (4,)), (two, (6, 1, 2))):
        fresh_tiny, fresh = pipeline(name, scheduler)
        faster(fresh)
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
    accelerated = mlem.accelerate(pipe, small=tiny.small(), plan=held(estimator=estimator), cache=tmp_path, **QUICK)
    theirs = pictures(tiny, pipe, 10)
    assert accelerated.plan is not None
    latents = tiny.inputs(2, 1)["latents"]
    ours = mlem.sample(
        accelerated.family,
        solver=solver,
        grid=TimeGrid("diffusers", accelerated.times),
        indices=range(2),
        plan=replace(accelerated.plan, about={}),
        start=lambda indices, z: latents[indices],
    ).x
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_after_a_callback_has_changed_samples_levels_run_again(shift: float, tmp_path: Path) -> None:
    """The smallest at every row before which hindsight moves samples: what it said before does not hold."""
    tiny, pipe = pipeline("StableDiffusionPipeline", "DDIM")
    accelerated = mlem.accelerate(pipe, small=tiny.small(), plan=held(estimator="hindsight"), cache=tmp_path, **QUICK)

    def change(pipe: Any, number: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": values["latents"] + shift}

    pictures(tiny, pipe, 10, callback_on_step_end=change)
    plan = accelerated.plan
    assert plan is not None
    calls = dict(zip(plan.levels, plan.calls.tolist(), strict=True))
    again = plan.revised.sum().item() if shift else 0
    assert plan.revised.any()
    assert accelerated.calls["small"] / accelerated.calls["large"] == (calls["small"] + again) / calls["large"]


def test_a_calibration_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For these weights, scheduler, guidance and size; a folder that cannot be written costs a warning."""
    measured: list[int] = []
    own = acceleration.calibrate

    def counted(*args: Any, **kwargs: Any) -> Any:
        measured.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(acceleration, "calibrate", counted)
    tiny, pipe = pipeline("StableDiffusionPipeline", "DDIM")
    others = {"prompt_embeds": torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(1))}
    for expected, options in ((1, {}), (1, others), (2, {"guidance_scale": 5.0})):
        with mlem.accelerate(pipe, small=tiny.small(), plan=held(), cache=tmp_path, **QUICK):
            torch.as_tensor(pipe(**tiny.inputs(1, 1) | options, num_inference_steps=STEPS).images)
        assert len(measured) == expected
    (tmp_path / "file").touch()
    with (
        mlem.accelerate(pipe, small=tiny.small(), plan=held(), cache=tmp_path / "file", **QUICK),
        pytest.warns(UserWarning, match=r"the calibration is not saved: .*cache= names another folder"),
    ):
        pictures(tiny, pipe)


def test_inputs_calibrate_at_once(tmp_path: Path) -> None:
    tiny, pipe = pipeline("StableDiffusionPipeline", "DDIM")
    inputs = tiny.inputs(2, 1) | {"num_inference_steps": 3}
    accelerated = mlem.accelerate(pipe, small=tiny.small(), plan=held(), cache=tmp_path, inputs=inputs, **QUICK)
    assert accelerated.family.fitted.calibration is not None
    bad = inputs | {"guidance_rescale": 0.7}
    accelerated.restore()
    with pytest.raises(ValueError, match="does more with its network's output than guidance"):
        mlem.accelerate(pipe, small=tiny.small(), plan=held(), cache=tmp_path, inputs=bad, **QUICK)
    assert not isinstance(pipe.unet, type(accelerated.network))


def test_a_callback_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    tiny, pipe = pipeline("StableDiffusionPipeline", "DDIM")

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("stop")

    with mlem.accelerate(pipe, small=tiny.small(), plan=held(), cache=tmp_path, **QUICK):
        expected = pictures(tiny, pipe)
        with pytest.raises(RuntimeError, match="stop"):
            pictures(tiny, pipe, callback_on_step_end=fail)
        assert torch.equal(pictures(tiny, pipe), expected)
    assert "step" not in vars(pipe.scheduler)


def test_guidance_that_ends_midway_is_refused(tmp_path: Path) -> None:
    tiny, pipe = pipeline("StableDiffusionPipeline", "DDIM")

    def end(pipe: Any, step: int, time: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 2:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": given["prompt_embeds"].chunk(2)[1]}
        return {}

    told: dict[str, Any] = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with (
        mlem.accelerate(pipe, small=tiny.small(), plan=held(), cache=tmp_path, **QUICK),
        pytest.raises(ValueError, match=r"^the pipeline now evaluates 2 rows, but began with 4: "),
    ):
        pictures(tiny, pipe, callback_on_step_end=end, **told)


def test_a_scheduler_that_is_shared(tmp_path: Path) -> None:
    """A plain pipeline with the scheduler of one whose call was broken off, and a step that a user put there."""
    tiny, pipe = pipeline("StableDiffusionPipeline", "DDIM")
    plain = tiny.make(pipe.scheduler)
    expected = pictures(tiny, plain)
    seen: list[int] = []
    own = pipe.scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return own(*args, **kwargs)

    pipe.scheduler.step = step
    with mlem.accelerate(pipe, small=tiny.small(), plan=held(), cache=tmp_path, **QUICK):
        pictures(tiny, pipe)
        assert len(seen) == STEPS
        _broken_off(tiny, pipe)
        assert torch.equal(pictures(tiny, plain), expected)
    assert pipe.scheduler.step is step


def test_a_pipeline_that_nobody_else_holds(tmp_path: Path) -> None:
    tiny = PIPELINES["StableDiffusionPipeline"]
    with mlem.accelerate(tiny.make(SCHEDULERS["DDIM"]()), small=tiny.small(), plan=ALONE, cache=tmp_path) as pipe:
        assert bool(torch.as_tensor(pictures(tiny, pipe)).isfinite().all())


def test_a_budget_in_seconds(tmp_path: Path) -> None:
    """By a calibration whose seconds are known."""
    tiny, pipe = pipeline("DDPMPipeline", "DDPM")
    accelerated = mlem.accelerate(pipe, small=tiny.small(), budget=0.5, cache=tmp_path, **QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlem.multilevel.calibrate.time_levels", lambda *about: ((0.1, 1.0), {"ode": 0.0, "sde": 0.0}))
        pictures(tiny, pipe, 12)
    plan = accelerated.plan
    assert plan is not None
    assert plan.about["cost_unit"] == "seconds"
    assert 0.3 * 12 < plan.calls @ torch.tensor([0.1, 1.0], dtype=torch.float64) <= 0.5 * 12


def test_the_users_callback_still_works(tmp_path: Path) -> None:
    """It sees the samples as they go on, and may change them."""
    tiny, pipe = pipeline("StableDiffusionPipeline", "DDIM")
    seen: list[Tensor] = []

    def callback(pipe: Any, step: int, time: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(given["latents"])
        return {"latents": given["latents"] * (0.5 if step == 2 else 1.0)}

    with mlem.accelerate(pipe, small=tiny.small(), plan=held(estimator="hindsight"), cache=tmp_path, **QUICK):
        plain = pictures(tiny, pipe, 6)
        changed = pictures(tiny, pipe, 6, callback_on_step_end=callback)
    assert len(seen) == 6
    assert torch.equal(seen[-1], changed)
    assert not torch.allclose(changed, plain, rtol=0.1)


def test_half_precision(tmp_path: Path) -> None:
    tiny, pipe = pipeline("StableDiffusionPipeline", "DDIM")
    pipe.to(torch.bfloat16)
    small = tiny.small()
    inputs = {
        name: value.bfloat16() if isinstance(value, Tensor) else value for name, value in tiny.inputs(2, 1).items()
    }
    own = pipe(**inputs, num_inference_steps=STEPS).images
    for plan in (ALONE, held(estimator="hindsight")):
        with mlem.accelerate(pipe, small=small, plan=plan, cache=tmp_path, **QUICK):
            found = pipe(**inputs, num_inference_steps=STEPS).images
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, own) is (plan is ALONE)
    assert next(small.parameters()).dtype == torch.float32  # the user's network is as it was


def test_a_compiled_network(tmp_path: Path) -> None:
    tiny, pipe = pipeline("StableDiffusionPipeline", "DDIM")
    with mlem.accelerate(pipe, small=tiny.small(), plan=held(), cache=tmp_path, **QUICK):
        expected = pictures(tiny, pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with mlem.accelerate(pipe, small=tiny.small(), plan=held(), cache=tmp_path, **QUICK) as accelerated:
        assert torch.allclose(pictures(tiny, accelerated), expected, atol=1e-4)


def test_offloading_moves_the_large_network_when_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put away where the next row does without it, and at the end; fetched for every row that needs it."""
    tiny, pipe = pipeline("StableDiffusionPipeline", "DDIM")
    asked: list[str] = []
    for module in ("running", "acceleration"):
        path = f"mlem.interop.pipelines.{module}.moved"
        monkeypatch.setattr(path, lambda network, device, module=module: asked.append(module))
    accelerated = mlem.accelerate(pipe, small=tiny.small(), plan=held(), cache=tmp_path, offload=True, **QUICK)
    pictures(tiny, pipe, 8)
    asked.clear()
    pictures(tiny, pipe, 8)
    assert accelerated.plan is not None
    runs = accelerated.plan.runs[:, -1].tolist()
    away = sum(not run for run in runs[1:]) + 1
    assert asked == ["running"] * (sum(map(bool, runs)) + away)
    accelerated.restore()
    assert asked[-1] == "acceleration"  # back where it was


def test_a_pipeline_that_offloads_by_itself_is_refused() -> None:
    tiny, pipe = pipeline("StableDiffusionPipeline", "DDIM")
    pipe.unet._hf_hook = object()
    with pytest.raises(ValueError, match=r"the unet of this Stable.* moves between devices"):
        mlem.accelerate(pipe, small=tiny.small(), budget=0.5)


def test_a_level_of_ours_as_the_small_network(tmp_path: Path) -> None:
    tiny, pipe = pipeline("DDPMPipeline", "DDPM")
    level = Level("xs", tiny.small(), mlem.NoiseSchedule.from_diffusers(dict(pipe.scheduler.config)), (1, 8, 8), "eps")
    level.save(tmp_path / "level_xs")
    for small in (level, tmp_path / "level_xs"):
        with mlem.accelerate(pipe, small=small, plan=held(), cache=tmp_path, **QUICK) as accelerated:
            pictures(tiny, accelerated)
            assert set(accelerated.unet.acceleration[0].calls) == {"xs", "large"}


def test_importing_mlem_imports_no_diffusers() -> None:
    import subprocess
    import sys

    code = "import mlem, sys; mlem.__all__; assert 'diffusers' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
