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
from mlem.networks import told, unet
from mlem.predictions import PREDICTIONS, NoiseLevel
from mlem.schedule import NoiseSchedule
from mlem.training.averaging import averaged_state, make_average
from mlem.training.denoising import DenoisingModule
from tests.commands import PLAIN, metrics, succeed

SHAPE = (1, 8, 8)
OPTIONS: dict[str, Any] = {"seed": 3, "steps": 100, "learning_rate": 1e-3, "warmup_steps": 10, "weight_decay": 0.0}


COSINE = NoiseSchedule.cosine()


def _module(
    batch_size: int, prediction: str = "v", schedule: NoiseSchedule = COSINE, *, classes: int = 0, **options: Any
) -> DenoisingModule:
    torch.manual_seed(0)
    conditions = told("unet", classes)
    network = unet("xs", SHAPE, classes=classes)
    level = Level("xs", network, schedule, SHAPE, prediction=prediction, conditions=conditions)
    module = DenoisingModule(level, batch_size=batch_size, **OPTIONS | options)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # there is no trainer here
    module.on_fit_start()
    return module


def _batch(first: int, count: int) -> dict[str, torch.Tensor]:
    images = torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    position = torch.arange(first, first + count)
    return {"image": images[position], "position": position, "index": position, "label": position % 3}


CONDITIONAL: dict[str, Any] = {"classes": 3, "label_dropout": 0.5, "flip": True}


@pytest.mark.parametrize(("prediction", "options"), [*((one, {}) for one in PREDICTIONS), ("v", CONDITIONAL)])
def test_gradient_does_not_depend_on_the_cut(prediction: str, options: dict[str, Any]) -> None:
    """8 images in one batch, as 2 shares of a rank, and as 4 accumulated parts of equal size, in float64."""
    gradients = []
    for share in (8, 4, 2):
        module = _module(8, prediction, **options).double()
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


def test_labels_are_told_or_dropped_by_position() -> None:
    module = _module(8, classes=3, label_dropout=0.25)
    position = torch.arange(4000)
    batch = {"position": position, "index": position, "label": position % 3}
    told = module.told(batch)["class_labels"]
    dropped = told == 3
    assert torch.equal(told[~dropped], batch["label"][~dropped])
    # four standard errors
    assert abs(dropped.float().mean() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    part = {name: values[100:110] for name, values in batch.items()}
    assert torch.equal(module.told(part)["class_labels"], told[100:110])
    assert not torch.equal(_module(8, classes=3, label_dropout=0.25, seed=4).told(batch)["class_labels"], told)
    assert torch.equal(_module(8, classes=3).told(batch)["class_labels"], batch["label"])


def test_one_class_is_told_without_labels_and_never_dropped() -> None:
    module = _module(8, classes=1, label_dropout=0.5)
    position = torch.arange(64)
    assert not module.told({"position": position, "index": position})["class_labels"].any()
    with pytest.raises(ValueError, match=r"^the network takes class_labels, which the images of this data set do not"):
        _module(8, classes=2).told({"position": position, "index": position})


def test_images_are_mirrored_by_position() -> None:
    module, position = _module(8, flip=True), torch.arange(2000)
    images = torch.arange(64.0).view(1, *SHAPE).expand(2000, *SHAPE)
    seen = module.mirrored(images, position)
    turned = (seen == images.flip(3)).flatten(1).all(1)
    assert torch.equal(seen[~turned], images[~turned])
    assert abs(turned.float().mean() - 0.5) < 4 * (0.25 / 2000) ** 0.5
    assert torch.equal(module.mirrored(images[50:60], position[50:60]), seen[50:60])
    dropped = _module(8, classes=3, label_dropout=0.5).told(
        {"position": position, "index": position, "label": position % 3}
    )
    assert abs(((dropped["class_labels"] == 3) == turned).float().mean() - 0.5) < 0.05  # chances of their own


def test_the_network_is_trained_on_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step and the validation: labels, mirrored images."""
    module, seen = _module(8, classes=3, label_dropout=0.5, flip=True), []
    forward = module.network.forward

    def watched(x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> Any:
        seen.append(class_labels)
        return forward(x, t, class_labels)

    monkeypatch.setattr(module.network, "forward", watched)
    batch = _batch(0, 8)
    batch["image"] = batch["image"].float()
    module.training_step(batch, 0)
    module.validation_step(batch, 0)
    assert torch.equal(seen[0], module.told(batch)["class_labels"])
    assert len(seen) == 1 + len(NOISE_LEVELS)
    assert all(torch.equal(labels, batch["label"]) for labels in seen[1:])


def test_in_the_last_steps_the_teacher_is_the_target() -> None:
    """Its output on the same noisy, mirrored and labelled images; its weights are neither learned nor saved."""
    torch.manual_seed(1)
    network = unet("s", SHAPE, classes=3)
    teacher = Level("s", network, COSINE, SHAPE, conditions=told("unet", 3))
    alone = _module(8, **CONDITIONAL)
    taught = _module(8, **CONDITIONAL, teacher=teacher, distillation_steps=100)
    late = _module(8, **CONDITIONAL, teacher=teacher, distillation_steps=99)
    batch = _batch(0, 8)
    batch["image"] = batch["image"].float()
    position, given = batch["position"], alone.told(batch)
    t, x_0 = alone.times(position), alone.mirrored(batch["image"], position)
    z = alone._stream.normal(position, [0], SHAPE, torch.float32)[0]
    alpha, sigma = NoiseLevel.of(COSINE, t).like(x_0)
    x_t = alpha * x_0 + sigma * z
    with torch.no_grad():
        outputs = [one.denoiser.given(given).predict(x_t, t) for one in (taught, teacher)]
    loss = taught.training_step(batch, 0)
    loss.backward()
    assert loss.item() == pytest.approx((outputs[0] - outputs[1]).square().mean().item(), rel=1e-4)
    assert late.training_step(batch, 0).item() == alone.training_step(batch, 0).item() != loss.item()
    assert all(value.grad is None for value in network.parameters())
    assert taught.state_dict().keys() == alone.state_dict().keys()


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
    constant = _module(8, final_rate=1.0)
    assert [constant._learning_rate_factor(step) for step in (9, 50, 100)] == pytest.approx([1.0] * 3)


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
