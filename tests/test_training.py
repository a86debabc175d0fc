"""The training step: what is learned does not depend on how the batch is cut, and the average is the average."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mlem.level import Level
from mlem.metrics.denoising import NOISE_LEVELS, denoising_errors
from mlem.networks import unet
from mlem.predictions import PREDICTIONS
from mlem.schedule import NoiseSchedule
from mlem.training.averaging import averaged_state, make_average
from mlem.training.denoising import DenoisingModule
from tests.commands import PLAIN, metrics, succeed

SHAPE = (1, 8, 8)
OPTIONS: dict[str, Any] = {"seed": 3, "steps": 100, "learning_rate": 1e-3, "warmup_steps": 10, "weight_decay": 0.0}


COSINE = NoiseSchedule.cosine()


def _module(batch_size: int, prediction: str = "v", schedule: NoiseSchedule = COSINE) -> DenoisingModule:
    torch.manual_seed(0)
    level = Level("xs", unet("xs", SHAPE), schedule, SHAPE, prediction=prediction)
    module = DenoisingModule(level, batch_size=batch_size, **OPTIONS)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # there is no trainer here
    module.on_fit_start()
    return module


def _batch(first: int, count: int) -> dict[str, torch.Tensor]:
    images = torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    position = torch.arange(first, first + count)
    return {"image": images[position], "position": position, "index": position}


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradient_does_not_depend_on_the_cut(prediction: str) -> None:
    """8 images in one batch, as 2 shares of a rank, and as 4 accumulated parts of equal size, in float64."""
    gradients = []
    for share in (8, 4, 2):
        module = _module(8, prediction).double()
        for first in range(8, 16, share):
            loss = module.training_step(_batch(first, share), 0)
            (loss * share / 8).backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    # times and timesteps pass through float32, the same in every cut
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-9, atol=1e-12)


def test_noise_and_times_differ_between_positions_and_batches() -> None:
    module = _module(8)
    first, second = module.times(torch.arange(8)), module.times(torch.arange(8, 16))
    assert len(set(first.tolist() + second.tolist())) == 16
    # stratified: every eighth of [0, 1) has one time of each batch
    for times in (first, second):
        assert sorted((times * 8 + 1e-4).int().tolist()) != [0] * 8
        gaps = times.sort().values.diff()
        torch.testing.assert_close(gaps, torch.full((7,), 0.125))


@pytest.mark.parametrize(
    ("prediction", "schedule", "mean", "deviation"),
    [("edm", NoiseSchedule.edm(), -1.2, 1.2), ("flow", NoiseSchedule.flow(), 0.0, 1.0)],
)
def test_noise_levels_of_training(prediction: str, schedule: NoiseSchedule, mean: float, deviation: float) -> None:
    """ln kappa is normal, stratified over the batch; what is to be learned has the variance of the paper."""
    module = _module(1000, prediction, schedule)
    log_kappa = schedule.kappa(module.times(torch.arange(1000))).log()
    assert log_kappa.mean().item() == pytest.approx(mean, abs=0.01)
    assert log_kappa.std().item() == pytest.approx(deviation, rel=0.02)
    # a network that says 0 errs by all of it: F has variance 1 for data of deviation 0.5, and z - x_0 has 1 + 0.25
    module.network = nn.Identity()
    module.network.forward = lambda x, time: 0 * x  # type: ignore[method-assign]
    images = 0.5 * torch.randn(1000, *SHAPE, generator=torch.Generator().manual_seed(0))
    loss = module.training_step({"image": images, "position": torch.arange(1000)}, 0).item()
    assert loss == pytest.approx(1.0 if prediction == "edm" else 1.25, rel=0.02)


def test_learns_a_point_mass(tmp_path: Path) -> None:
    """On one single image, the loss falls far below that of predicting nothing."""
    module = _module(16)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    image = torch.full((16, *SHAPE), 0.5)
    losses = []
    for step in range(150):
        position = torch.arange(step * 16, (step + 1) * 16)
        loss = module.training_step({"image": image, "position": position}, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.1 * sum(losses[:3]) / 3 * 10


def test_denoising_error_of_a_perfect_and_of_an_ignorant_denoiser() -> None:
    schedule = NoiseSchedule.cosine()
    images, index = _batch(0, 64)["image"].float(), torch.arange(64)

    def perfect(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (x - schedule.alpha(t[0]) * images) / schedule.sigma(t[0])

    def ignorant(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    for error in denoising_errors(perfect, schedule, images, index, 0).values():
        assert error.max() < 1e-5
    errors = denoising_errors(ignorant, schedule, images, index, 0)
    assert tuple(errors) == NOISE_LEVELS
    for error in errors.values():
        # the mean square of 4096 standard normals is 1 +- sqrt(2 / 4096); 4 standard errors
        assert abs(error.mean() - 1) < 4 * (2 / 4096) ** 0.5


def test_average_in_closed_form() -> None:
    """One parameter that takes the values 1, 2, 3, ...: the average follows its recursion."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        device = torch.device("cpu")

    decay, module = 0.6, One()
    callback = make_average(decay)
    callback._average_model = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=callback._kwargs["multi_avg_fn"])
    expected = None
    for n, value in enumerate(range(1, 12)):
        with torch.no_grad():
            module.weight.fill_(value)
        callback._average_model.update_parameters(module)
        keep = min(decay, (1 + n) / (10 + n))
        expected = float(value) if expected is None else keep * expected + (1 - keep) * value
        assert averaged_state(callback)["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_decay_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"training\.average_decay must be in \[0, 1\), got 1"):
        make_average(1.0)


def test_learning_rate_rises_and_falls() -> None:
    module = _module(8)
    factors = [module._learning_rate_factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[10:]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(tmp_path: Path, precision: str) -> None:
    """Clipping, averaging and export work under autocast, and the loss is near that of full precision."""
    options = (*PLAIN, "training.steps=12", "training.epoch_steps=6")
    succeed("train", *options, f"trainer.precision={precision}", cwd=tmp_path)
    lines = metrics(tmp_path / "runs/digits/unet_xs/metrics.jsonl")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    # random weights predict about nothing: the loss begins near E v^2, which is about 1
    assert 0.3 < losses[0] < 1.5
    assert losses[-1] < losses[0]
