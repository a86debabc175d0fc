"""Pipelines of diffusers: the real classes, shrunk, with random weights, and a smaller network for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

__all__ = ["PIPELINES", "STABLE", "Tiny", "sd3", "seeded", "text_unet", "unet", "vae"]

STABLE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NOTHING: Any = None


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """The module that `make` builds, from this seed; what begins with zeros gets weights, so that all of it matters."""
    torch.manual_seed(seed)
    module = make().eval()
    for weight in module.parameters():
        if weight.dim() > 1 and not bool(weight.any()):
            nn.init.normal_(weight, std=0.05)
    return module


def unet(channels: int, **options: Any) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(channels, channels),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        **options,
    )


def text_unet(channels: int, cross_attention_dim: int = 12, **options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(channels, 2 * channels),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=4,
        attention_head_dim=4,
        **options,
    )


def xl_unet(channels: int) -> UNet2DConditionModel:
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    return text_unet(channels, **extra, projection_class_embeddings_input_dim=6 * 4 + 20)


def dit(layers: int) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )


def sd3(layers: int) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        in_channels=4,
        out_channels=4,
    )


def sana(layers: int) -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=layers,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=12,
        sample_size=8,
    )


def wan(layers: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=16,
        num_layers=layers,
        rope_max_seq_len=32,
    )


def vae() -> AutoencoderKL:
    """A decoder of latents."""
    return AutoencoderKL(
        block_out_channels=(4, 4),  # pyright: ignore[reportArgumentType]  (diffusers writes tuple[int])
        down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )


def _ddim_pipeline(network: Any, scheduler: Any) -> Any:
    from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline

    pipe: Any = DDIMPipeline(network, scheduler)
    pipe.scheduler = scheduler  # it makes a DDIMScheduler of others
    return pipe


def _ddpm_pipeline(network: Any, scheduler: Any) -> Any:
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

    return DDPMPipeline(network, scheduler)


def _dit_pipeline(network: Any, scheduler: Any) -> Any:
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline

    return DiTPipeline(network, seeded(vae), scheduler)


def _stable_diffusion(network: Any, scheduler: Any) -> Any:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    return StableDiffusionPipeline(
        seeded(vae), NOTHING, NOTHING, network, scheduler, NOTHING, NOTHING, requires_safety_checker=False
    )


def _stable_diffusion_xl(network: Any, scheduler: Any) -> Any:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        seeded(vae), NOTHING, NOTHING, NOTHING, NOTHING, network, scheduler, add_watermarker=False
    )


def _stable_diffusion_3(network: Any, scheduler: Any) -> Any:
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        network, scheduler, seeded(vae), NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING
    )


def _sana_pipeline(network: Any, scheduler: Any) -> Any:
    from diffusers.pipelines.sana.pipeline_sana import SanaPipeline

    return SanaPipeline(NOTHING, NOTHING, NOTHING, network, scheduler)


def _wan_pipeline(network: Any, scheduler: Any) -> Any:
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    return WanPipeline(NOTHING, NOTHING, NOTHING, scheduler, network)


def _noise(images: int, *shape: int) -> Tensor:
    return torch.randn(images, *shape, generator=torch.Generator().manual_seed(5))


def _embeddings(prompts: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """What text encoders would give for so many prompts."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(prompts, *shape, generator=generator) for name, shape in shapes.items()}


_TEXT = {"prompt_embeds": (5, 12), "negative_prompt_embeds": (5, 12)}
_POOLED = {"pooled_prompt_embeds": (20,), "negative_pooled_prompt_embeds": (20,)}
_SIZE = {"height": 16, "width": 16}


@dataclass(frozen=True)
class Tiny:
    """A pipeline, shrunk.

    Args:
        network: size -> network; 2 for the large one, 1 for the small one.
        around: network, scheduler -> the pipeline.
        inputs: (prompts, images a prompt) -> the arguments of a call, but for its steps.
        flow: whether it samples a rectified flow.
        has_callback: whether it takes callback_on_step_end.
        place: the attribute with the network.
    """

    network: Callable[[int], nn.Module]
    around: Callable[[nn.Module, Any], Any]
    inputs: Callable[[int, int], dict[str, Any]]
    flow: bool = False
    has_callback: bool = True
    place: str = "unet"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def make(self, scheduler: Any) -> Any:
        """The pipeline, without a bar."""
        pipe = self.around(seeded(lambda: self.network(2)), scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def small(self) -> nn.Module:
        """The smaller network."""
        return seeded(lambda: self.network(1), 1)


def _plain_inputs(prompts: int, each: int) -> dict[str, Any]:
    return {"batch_size": prompts * each, "generator": torch.Generator().manual_seed(3), "output_type": "np"}


def _dit_inputs(prompts: int, each: int) -> dict[str, Any]:
    labels = [label for label in (207, 360, 5)[:prompts] for _ in range(each)]
    return {"class_labels": labels, "generator": torch.Generator().manual_seed(3), "output_type": "np"}


def _text_inputs(prompts: int, each: int) -> dict[str, Any]:
    shared = {"num_images_per_prompt": each, "guidance_scale": 3.0, "output_type": "latent", **_SIZE}
    return _embeddings(prompts, **_TEXT) | shared | {"latents": _noise(prompts * each, 4, 8, 8)}


def _pooled_inputs(prompts: int, each: int) -> dict[str, Any]:
    return _text_inputs(prompts, each) | _embeddings(prompts, **_TEXT, **_POOLED)


def _sd3_inputs(prompts: int, each: int) -> dict[str, Any]:
    """Embeddings that are given stand for pictures there, not for prompts."""
    told = _pooled_inputs(prompts, each)
    repeated = {name: told[name].repeat_interleave(each, 0) for name in (*_TEXT, *_POOLED)}
    return told | repeated | {"num_images_per_prompt": 1}


def _sana_inputs(prompts: int, each: int) -> dict[str, Any]:
    mask = {
        f"{name}_attention_mask": torch.ones(prompts, 5, dtype=torch.int64) for name in ("prompt", "negative_prompt")
    }
    told = _text_inputs(prompts, each) | mask | {"use_resolution_binning": False, "height": 256, "width": 256}
    return told | {"negative_prompt": None}


def _wan_inputs(prompts: int, each: int) -> dict[str, Any]:
    told = _embeddings(prompts, **_TEXT) | {"guidance_scale": 3.0, "output_type": "latent", "num_frames": 5}
    return told | {
        "num_videos_per_prompt": each,
        "latents": _noise(prompts * each, 4, 2, 8, 8),
        "height": 64,
        "width": 64,
    }


PIPELINES: dict[str, Tiny] = {
    "DDPMPipeline": Tiny(lambda size: unet(4 * size**2), _ddpm_pipeline, _plain_inputs, has_callback=False),
    "DDIMPipeline": Tiny(lambda size: unet(4 * size**2), _ddim_pipeline, _plain_inputs, has_callback=False),
    "DiTPipeline": Tiny(
        lambda size: dit(2 * size - 1), _dit_pipeline, _dit_inputs, has_callback=False, place="transformer"
    ),
    "StableDiffusionPipeline": Tiny(lambda size: text_unet(4 * size), _stable_diffusion, _text_inputs),
    "StableDiffusionXLPipeline": Tiny(lambda size: xl_unet(4 * size), _stable_diffusion_xl, _pooled_inputs),
    "StableDiffusion3Pipeline": Tiny(
        lambda size: sd3(2 * size - 1), _stable_diffusion_3, _sd3_inputs, flow=True, place="transformer"
    ),
    "SanaPipeline": Tiny(lambda size: sana(2 * size - 1), _sana_pipeline, _sana_inputs, flow=True, place="transformer"),
    "WanPipeline": Tiny(lambda size: wan(2 * size - 1), _wan_pipeline, _wan_inputs, flow=True, place="transformer"),
}
