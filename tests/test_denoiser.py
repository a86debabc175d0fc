"""Denoisers: closed-form laws against autograd, what networks predict, and what they are told of the time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from mlem.denoiser import (
    MixtureDenoiser,
    NetworkDenoiser,
    gaussian_denoiser,
    of_rows,
)
from mlem.grids import TimeGrid
from mlem.predictions import PREDICTIONS, NoiseLevel, make_prediction
from mlem.schedule import NoiseSchedule
from mlem.solvers import GridPoint, denoiser_at
from tests.problems import COVARIANCE, MEAN, SCHEDULES, gaussian, level, mixture

COSINE = NoiseSchedule.cosine()


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_density(alpha: float, sigma: float) -> MultivariateNormal:
    return MultivariateNormal(alpha * MEAN, alpha**2 * COVARIANCE + sigma**2 * torch.eye(3, dtype=torch.float64))


def mixture_density(alpha: float, sigma: float) -> MixtureSameFamily:
    means = alpha * torch.stack([MEAN, -2 * MEAN])
    covariances = alpha**2 * torch.stack([COVARIANCE, 0.25 * COVARIANCE])
    parts = MultivariateNormal(means, covariances + sigma**2 * torch.eye(3, dtype=torch.float64))
    return MixtureSameFamily(Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)), parts)


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("t", [0.001, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("make", "density"), [(gaussian, gaussian_density), (mixture, mixture_density)])
def test_closed_forms_are_the_score(
    make: Callable[[NoiseSchedule], MixtureDenoiser], density: Callable[..., MixtureSameFamily], t: float, name: str
) -> None:
    """eps = -sigma grad log p_t(x), with the gradient by autograd."""
    schedule = SCHEDULES[name]()
    alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
    x = (2 * normals(64, 3)).requires_grad_()
    (score,) = torch.autograd.grad(density(alpha, sigma).log_prob(x).sum(), x)
    eps = make(schedule)(x.detach(), torch.full((64,), t, dtype=torch.float64))
    # far from the data at small t the numbers are hundreds
    torch.testing.assert_close(eps, -sigma * score, rtol=1e-10, atol=1e-10)


def test_times_may_differ_within_a_batch() -> None:
    x, t = normals(5, 3), torch.linspace(0.1, 1, 5, dtype=torch.float64)
    together = mixture(COSINE)(x, t)
    alone = torch.cat([mixture(COSINE)(x[i : i + 1], t[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [0.001, 0.02, 0.4, 1.0])
@pytest.mark.parametrize("d", [3, 40])
def test_round_components_are_diagonal_covariances(d: int, t: float) -> None:
    """To 1e-12 of the largest number in either, near the components, between them and far away."""
    means = normals(3, d, seed=1)
    weights, variances = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.01, 0.5, 2.0])
    x, times = torch.cat([means + 0.01, normals(8, d), 30 * normals(8, d)]), torch.full((19,), t, dtype=torch.float64)
    short = MixtureDenoiser(COSINE, weights, means, variances)
    full = MixtureDenoiser(COSINE, weights, means, variances[:, None, None] * torch.eye(d))
    expected = full(x, times)
    torch.testing.assert_close(short(x, times), expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_round_components_make_no_matrices() -> None:
    """In 20,000 dimensions one matrix would fill 3.2 GB."""
    d = 20_000
    data = MixtureDenoiser(COSINE, torch.ones(1), torch.zeros(1, d), torch.tensor([0.25]))
    x, t = normals(2, d), torch.tensor([0.2, 0.7], dtype=torch.float64)
    alpha, sigma = COSINE.alpha(t)[:, None], COSINE.sigma(t)[:, None]
    torch.testing.assert_close(data(x, t), sigma * x / (0.25 * alpha**2 + sigma**2), rtol=1e-12, atol=1e-12)


def test_closed_forms_keep_the_dtype() -> None:
    assert gaussian(COSINE)(torch.zeros(2, 3), torch.ones(2)).dtype == torch.float32


def test_mixture_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"must agree, got \(1,\), \(1, 3\) and \(1, 2, 2\)$"):
        gaussian_denoiser(COSINE, MEAN, torch.eye(2))
    with pytest.raises(ValueError, match=r"must agree, got \(3,\), \(2, 3\) and \(2,\)$"):
        MixtureDenoiser(COSINE, torch.ones(3), torch.zeros(2, 3), torch.ones(2))


def noised(t: Tensor) -> tuple[Tensor, Tensor, Tensor, NoiseLevel]:
    """x_0, z, x_t and what is known of the times t."""
    x_0, z = normals(len(t), 1, 4, 4, seed=1), normals(len(t), 1, 4, 4, seed=2)
    alpha, sigma = COSINE.alpha(t), COSINE.sigma(t)
    x = alpha.view(-1, 1, 1, 1) * x_0 + sigma.view(-1, 1, 1, 1) * z
    return x_0, z, x, NoiseLevel(t, alpha, sigma)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_training_target_is_the_noise(prediction: str) -> None:
    x_0, z, x, at = noised(torch.linspace(0.01, 1, 9, dtype=torch.float64))
    found = make_prediction(prediction)
    torch.testing.assert_close(found.eps(found.target(x_0, z, at), x, at), z, rtol=1e-10, atol=1e-10)


def test_targets_are_the_published_ones() -> None:
    x_0, z, x, at = noised(torch.tensor([0.3], dtype=torch.float64))
    alpha, sigma = at.like(x)
    target = {name: make_prediction(name).target(x_0, z, at) for name in PREDICTIONS}
    assert target["eps"] is z
    assert target["x0"] is x_0
    assert target["edm_denoised"] is x_0
    assert torch.equal(target["v"], alpha * z - sigma * x_0)
    assert torch.equal(target["flow"], z - x_0)
    assert torch.equal(target["sit"], x_0 - z)
    # table 1 of Karras et al., as written there
    y, kappa, d = x / alpha, sigma / alpha, 0.5
    c_skip, c_out = d**2 / (kappa**2 + d**2), kappa * d / (kappa**2 + d**2) ** 0.5
    torch.testing.assert_close(c_skip * y + c_out * target["edm"], x_0, rtol=1e-12, atol=1e-12)


def test_sums_with_weights_adding_to_one_may_be_taken_in_any_parametrisation() -> None:
    t = torch.linspace(0.01, 1, 9, dtype=torch.float64)
    _, _, x, at = noised(t)
    weights = torch.tensor([3.0, -5.5, 3.5], dtype=torch.float64)
    data = normals(3, *x.shape, seed=3)  # three levels' estimates of x_0
    a, s = at.like(x)
    levels = {"x0": data, "eps": (x - a * data) / s, "v": (a * (x - a * data) / s) - s * data}
    sums = {name: torch.einsum("k,k...->...", weights, values) for name, values in levels.items()}
    eps = {name: make_prediction(name).eps(total, x, at) for name, total in sums.items()}
    for name in levels:
        torch.testing.assert_close(eps[name], eps["eps"], rtol=1e-10, atol=1e-10)


def test_the_three_predictions_of_one_network_give_one_eps() -> None:
    x = normals(4, 3)
    t = torch.tensor([0.05, 0.3, 0.7, 1.0], dtype=torch.float64)
    a, s = COSINE.alpha(t)[:, None], COSINE.sigma(t)[:, None]
    truth = gaussian(COSINE)(x, t)
    data = (x - s * truth) / a
    outputs = {"eps": truth, "x0": data, "v": a * truth - s * data}
    for name, output in outputs.items():
        eps = NetworkDenoiser(lambda x, timestep, output=output: output, COSINE, name)(x, t)
        torch.testing.assert_close(eps, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_at_a_point_of_the_grid_the_bits_are_those_of_any_call(prediction: str, name: str) -> None:
    schedule = SCHEDULES[name]()
    denoiser = NetworkDenoiser(lambda x, timestep: torch.sin(x + timestep[:, None]), schedule, prediction)
    x = normals(5, 3)
    for t in (0.001, 1 / 3, 0.77, 1.0):
        here = denoiser_at(denoiser, GridPoint.at(schedule, t))
        times = torch.full((5,), t, dtype=torch.float64)
        assert torch.equal(here(x, times), denoiser(x, times))
    assert denoiser_at(denoiser, times) is denoiser


def test_a_denoiser_at_a_point_keeps_its_conditions_and_gives_those_of_some_rows() -> None:
    denoiser = NetworkDenoiser(lambda x, timestep, shift: x + shift[:, None], NoiseSchedule.cosine(), "eps")
    here = denoiser_at(denoiser.given({"shift": torch.arange(5.0)}), GridPoint.at(denoiser.schedule, 0.5))
    eps = of_rows(here, slice(3, 5))(torch.zeros(2, 1), torch.full((2,), 0.5))
    assert eps.flatten().tolist() == [3.0, 4.0]


def test_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^prediction must be one of v, eps, x0, edm, .*, sit, got 'noise'$"):
        NetworkDenoiser(lambda x, t: x, COSINE, "noise")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_time_reaches_the_network_in_float32(autocast: bool, dtype: torch.dtype) -> None:
    """What the sinusoidal embedding is given is bitwise `N t - 1` in float32, not a bf16 number."""
    small = level()
    seen: list[Tensor] = []
    small.network.time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    t = torch.tensor(TimeGrid.make("log_snr", COSINE, 20).times[:-1])
    x = torch.zeros(20, 1, 8, 8, dtype=torch.float32 if dtype == torch.float64 else dtype)
    if dtype == torch.bfloat16:
        small.network.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eps = small.denoiser(x, t)
    assert eps.dtype == x.dtype
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], t * 1000 - 1)
    assert not torch.equal(seen[0], (t.bfloat16() * 1000 - 1).float())


def test_diffusers_timesteps_are_whole_numbers() -> None:
    """t = (n + 1) / N is timestep n, to rounding: networks of other libraries see what they were trained on."""
    seen: list[Tensor] = []
    denoiser = NetworkDenoiser(lambda x, timestep: seen.append(timestep) or x, COSINE)
    denoiser(torch.zeros(1000, 1), torch.arange(1, 1001) / 1000)
    torch.testing.assert_close(seen[0], torch.arange(1000.0), rtol=0, atol=1e-4)
