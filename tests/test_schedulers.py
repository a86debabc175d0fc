"""Solvers of mlem as schedulers of diffusers, in a conformance suite and in pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

import mlem
from mlem.denoiser import gaussian_denoiser
from mlem.interop.schedulers import RandomizedMidpointScheduler
from mlem.level import Level
from mlem.predictions import NoiseLevel
from mlem.schedule import NoiseSchedule
from mlem.solvers.randomized_midpoint import RandomizedMidpoint
from tests.pipelines import PIPELINES, STABLE
from tests.test_your_own_family import blocks

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:(?s).*steps_offset:FutureWarning"),
]

CONFIGS: dict[str, Callable[[], Any]] = {
    "DDIM": lambda: DDIMScheduler(**STABLE, steps_offset=1, set_alpha_to_one=False),
    "DDPM": DDPMScheduler,
    "PNDM": lambda: PNDMScheduler(**STABLE, skip_prk_steps=True, steps_offset=1),
    "v": lambda: DDIMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    "zero SNR": lambda: DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "DPM-Solver++": lambda: DPMSolverMultistepScheduler(**STABLE, use_karras_sigmas=True),
    "Euler": lambda: EulerDiscreteScheduler(**STABLE),
    "flow Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "default flow Euler": lambda: FlowMatchEulerDiscreteScheduler(),
    "default Heun": HeunDiscreteScheduler,
    "flow UniPC": lambda: UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    ),
}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def made(config: Any, **options: Any) -> Any:
    return RandomizedMidpointScheduler.from_config(config, **options)


@pytest.fixture(params=CONFIGS)
def scheduler(request: pytest.FixtureRequest) -> Any:
    return made(CONFIGS[request.param]().config)


def schedule_of(scheduler: Any) -> NoiseSchedule:
    if scheduler.flows:
        return NoiseSchedule.flow(scheduler.config["shift"] or scheduler.config["flow_shift"])
    return NoiseSchedule.from_diffusers(scheduler.config)


DEVIATIONS = torch.tensor([0.5, 0.2, 1.0], dtype=torch.float64)
MEAN = torch.tensor([0.3, -0.4, 0.1], dtype=torch.float64)


def sampled(scheduler: Any, z: Tensor, steps: int, **options: Any) -> Tensor:
    """A pipeline's loop, with the exact network of a Gaussian."""
    schedule = schedule_of(scheduler)
    exact = gaussian_denoiser(schedule, MEAN, torch.diag(DEVIATIONS**2))
    scheduler.set_timesteps(steps, **options)
    x, prediction = z, scheduler.prediction
    for time in scheduler.timesteps:
        kappa = time / (1000 - time) if scheduler.flows else schedule.kappa((time.double() + 1) / 1000)
        kappa = torch.as_tensor(kappa, dtype=torch.float64).clamp(max=schedule.kappa(1.0))
        t = schedule.time_from_kappa(kappa).expand(len(x))
        alpha, sigma = (scale[0].item() for scale in schedule.scales(t))
        own = x.double() * (alpha * (1 + kappa) if scheduler.flows else 1.0)
        eps = exact(own, t)
        output = prediction.target((own - sigma * eps) / alpha, eps, NoiseLevel(t, alpha, sigma))
        x = scheduler.step(output.to(x.dtype), time, x, return_dict=False)[0]
    return x


def noise(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def test_it_is_saved_and_loaded(scheduler: Any, tmp_path: Path) -> None:
    scheduler.save_pretrained(tmp_path)
    again: Any = RandomizedMidpointScheduler.from_pretrained(tmp_path)
    assert dict(again.config) | {"_use_default_values": []} == dict(scheduler.config) | {"_use_default_values": []}
    assert torch.equal(sampled(again, noise(4), 5), sampled(scheduler, noise(4), 5))
    assert mlem.RandomizedMidpointScheduler is RandomizedMidpointScheduler


def test_timesteps_can_be_set_again(scheduler: Any) -> None:
    """Also in the middle of a call, and with other steps; two evaluations a step, and the same every time."""
    first = sampled(scheduler, noise(4), 6)
    assert len(scheduler.timesteps) + 1 == len(scheduler.sigmas)
    assert len(scheduler.timesteps) == 12 - (schedule_of(scheduler).kappa(1.0).item() > 1e6)
    assert bool((scheduler.timesteps.diff() < 0).all())
    scheduler.set_timesteps(3)
    scheduler.step(noise(4), scheduler.timesteps[0], noise(4))
    assert torch.equal(sampled(scheduler, noise(4), 6), first)


def test_a_batch_is_its_samples(scheduler: Any) -> None:
    whole = sampled(scheduler, noise(7), 5)
    parts = [sampled(scheduler, noise(7)[rows], 5) for rows in (slice(0, 1), slice(1, 4), slice(4, 7))]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precisions(scheduler: Any, dtype: torch.dtype) -> None:
    """Samples stay in their dtype; what is computed in between loses nothing."""
    found, exact = sampled(scheduler, noise(200, dtype), 12), sampled(scheduler, noise(200), 12)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().mean() < 40 * torch.finfo(dtype).eps


def test_devices(scheduler: Any) -> None:
    """Timesteps go where they are wanted; steps read none of them once a call has begun."""
    scheduler.set_timesteps(4, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    scheduler.set_begin_index(0)
    found = scheduler.step(torch.zeros(2, 3, device="meta"), scheduler.timesteps[0], torch.zeros(2, 3, device="meta"))
    assert found.prev_sample.device.type == "meta"


def test_the_seed_or_a_generator_draws_midpoints(scheduler: Any) -> None:
    def timesteps(seed: int, generator: torch.Generator | None = None) -> Tensor:
        own = made(scheduler.config, seed=seed)
        own.set_timesteps(6, generator=generator)
        return own.timesteps

    drawn = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    keyed, again, other = timesteps(0), timesteps(0), timesteps(1)
    one, same, two = (timesteps(0, generator) for generator in drawn)
    assert torch.equal(keyed, again)
    assert torch.equal(one, same)
    assert all(not torch.equal(keyed, different) for different in (other, one, two))
    assert not torch.equal(one, two)


def test_from_a_picture(scheduler: Any) -> None:
    """Whatever timestep a pipeline begins with, what was there is found again where there is little noise."""
    x_0 = MEAN + 0.1 * noise(50)
    scheduler.set_timesteps(40)
    for begin in (70, 71):
        scheduler.set_timesteps(40)
        scheduler.set_begin_index(begin)
        times = scheduler.timesteps[begin:]
        x = scheduler.add_noise(x_0, noise(50), times[:1].expand(50))
        signal = scheduler.add_noise(torch.ones(1, 3), torch.zeros(1, 3), times[:1])
        assert 0.5 < signal[0, 0] < 1
        for time in times:  # a network that knows the picture
            kappa = time / (1000 - time) if scheduler.flows else schedule_of(scheduler).kappa((time + 1) / 1000)
            kappa = float(kappa)
            scale = 1 / (1 + kappa) if scheduler.flows else (1 + kappa**2) ** -0.5
            alpha = (1 + kappa**2) ** -0.5
            level = NoiseLevel(torch.zeros(50), alpha, alpha * kappa)
            eps = (x / scale - x_0) / kappa
            x = scheduler.step(scheduler.prediction.target(x_0, eps, level), time, x).prev_sample
        assert torch.allclose(x, x_0, atol=2e-3)


def test_order(scheduler: Any) -> None:
    """Of the exact probability flow of a Gaussian, errors fall as of order 3/2, four times the steps: an eighth."""
    z, kappa = noise(64), min(schedule_of(scheduler).kappa(1.0).item(), 1e9)
    # of y = x / alpha, as the probability flow of a Gaussian has it
    shrunk = DEVIATIONS / (DEVIATIONS**2 + kappa**2).sqrt()
    due = MEAN + shrunk * (z * (1 + kappa if scheduler.flows else (1 + kappa**2) ** 0.5) - MEAN)
    errors: list[float] = []
    for steps in (25, 100):
        ends: list[Tensor] = []
        for seed in range(8):
            own = made(scheduler.config, seed=seed)
            ends.append(sampled(own, z, steps) - due)
        errors.append(torch.stack(ends).square().mean().sqrt().item())
    assert errors[1] < errors[0] / 6
    assert errors[1] < 0.01


def test_in_a_pipeline_it_is_the_solver() -> None:
    """With the same midpoints, to 1e-5: keyed by the same seed, and shared by all samples."""
    tiny = PIPELINES["DDPMPipeline"]
    pipe = tiny.make(DDPMScheduler(clip_sample=False, prediction_type="v_prediction"))
    pipe.scheduler = made(pipe.scheduler.config, seed=5)
    theirs = torch.as_tensor(pipe(**tiny.inputs(3, 1), num_inference_steps=6).images).permute(0, 3, 1, 2)
    level = Level("m", pipe.unet, NoiseSchedule.from_diffusers(DDPMScheduler().config), (1, 8, 8), "v")
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    ours = mlem.sample(
        level,
        solver=RandomizedMidpoint(midpoints="shared"),
        steps=6,
        seed=5,
        indices=range(3),
        start=lambda indices, noise: z,
    ).x
    assert torch.allclose((ours / 2 + 0.5).clamp(0, 1), theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "WanPipeline", "SanaPipeline"])
def test_pipelines_take_it(name: str) -> None:
    """Twice the evaluations; near what many steps of their own scheduler give."""
    tiny = PIPELINES[name]
    own: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if not tiny.flow:
        own = DDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction", clip_sample=False)
    pipe = tiny.make(own)
    inputs = tiny.inputs(1, 1)
    many = pipe(**inputs, num_inference_steps=150)
    few = pipe(**inputs, num_inference_steps=20)
    pipe.scheduler = made(pipe.scheduler.config)
    found = pipe(**inputs, num_inference_steps=20)
    many, few, found = (_pictures(one) for one in (many, few, found))
    assert (found - many).norm() < max(0.95 * (few - many).norm(), 0.05 * many.norm())


def _pictures(found: Any) -> Tensor:
    return found.frames if hasattr(found, "frames") else found.images


def test_defaults_of_other_schedulers_are_taken_over() -> None:
    """diffusers leaves out of a config what was not said."""
    assert made(FlowMatchEulerDiscreteScheduler().config).flows
    heun = made(HeunDiscreteScheduler().config)
    assert (heun.config["beta_start"], heun.config["beta_end"]) == (0.00085, 0.012)


def test_a_ddim_pipeline_takes_it_as_the_page_says() -> None:
    tiny = PIPELINES["DDIMPipeline"]
    pipe = tiny.make(DDIMScheduler(clip_sample=False, prediction_type="v_prediction"))
    exec(compile(blocks("docs/midpoints.md")[0], "docs/midpoints.md", "exec"), {"pipe": pipe})
    assert isinstance(pipe.scheduler, RandomizedMidpointScheduler)
    assert pipe(**tiny.inputs(1, 1), num_inference_steps=3).images.shape == (1, 8, 8, 1)
    with pytest.raises(ValueError, match=r"^eta=0\.5 and use_clipped_model_output belong to DDIM; leave them out$"):
        pipe(**tiny.inputs(1, 1), num_inference_steps=3, eta=0.5)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"has betas or a rectified flow, but the config's sigma_data fits neither"):
        made(EDMEulerScheduler().config)
    with pytest.raises(ValueError, match=r"use_dynamic_shifting depends on the image size"):
        made(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config)
    with pytest.raises(ValueError, match=r"flow_prediction goes with the sigmas of flows"):
        RandomizedMidpointScheduler(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match=r"use_dynamic_shifting depends on the image size; set it to False"):
        RandomizedMidpointScheduler(shift=1.0, use_dynamic_shifting=True)
    with pytest.raises(ValueError, match=r"call set_timesteps\(steps\) before step\(\)"):
        RandomizedMidpointScheduler().step(torch.zeros(1, 1), 0, torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"grid must be one of uniform, "):
        RandomizedMidpointScheduler(grid="karas").set_timesteps(4)
