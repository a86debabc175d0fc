"""The presets of UNets and transformers: cost from size to size, forward-mode differentiation, and what is refused."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models import modeling_utils
from diffusers.models.unets import unet_2d

from mlem import Level, NoiseSchedule
from mlem.networks import DIT_SIZES, SIZES, build, dit, flops, parameters, told, unet
from tests.problems import level

PUBLISHED = {
    **{"block_out_channels": (128, 256, 256, 256), "layers_per_block": 2, "mid_block_scale_factor": 1},
    **{"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")},
    **{"up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")},
    **{"attention_head_dim": None, "norm_num_groups": 32, "norm_eps": 1e-6, "act_fn": "silu"},
    **{"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "center_input_sample": False},
    **{"time_embedding_type": "positional", "in_channels": 3, "out_channels": 3, "dropout": 0.1},
}
"""The config.json of google/ddpm-cifar10-32, and the dropout of the paper."""

SHAPES = [(1, 8, 8), (3, 16, 16), (3, 32, 32), (3, 64, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_size_costs_about_four_times_the_one_before(shape: tuple[int, int, int]) -> None:
    costs = []
    for size in SIZES:
        with torch.device("meta"):
            network = unet(size, shape)
        costs.append(flops(network, shape))
    ratios = [large / small for small, large in itertools.pairwise(costs)]
    assert all(3.5 <= ratio <= 4.5 for ratio in ratios), ratios


@pytest.mark.parametrize(
    ("name", "size", "shape", "options"),
    [
        ("unet", "xs", (1, 8, 8), {}),
        ("unet", "xs", (3, 32, 32), {"attention": True, "classes": 2}),
        ("dit", "s", (1, 8, 8), {"classes": 3}),
    ],
)
def test_flops_are_those_of_the_real_device(
    name: str, size: str, shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    """Attention too: the kernel that the CPU takes is one that torch does not count."""
    conditions = told(name, options.get("classes", 0))
    with torch.device("meta"):
        shadow = build(name, size, shape, **options)
    assert flops(shadow, shape, conditions) == flops(build(name, size, shape, **options), shape, conditions)


def test_the_published_network_of_cifar10() -> None:
    """Ho et al., arXiv:2006.11239: 35.7 million parameters."""
    with torch.device("meta"):
        network = unet("xl", (3, 32, 32), dropout=0.1, attention=True)
    assert parameters(network) == 35_746_307
    assert {name: network.config[name] for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize(("side", "at"), [(32, 1), (40, 2), (64, 2), (128, 3), (256, 3)])
def test_attention_is_at_16_pixels(side: int, at: int) -> None:
    with torch.device("meta"):
        network = unet("xs", (3, side, side), attention=True)
    assert [kind.startswith("Attn") for kind in network.config.down_block_types] == [i == at for i in range(4)]
    assert [kind.startswith("Attn") for kind in network.config.up_block_types][::-1] == [i == at for i in range(4)]


def test_each_transformer_costs_four_times_the_one_before() -> None:
    costs = []
    for size in DIT_SIZES:
        with torch.device("meta"):
            costs.append(flops(dit(size, (1, 8, 8)), (1, 8, 8), told("dit", 0)))
    assert all(3.5 <= large / small <= 4.5 for small, large in itertools.pairwise(costs)), costs


@pytest.mark.parametrize(("name", "size", "shape"), [("unet", "xs", (1, 8, 8)), ("dit", "s", (3, 8, 8))])
def test_classes_and_none_of_them_are_told_apart(name: str, size: str, shape: tuple[int, int, int]) -> None:
    network = build(name, size, shape, classes=2).eval()
    torch.manual_seed(0)  # labels change what a UNet says by 7e-4 to 3e-2, by its weights
    for weights in network.parameters():
        torch.nn.init.normal_(weights, std=0.1)
    labels = torch.tensor([0, 1, 2])
    with torch.no_grad():
        out = network(torch.ones(3, *shape), torch.full((3,), 500.0), class_labels=labels).sample
    assert out.shape == (3, *shape)
    assert min((out[0] - out[1]).abs().max(), (out[1] - out[2]).abs().max(), (out[0] - out[2]).abs().max()) > 1e-3
    with pytest.raises(IndexError), torch.no_grad():
        network(torch.ones(1, *shape), torch.zeros(1), class_labels=torch.tensor([3]))


def test_a_transformer_drops_no_labels_by_global_chance() -> None:
    """As diffusers builds it, it does in training."""
    network = dit("s", (1, 8, 8), classes=2).train()
    torch.manual_seed(0)
    for weights in network.parameters():
        torch.nn.init.normal_(weights, std=0.1)
    x, t, labels = torch.ones(32, 1, 8, 8), torch.zeros(32), torch.zeros(32, dtype=torch.int64)
    with torch.no_grad():
        out = network(x, t, class_labels=labels).sample
    torch.testing.assert_close(out, out[:1].expand_as(out))
    assert out.abs().max() > 0


def test_a_new_transformer_says_nothing() -> None:
    """adaLN-zero: the blocks begin as the identity, and the output is 0."""
    network = dit("s", (1, 8, 8))
    with torch.no_grad():
        out = network(torch.ones(1, 1, 8, 8), torch.zeros(1), class_labels=torch.zeros(1, dtype=torch.int64)).sample
    assert not out.any()


@pytest.mark.parametrize("shape", [*SHAPES, (1, 4, 4), (2, 6, 10), (3, 28, 28), (4, 18, 16)])
def test_the_output_is_like_the_image(shape: tuple[int, int, int]) -> None:
    x = torch.ones(2, *shape)
    with torch.no_grad():
        out = level("xs", shape).network(x, torch.tensor([0.0, 999.0])).sample
    assert out.shape == x.shape
    assert not torch.equal(out[0], out[1])


# torch scripts its own decompositions when forward mode is first used
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16)])
def test_jvp_is_the_derivative(shape: tuple[int, int, int]) -> None:
    """Forward-mode differentiation through a denoiser, in x, against central differences.

    A level is kept in channels_last, where torch cannot differentiate its group norms forwards.
    """
    small = level("xs", shape)
    small.network.to(memory_format=torch.contiguous_format)
    denoiser = small.denoiser
    generator = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(2, *shape, generator=generator) for _ in range(2))
    t = torch.tensor([0.2, 0.9])
    _, tangent = torch.func.jvp(lambda x: denoiser(x, t), (x,), (direction,))
    h = 1e-5
    with torch.no_grad():
        difference = (denoiser(x + h * direction, t) - denoiser(x - h * direction, t)) / (2 * h)
    assert tangent.abs().max() > 0.1
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-7)


def test_counts() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False))
    assert parameters(network) == 3 * 4 + 4 + 4 * 2


def test_dropout_is_asked_for() -> None:
    def rates(network: torch.nn.Module) -> set[float]:
        return {part.p for part in network.modules() if isinstance(part, torch.nn.Dropout)}

    assert rates(unet("xs", (1, 8, 8))) == {0.0}
    assert rates(unet("xs", (1, 8, 8), dropout=0.25)) == {0.25}


@pytest.mark.parametrize(
    ("size", "shape", "dropout", "message"),
    [
        ("xxl", (1, 8, 8), 0.0, r"^network size must be one of xs, s, m, l, xl, got 'xxl'$"),
        ("xs", (1, 7, 8), 0.0, r"^image height and width must be even and at least 4, got 7 and 8$"),
        ("xs", (1, 8, 2), 0.0, r"^image height and width must be even and at least 4, got 8 and 2$"),
        ("xs", (1, 8, 8), 1.0, r"^dropout must be in \[0, 1\), got 1.0$"),
        ("xs", (1, 8, 8), -0.1, r"^dropout must be in \[0, 1\), got -0.1$"),
        ("xs", (8, 8), 0.0, r"^image shape must be \(channels, height, width\), got \(8, 8\)$"),
    ],
)
def test_bad_networks_are_refused(size: str, shape: tuple[int, ...], dropout: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unet(size, shape, dropout)


@pytest.mark.parametrize(
    ("size", "shape", "dropout", "message"),
    [
        ("xs", (1, 8, 8), 0.0, r"^network size must be one of s, m, l, got 'xs'$"),
        (
            "s",
            (1, 8, 10),
            0.0,
            r"^image shape must be \(channels, n, n\), n even, for patches of 2x2, got \(1, 8, 10\)$",
        ),
        ("s", (1, 9, 9), 0.0, r"n even, for patches of 2x2, got \(1, 9, 9\)$"),
        ("s", (1, 8, 8), 1.0, r"^dropout must be in \[0, 1\), got 1.0$"),
    ],
)
def test_bad_transformers_are_refused(size: str, shape: tuple[int, ...], dropout: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dit(size, shape, dropout)


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 36, 36)])
def test_attention_needs_large_images(shape: tuple[int, int, int]) -> None:
    message = r"^attention needs images of 32x32 or more, height and width multiples of 8, got \d+ and \d+$"
    with pytest.raises(ValueError, match=message):
        unet("xs", shape, attention=True)


@pytest.mark.parametrize("classes", [0, 3])
def test_small_sizes_see_patches(classes: int, tmp_path: Path) -> None:
    """Where there are pixels enough; a level of them is a folder that a pipeline of diffusers opens and samples."""
    assert [type(unet(size, (3, 8, 8))).__name__ for size in ("xs", "s", "m")] == ["UNet2DModel"] * 3
    built = [type(unet(size, (3, 16, 16))).__name__ for size in ("xs", "s", "m")]
    assert built == ["PatchUNet2DModel", "PatchUNet2DModel", "UNet2DModel"]

    network = unet("xs", (3, 16, 16), classes=classes).eval()
    told = {"class_labels": torch.tensor([1, 2])} if classes else {}
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 500.0])
    with torch.no_grad():
        found = network(x, t, **told).sample
        patches = x.view(2, 3, 8, 2, 8, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 8, 8)
        inner = network.unet(patches, t, **told).sample
    assert torch.equal(found, inner.view(2, 3, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(x.shape))

    conditions = {"class_labels": classes} if classes else None
    one = Level("xs", network, NoiseSchedule.cosine(), (3, 16, 16), prediction="v", conditions=conditions)
    one.save(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"class_labels": [0, 1]} if classes else {}
    assert pipe(batch_size=2, num_inference_steps=2, output_type="np", **options).images.shape == (2, 16, 16, 3)
    loaded = Level.load(tmp_path).network.eval()  # in channels_last
    torch.testing.assert_close(loaded(x, t, **told).sample.detach(), found)


@pytest.mark.parametrize("size", ["xs", "m"])
def test_a_call_does_not_walk_through_all_modules(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = unet(size, (3, 16, 16)).eval()
    inner: Any = getattr(network, "unet", network)
    assert isinstance(inner, unet_2d.UNet2DModel)
    assert inner.dtype == modeling_utils.get_parameter_dtype(inner) == torch.float32
    assert copy.deepcopy(inner).double().dtype == torch.float64
    monkeypatch.setattr(modeling_utils, "get_parameter_dtype", None)
    assert network(torch.zeros(1, 3, 16, 16), torch.tensor([5])).sample.shape == (1, 3, 16, 16)
