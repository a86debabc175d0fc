"""Training one denoising network, and measuring denoising error on held-out images.

Data order, noise times, noise and dropout are functions of (seed, batch number), so a resumed run repeats an
uninterrupted one bit for bit with nothing stored, and the global batch is the same for every number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from mlem.conditions import Conditions, of_labels
from mlem.decoder import Decoder
from mlem.denoiser import NetworkDenoiser
from mlem.family import Family
from mlem.level import Level
from mlem.metrics.denoising import denoising_errors
from mlem.noise import NoiseStream
from mlem.plots import error_by_noise_level
from mlem.predictions import NoiseLevel
from mlem.training.optimizers import renew_options

__all__ = ["DenoisingModule", "FamilyModule", "noise_level_figure"]


_FLIPS, _LABELS = 3, 2
"""Slots of the training stream; noise has 0 and times 1."""


class DenoisingModule(pl.LightningModule):
    """A network that learns to denoise. It is the module's only part, so averaging covers nothing else.

    Args:
        level: the network with its schedule and prediction.
        seed: of times, noise and dropout.
        batch_size: images per step, over all ranks.
        steps: total optimizer steps.
        learning_rate: at the end of the warm-up; it decays to `final_rate` times that by a half cosine.
        warmup_steps: over which the learning rate rises linearly.
        weight_decay: of AdamW.
        beta2: of AdamW.
        final_rate: final learning rate, as a share of the peak.
        label_dropout: share of images whose class is replaced by "no class".
        flip: whether images are mirrored with probability 1/2.
        decoder: for latents, used in the sampler evaluation.
        teacher: a trained level with the same schedule, prediction and conditions, whose outputs are the targets of the
            last `distillation_steps` optimizer steps (knowledge distillation); None: targets come from the data alone.
            What multilevel sampling pays is the difference between levels, which this lowers.
        distillation_steps: see teacher.
    """

    def __init__(
        self,
        level: Level,
        *,
        seed: int,
        batch_size: int,
        steps: int,
        learning_rate: float,
        warmup_steps: int,
        weight_decay: float,
        beta2: float = 0.99,
        final_rate: float = 0.1,
        label_dropout: float = 0.0,
        flip: bool = False,
        decoder: Decoder | None = None,
        teacher: Level | None = None,
        distillation_steps: int = 0,
    ) -> None:
        super().__init__()
        self.network: nn.Module = level.network
        self._level = {"name": level.name, "schedule": level.schedule, "shape": level.shape}
        self._level |= {"prediction": level.prediction, "data": level.data, "conditions": level.conditions}
        self._level["licence"] = level.licence
        self._latents, self._decoder = level.latents, decoder
        self.conditions = level.conditions
        self.schedule = level.schedule
        self.prediction = level.prediction
        self.seed, self.batch_size, self.steps = seed, batch_size, steps
        self.learning_rate, self.warmup_steps, self.weight_decay = learning_rate, warmup_steps, weight_decay
        self._betas, self.final_rate = (0.9, beta2), final_rate
        self.label_dropout, self.flip = label_dropout, flip
        # in a tuple, so that its weights are not this module's
        self._teacher: tuple[Level, ...] = () if teacher is None else (teacher,)
        self._first_taught = steps - distillation_steps
        self._stream = NoiseStream(seed, "training")

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The network with its current weights."""
        return NetworkDenoiser(self.network, self.schedule, self.prediction)

    def family(self) -> Family:
        """The network as a family of one, for the sampler evaluation."""
        return Family([self.level({})], decoder=self._decoder)

    def level(self, measured: Mapping[str, Any]) -> Level:
        """The network as a level, with its measurements."""
        level = Level(network=self.network, measured=dict(measured), **self._level)  # type: ignore[arg-type]
        level.latents = self._latents
        return level

    def times(self, position: Tensor) -> Tensor:
        """Training times of the samples at these positions of the endless sequence: (B,) -> (B,) in [0, 1].

        From the prediction's distribution, stratified over the global batch (Kingma et al., arXiv:2107.00630):
        `(u + i / batch) mod 1`, u for the batch.
        """
        batch = position // self.batch_size
        shift = self._stream.uniform(batch, [1], torch.float64)[0]
        shares = ((shift + (position % self.batch_size) / self.batch_size) % 1.0).float()
        return self.prediction.training_times(shares, self.schedule)

    def mirrored(self, images: Tensor, position: Tensor) -> Tensor:
        """The images at these positions, (B, C, H, W), each mirrored or not."""
        if not self.flip:
            return images
        turned = self._stream.uniform(position, [_FLIPS], torch.float32)[0] < 0.5
        return torch.where(turned.view(-1, 1, 1, 1), images.flip(3), images)

    def told(self, batch: dict[str, Tensor]) -> Conditions:
        """Conditions of a training batch: classes, or "no class" for some images."""
        told = of_labels(self.conditions, batch)
        if not told or not self.label_dropout:
            return told
        kept = self._stream.uniform(batch["position"], [_LABELS], torch.float32)[0] >= self.label_dropout
        several = {name: n for name, n in self.conditions.items() if isinstance(n, int) and n > 1}
        return told | {name: torch.where(kept, told[name], n) for name, n in several.items()}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        position = batch["position"]
        x_0 = self.mirrored(batch["image"], position)
        t = self.times(position)
        z = self._stream.normal(position, [0], x_0.shape[1:], x_0.dtype)[0]
        at = NoiseLevel.of(self.schedule, t)
        alpha, sigma = at.like(x_0)
        x_t = alpha * x_0 + sigma * z
        x_t, told = x_t.contiguous(memory_format=torch.channels_last), self.told(batch)
        target = self._target(x_0, z, at, x_t, t, told)
        if self._has_dropout:
            # keyed by the first position of this rank's share: differs between ranks, survives a resume
            torch.manual_seed((self.seed * 0x9E3779B1 + int(position[0])) % 2**63)
        output = self.denoiser.given(told).predict(x_t, t)
        loss = nn.functional.mse_loss(output, target)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _target(self, x_0: Tensor, z: Tensor, at: NoiseLevel, x_t: Tensor, t: Tensor, told: Conditions) -> Tensor:
        """What the network shall predict at x_t: from the data, or in the last steps the teacher's output."""
        if not self._teacher or self.global_step < self._first_taught:
            return self.prediction.target(x_0, z, at)
        with torch.no_grad():
            return self._teacher[0].denoiser.given(told).predict(x_t, t)

    def on_fit_start(self) -> None:
        self._has_dropout = any(isinstance(part, nn.Dropout) and part.p > 0 for part in self.modules())
        for teacher in self._teacher:
            teacher.network.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def on_train_start(self) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        scheduler: Any = self.lr_schedulers()
        renew_options(optimizer, scheduler, self.learning_rate, weight_decay=self.weight_decay, betas=self._betas)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        images = batch["image"]
        denoiser = self.denoiser.given(of_labels(self.conditions, batch))
        errors = denoising_errors(denoiser, self.schedule, images, batch["index"], self.seed)
        options: dict[str, Any] = {"sync_dist": True, "batch_size": len(images), "on_epoch": True}
        for time, error in errors.items():
            self.log(f"val/error_t{time:.2f}", error.mean(), **options)
        self.log("val/error", torch.stack(list(errors.values())).mean(), prog_bar=True, **options)

    def configure_optimizers(self) -> Any:
        # a fused optimizer unscales gradients itself, and then Lightning cannot clip them in mixed precision
        fused = str(self.trainer.precision).startswith("32")
        optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=self.learning_rate,
            betas=self._betas,
            weight_decay=self.weight_decay,
            fused=fused,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _learning_rate_factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        half_cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_rate + (1 - self.final_rate) * half_cosine


class FamilyModule(pl.LightningModule):
    """A trained family under `trainer.test`: the denoising error of every level on held-out images.

    Attributes:
        image_errors: level -> the error of each image of this rank, averaged over noise levels, in batches.
    """

    def __init__(self, family: Family, seed: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(level.network for level in family.levels)
        self._family, self.seed = family, seed
        self.image_errors: dict[str, list[Tensor]] = {name: [] for name in family.names}

    def family(self) -> Family:
        """The family, for the sampler evaluation."""
        return self._family

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        images = batch["image"]
        for level in self._family.levels:
            denoiser = level.denoiser.given(of_labels(level.conditions, batch))
            errors = denoising_errors(denoiser, denoiser.schedule, images, batch["index"], self.seed)
            options: dict[str, Any] = {"sync_dist": True, "batch_size": len(images), "on_epoch": True}
            for time, error in errors.items():
                self.log(f"test/{level.name}/error_t{time:.2f}", error.mean(), **options)
            by_image = torch.stack(list(errors.values())).mean(0)
            self.image_errors[level.name].append(by_image.cpu())
            self.log(f"test/{level.name}/error", by_image.mean(), **options)


def noise_level_figure(family: Family, metrics: dict[str, float], images: int, path: Path) -> None:
    """Draw denoising error against log-SNR, one line per level.

    Args:
        family: the levels.
        metrics: of FamilyModule, `test/LEVEL/error_tTIME`.
        images: number of held-out images.
        path: of the PNG.
    """
    curves = {}
    for name in family.names:
        prefix = f"test/{name}/error_t"
        times = {float(key.removeprefix(prefix)): value for key, value in metrics.items() if key.startswith(prefix)}
        log_snr = family.schedule.log_snr(torch.tensor(sorted(times), dtype=torch.float64))
        curves[name] = (log_snr.tolist(), [float(times[time]) for time in sorted(times)])
    steps = ", ".join(f"{level.name} {level.measured.get('steps', '?')}" for level in family.levels)
    caption = f"{family.data}, {images} held-out images; averaged weights, training steps: {steps}"
    error_by_noise_level(curves, path, caption)
