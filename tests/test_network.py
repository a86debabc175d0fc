"""The UNet presets: cost from size to size, forward-mode differentiation, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from mlem.networks import SIZES, flops, parameters, unet
from tests.problems import level

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


def test_flops_are_those_of_the_real_device() -> None:
    with torch.device("meta"):
        shadow = unet("xs", (1, 8, 8))
    assert flops(shadow, (1, 8, 8)) == flops(unet("xs", (1, 8, 8)), (1, 8, 8))


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
