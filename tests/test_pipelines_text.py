"""Accelerated pipelines with real text encoders, CLIP and T5, from tiny configs: two pictures of two prompts each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

import mlem
from tests.pipelines import PIPELINES, STABLE, seeded
from tests.text_encoders import clip, clip_tokenizer, t5, t5_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:(?s).*steps_offset:FutureWarning"),
]
PLAN = mlem.PlanSpec(budget=0.7, cost="flops")


def stable_diffusion(folder: Path) -> Any:
    pipe = PIPELINES["StableDiffusionPipeline"].make(DDIMScheduler(**STABLE, clip_sample=False, steps_offset=1))
    pipe.register_modules(text_encoder=seeded(lambda: clip(12)), tokenizer=clip_tokenizer(folder))
    return pipe


def stable_diffusion_xl(folder: Path) -> Any:
    pipe = PIPELINES["StableDiffusionXLPipeline"].make(DDIMScheduler(**STABLE, clip_sample=False, steps_offset=1))
    words = clip_tokenizer(folder)
    pipe.register_modules(tokenizer=words, tokenizer_2=words)
    pipe.register_modules(
        text_encoder=seeded(lambda: clip(4)), text_encoder_2=seeded(lambda: clip(8, projection=20), 1)
    )
    return pipe


def stable_diffusion_3(folder: Path) -> Any:
    pipe = PIPELINES["StableDiffusion3Pipeline"].make(FlowMatchEulerDiscreteScheduler(shift=3.0))
    words = clip_tokenizer(folder)
    pipe.register_modules(tokenizer=words, tokenizer_2=words, tokenizer_3=t5_tokenizer())
    encoders = [seeded(lambda: clip(4, projection=8)), seeded(lambda: clip(8, projection=12), 1)]
    pipe.register_modules(text_encoder=encoders[0], text_encoder_2=encoders[1], text_encoder_3=seeded(lambda: t5(12)))
    pipe.tokenizer_max_length = 16
    return pipe


MAKERS = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusion3Pipeline": stable_diffusion_3,
}


@pytest.mark.parametrize("name", MAKERS)
def test_prompts(name: str, tmp_path: Path) -> None:
    """With the large network alone its own pictures, bit for bit; with a plan, one prompt does not know the other."""
    pipe, small = MAKERS[name](tmp_path / "words"), PIPELINES[name].small()
    inputs: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 5, "guidance_scale": 3.0}
    inputs |= {"output_type": "latent", "negative_prompt": "bad"}

    def run(*prompts: str, each: int = 2) -> torch.Tensor:
        latents = torch.randn(len(prompts) * each, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            told = inputs | {"negative_prompt": ["bad"] * len(prompts)}
            return pipe([*prompts], num_images_per_prompt=each, latents=latents, **told).images

    own = run("a cat", "a dog")
    with mlem.accelerate(pipe, small=small, plan=mlem.Family.plan(probabilities=(1.0, 1.0)), cache=tmp_path):
        assert torch.equal(run("a cat", "a dog"), own)
    with mlem.accelerate(pipe, small=small, plan=PLAN, cache=tmp_path, images=2, times=4):
        both, one = run("a cat", "a dog"), run("a cat")
    assert torch.allclose(both[:2], one, atol=1e-4 * both.abs().max().item())
    assert not torch.allclose(both[2:], both[:2], rtol=0.1)
