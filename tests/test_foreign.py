"""Networks that diffusers wrote, read from their folders, and sampled as diffusers' own pipelines do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from mlem.conditions import blank
from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.level import Level
from mlem.multilevel.plan import Plan
from mlem.sampling import sample
from tests.pipelines import STABLE, sd3, vae

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers
]


def unet(channels: int = 8, **options: Any) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(channels, channels),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        **options,
    )


def text_unet(width: int = 12, **options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=width,
        norm_num_groups=4,
        attention_head_dim=4,
        **options,
    )


def dit(**options: Any) -> DiTTransformer2DModel:
    usual: dict[str, Any] = {"in_channels": 4, "out_channels": 8, "num_layers": 2, "num_embeds_ada_norm": 10}
    return DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=4, sample_size=8, **usual | options)


def sana(**options: Any) -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=6,
        sample_size=8,
        **options,
    )


def wan() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=10,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )


def flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str, Any]] = {
    "UNet2DModel": (lambda: unet(in_channels=3), DDPMScheduler, "eps", {}),
    "of labels": (lambda: unet(num_class_embeds=11), DDPMScheduler, "eps", {"class_labels": 10}),
    "UNet2DConditionModel": (
        text_unet,
        lambda: DDIMScheduler(**STABLE, prediction_type="v_prediction"),
        "v",
        {"encoder_hidden_states": (None, 12)},
    ),
    "of SDXL": (
        lambda: text_unet(
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80
        ),
        lambda: DDIMScheduler(**STABLE),
        "eps",
        {"encoder_hidden_states": (None, 12), "text_embeds": (32,), "time_ids": (6,)},
    ),
    "DiTTransformer2DModel": (dit, DDIMScheduler, "eps", {"class_labels": 10}),
    "SD3Transformer2DModel": (
        lambda: sd3(1),
        flow,
        "flow",
        {"encoder_hidden_states": (None, 12), "pooled_projections": (20,)},
    ),
    "SanaTransformer2DModel": (
        sana,
        lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        "flow",
        {"encoder_hidden_states": (None, 6), "encoder_attention_mask": (None,)},
    ),
    "WanTransformer3DModel": (wan, flow, "flow", {"encoder_hidden_states": (None, 10)}),
}
SHAPES = {"UNet2DModel": (3, 8, 8), "of labels": (3, 8, 8), "WanTransformer3DModel": (4, 1, 4, 4)}


def seeded(make: Callable[[], nn.Module], scale: float = 1.0) -> Any:
    """A network whose weights are fixed, the global random state left alone; zeros among them are drawn too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make().eval()
        for weight in network.parameters():
            if not weight.any():
                nn.init.normal_(weight, std=0.2 * scale)
    return network


def written(folder: Path, network: Any, scheduler: Any) -> Path:
    """The folder of a model with its scheduler."""
    network.save_pretrained(folder)
    scheduler.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_class_is_read_sampled_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    make, scheduler, prediction, conditions = NETWORKS[kind]
    folder = written(tmp_path / "net", seeded(make), scheduler())
    level = Level.from_diffusers(folder, shape=SHAPES["WanTransformer3DModel"] if "Wan" in kind else None)
    assert (level.name, str(level.prediction), level.conditions) == ("net", prediction, conditions)
    assert level.shape == SHAPES.get(kind, (4, 8, 8))
    assert level.flops > 0

    def source(indices: Tensor) -> dict[str, Tensor]:
        own = blank(level.conditions, len(indices), indices.device, torch.float32)
        return {name: one + indices.view(-1, *[1] * (one.dim() - 1)).to(one.dtype) % 2 for name, one in own.items()}

    options: dict[str, Any] = {"indices": range(3), "steps": 2, "conditions": source}
    found = sample(level, **options).x
    assert (sample(level, **options, batch_size=2).x - found).abs().max() < 1e-4 * found.abs().max()
    level.save(tmp_path / "saved")
    assert torch.equal(sample(Level.load(tmp_path / "saved"), **options).x, found)


def test_half_precision_stays_what_it_is(tmp_path: Path) -> None:
    folder = written(tmp_path / "net", seeded(unet), DDPMScheduler())
    level = Level.from_diffusers(folder, dtype=torch.bfloat16)
    level.save(tmp_path / "saved")
    again = Level.load(tmp_path / "saved")
    assert {weight.dtype for weight in again.network.parameters()} == {torch.bfloat16}
    options: dict[str, Any] = {"indices": range(2), "steps": 3}
    assert torch.equal(sample(again, **options).x, sample(level, **options).x)
    full = sample(Level.from_diffusers(folder), **options).x
    assert (sample(again, **options).x - full).abs().max() < 0.1 * full.abs().max()


def test_dit_with_learned_variance_and_guidance_is_its_pipeline(tmp_path: Path) -> None:
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline

    pipe = DiTPipeline(seeded(lambda: dit(num_embeds_ada_norm=1000)), seeded(vae), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "dit")
    labels = [207, 360]
    theirs = pipe(
        labels, guidance_scale=4.0, num_inference_steps=8, generator=torch.manual_seed(0), output_type="np"
    ).images
    latents = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0))
    level = Level.from_diffusers(tmp_path / "dit")
    assert level.latents == {"scaling_factor": 0.18215}
    ours = sample(
        Family([level]).guided(4.0),
        solver="ddim",
        steps=8,
        grid="leading",
        indices=range(2),
        conditions=lambda indices: {"class_labels": torch.tensor(labels)[indices]},
        start=lambda indices, z: latents[indices],
    ).x
    with torch.no_grad():
        pictures = pipe.vae.decode(ours / pipe.vae.config.scaling_factor).sample
    pictures = (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert torch.allclose(pictures, torch.as_tensor(theirs), atol=1e-5)


def test_the_unet_of_stable_diffusion_is_its_pipeline(tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    scheduler = DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        seeded(vae), None, None, seeded(text_unet), scheduler, None, None, requires_safety_checker=False
    )  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "sd")
    generator = torch.Generator().manual_seed(1)
    text, null = torch.randn(2, 2, 5, 12, generator=generator).unbind(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    theirs = pipe(
        prompt_embeds=text,
        negative_prompt_embeds=null,
        latents=latents,
        height=16,
        width=16,
        num_inference_steps=10,
        guidance_scale=7.5,
        output_type="latent",
    ).images
    times = [(i * 100 + 2) / 1000 for i in reversed(range(10))]
    ours = sample(
        Family([Level.from_diffusers(tmp_path / "sd")]).guided(7.5, null={"encoder_hidden_states": null[0]}),
        solver="ddim",
        grid=TimeGrid("stable", (*times, 1 / 1000)),
        indices=range(2),
        conditions=lambda indices: {"encoder_hidden_states": text[indices]},
        start=lambda indices, z: latents[indices],
    ).x
    scale = theirs.abs().max()
    # its pipeline has one negative embedding for each picture; ours has one for all
    assert (ours[0] - theirs[0]).abs().max() < 1e-5 * scale


def test_sd3_is_its_pipeline(tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

    nothing: Any = None
    pipe = StableDiffusion3Pipeline(
        seeded(lambda: sd3(1)), flow(), seeded(vae), nothing, nothing, nothing, nothing, nothing, nothing
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "sd3")
    generator = torch.Generator().manual_seed(1)
    text, pooled = torch.randn(1, 5, 12, generator=generator), torch.randn(1, 20, generator=generator)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    theirs = pipe(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=0 * text,
        negative_pooled_prompt_embeds=0 * pooled,
        latents=latents,
        height=16,
        width=16,
        num_inference_steps=6,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    null = {"encoder_hidden_states": torch.zeros(5, 12), "pooled_projections": torch.zeros(20)}
    ours = sample(
        Family([Level.from_diffusers(tmp_path / "sd3")]).guided(3.0, null=null),
        solver="ddim",
        steps=6,
        grid="flow",
        indices=[0],
        conditions=lambda indices: {"encoder_hidden_states": text[indices], "pooled_projections": pooled[indices]},
        start=lambda indices, z: latents[indices],
    ).x
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_a_family_of_text_encoders_of_different_widths(tmp_path: Path) -> None:
    scheduler = DDIMScheduler(**STABLE)
    folders = {
        "s": written(tmp_path / "s", seeded(lambda: text_unet(6)), scheduler),
        "l": written(tmp_path / "l", seeded(lambda: text_unet(24)), scheduler),
    }
    family = Family.from_diffusers(folders, data="pictures")
    assert family.names == ["s", "l"]

    def source(indices: Tensor) -> dict[str, Any]:
        text = torch.sin(indices[:, None, None] + torch.arange(4 * 24.0).view(4, 24))
        return {"s": {"encoder_hidden_states": text[..., :6]}, "l": {"encoder_hidden_states": text}}

    plan = Plan.draw(torch.tensor([[1.0, 0.5]]).expand(6, 2), coins="systematic", levels=("s", "l"))
    family.save(tmp_path / "family")
    options: dict[str, Any] = {"indices": range(2), "steps": 6, "plan": plan, "conditions": source}
    found = sample(family, **options)
    assert torch.equal(sample(Family.load(tmp_path / "family"), **options).x, found.x)
    assert all(cost.calls for cost in found.ledger.levels.values())


def without(path: Path) -> None:
    path.unlink()


def config(path: Path, **fields: Any) -> None:
    """Change fields of a config.json."""
    plain = json.loads(path.read_text())
    path.write_text(json.dumps(plain | fields))


MISTAKES: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "no folder": (
        lambda folder: shutil.rmtree(folder),
        {},
        "is not a folder; name that of a diffusers model or pipeline",
    ),
    "no config": (lambda folder: without(folder / "config.json"), {}, "has no config.json; name the folder of a diff"),
    "no scheduler": (lambda folder: without(folder / "scheduler_config.json"), {}, "pass schedule= and prediction="),
    "another class": (
        lambda folder: config(folder / "config.json", _class_name="PriorTransformer"),
        {},
        "holds a PriorTransformer; mlem can sample UNet2DModel, ",
    ),
    "learned times": (
        lambda folder: config(folder / "config.json", time_embedding_type="learned"),
        {},
        "a learned time embedding is not supported; only positional ones take any time",
    ),
    "inpainting": (
        lambda folder: config(folder / "config.json", in_channels=9),
        {},
        "it takes 9 channels and returns 3: it needs more input than x",
    ),
    "contradiction": (lambda folder: None, {"prediction": "v"}, "prediction=v contradicts the scheduler of "),
    "flow and betas": (
        lambda folder: config(folder / "scheduler_config.json", prediction_type="flow_prediction"),
        {},
        "contradicts use_flow_sigmas=False",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_right_gets_one_line(mistake: str, tmp_path: Path) -> None:
    change, options, words = MISTAKES[mistake]
    folder = written(tmp_path / "net", seeded(unet), DDPMScheduler())
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        Level.from_diffusers(folder, **options)


def test_a_flow_transformer_without_a_flow_and_two_latent_spaces_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "net", seeded(lambda: sd3(1)), DDIMScheduler())
    with pytest.raises(ValueError, match=r"holds a SD3Transformer2DModel, trained on a flow, but .* is for no flow"):
        Level.from_diffusers(folder)
    levels = [
        Level.from_diffusers(written(tmp_path / name, seeded(make), DDPMScheduler()))
        for name, make in (("s", unet), ("l", lambda: unet(16)))
    ]
    levels[0].latents, levels[1].latents = {"scaling_factor": 0.18215}, {"scaling_factor": 0.13025}
    with pytest.raises(ValueError, match=r"levels s and l work on different latents: scaling_factor"):
        Family(levels)
    with pytest.raises(ValueError, match=r"does not say the shape of a sample: pass shape="):
        Level.from_diffusers(written(tmp_path / "wan", seeded(wan), flow()))
