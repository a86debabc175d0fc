"""Frechet distance between images and reference images, named by protocol and number of images.

Here are the distance and the metric `FID` on torchmetrics' sums, which can keep the features for `scores.py`. Features
come from `random_features.py`, `inception.py` or `dinov2.py`. Images are first made uint8 by `mlem.images.quantise`, so
a PNG and the tensor it was written from give the same value.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlem.images import quantise
from mlem.metrics.bank import FeatureBank
from mlem.metrics.dinov2 import dinov2
from mlem.metrics.inception import inception
from mlem.metrics.random_features import RandomFeatures

__all__ = ["FID", "FewImagesWarning", "Score", "frechet_distance"]


class FewImagesWarning(UserWarning):
    """Fewer images than feature dimensions: the covariance is singular and the distance biased upwards."""


@dataclass(frozen=True)
class Score:
    """The value of one metric.

    Attributes:
        name: kind, protocol and count, as in `fid_random256@2000`.
        value: the mean over `parts`, if any.
        count: number of generated images, over all ranks.
        real_count: number of reference images, over all ranks.
        spread: standard deviation over `parts`; None without parts.
        parts: such as "5 blocks" or "100 subsets".
    """

    name: str
    value: float
    count: int
    real_count: int
    spread: float | None = None
    parts: str | None = None


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> Tensor:
    """Squared Frechet (2-Wasserstein) distance of N(mean_1, cov_1) and N(mean_2, cov_2); Dowson and Landau (1982).

        |mean_1 - mean_2|^2 + tr cov_1 + tr cov_2 - 2 tr (cov_1^(1/2) cov_2 cov_1^(1/2))^(1/2)

    mean: (d,), cov: (d, d) symmetric positive semi-definite, possibly singular. Round-off can make the result for equal
    arguments slightly negative. The last trace is computed as the sum of the singular values of root_1^T root_2, where
    cov = root root^T: square roots of vanishing eigenvalues of the product would lose half the digits.
    """
    return _distance(_Gaussian.of(mean_1, cov_1), _Gaussian.of(mean_2, cov_2))


class _Gaussian(NamedTuple):
    """mean (d,), trace of the covariance, and a root of it (d, rank), which takes 2 s in 2,048 dimensions."""

    mean: Tensor
    trace: Tensor
    root: Tensor

    @staticmethod
    def of(mean: Tensor, cov: Tensor) -> _Gaussian:
        return _Gaussian(mean, cov.trace(), _root(cov))


def _distance(one: _Gaussian, other: _Gaussian) -> Tensor:
    """`frechet_distance` of these."""
    cross = torch.linalg.svdvals(one.root.T @ other.root).sum()
    return (one.mean - other.mean).square().sum() + one.trace + other.trace - 2 * cross


def _root(cov: Tensor) -> Tensor:
    """A factor (d, rank) with cov = root root^T; eigenvalues at round-off level are dropped."""
    values, vectors = torch.linalg.eigh(cov)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


class FID:
    """Frechet distance to reference images; under DDP each rank updates with its own images, sums meet in `compute`.

    Sums are float64. Nothing is downloaded.

    Args:
        features: "random256" (`RandomFeatures`), "inception" (needs the extra `fid` and a weights file), "dinov2"
            (needs transformers and a folder), or a module from uint8 (N, C, H, W) to (N, num_features) with the
            attributes `num_features` and `protocol`, its name. For "inception" and "dinov2" grey images are repeated
            to three channels.
        image_shape: (C, H, W).
        weights: see `inception` and `dinov2`.
        sha256: likewise.
        keep: also keep the features of every image, in float64; updates then need the indices.

    Raises:
        ValueError: the network cannot run.
    """

    def __init__(
        self,
        features: str | nn.Module = "random256",
        image_shape: tuple[int, int, int] = (1, 8, 8),
        weights: str | Path | None = None,
        sha256: str | None = None,
        keep: bool = False,
    ):
        channels, height, width = image_shape
        self.image_shape, self.keep = (channels, height, width), keep
        self._kind, self._repeat = "fid", 1
        if features in ("inception", "dinov2"):
            if channels not in (1, 3):
                raise ValueError(f"{features} takes images of 1 or 3 channels, got image_shape {self.image_shape}")
            self._repeat = 3 // channels
        if features == "inception":
            self.network, self.protocol = inception(weights, sha256)
        elif features == "dinov2":
            self._kind, self.network = "fd", dinov2(weights, sha256)
            self.protocol = self.network.protocol
        elif features == "random256":
            self.network, self.protocol = RandomFeatures(channels, min(height, width)), RandomFeatures.protocol
        elif isinstance(features, nn.Module):
            self.network, self.protocol = features, str(features.protocol)
        else:
            raise ValueError(f'features must be "random256", "inception", "dinov2" or a module, got {features!r}')
        self.network.requires_grad_(False)
        self.num_features = int(self.network.num_features)  # type: ignore[arg-type]
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.metric: FrechetInceptionDistance = FrechetInceptionDistance(_Given(self.num_features))
        self.bank, self.real_bank = FeatureBank(self.num_features), FeatureBank(self.num_features)
        self._real = dict[int, _Gaussian]()
        """The reference, by its number of images over all ranks; a new one where it changes, as copies share it."""
        self._warned = False

    @property
    def name(self) -> str:
        """The name without the count: `fid_random256`; for DINOv2, as in its paper, `fd_dinov2-l-1a2b3c4d`."""
        return f"{self._kind}_{self.protocol}"

    def to(self, device: str | torch.device) -> FID:
        """Move network, sums and features; updates move the images."""
        for part in (self.network, self.metric, self.bank, self.real_bank):
            part.to(device)
        self._real = {}
        return self

    def fresh(self) -> FID:
        """A copy without generated images, with the same network and, in the same memory, the same reference."""
        shared = {id(part): part for part in (self.network, self._real)} | {id(self.real_bank): self.real_bank.copy()}
        one = copy.deepcopy(self, shared)  # type: ignore[arg-type]
        one.reset()
        return one

    def update_real(self, images: Tensor, indices: Sequence[int] | None = None) -> None:
        """Add reference images, (N, C, H, W): uint8, or floating point in [-1, 1]. indices: (N,), with keep."""
        self._update(images, indices, real=True)

    def update(self, images: Tensor, indices: Sequence[int] | None = None) -> None:
        """Add generated images, (N, C, H, W): uint8, or floating point in [-1, 1]. indices: (N,), with keep."""
        self._update(images, indices, real=False)

    def _update(self, images: Tensor, indices: Sequence[int] | None, real: bool) -> None:
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(f"{self.name} was made for images {self.image_shape}, got a batch {tuple(images.shape)}")
        if self.keep and (indices is None or len(indices) != len(images)):
            given = "none" if indices is None else len(indices)
            raise ValueError(f"{self.name} keeps features by index: {len(images)} images need as many, got {given}")
        if real:
            self._real = {}
        pixels = images if images.dtype == torch.uint8 else quantise(images)
        if len(pixels) == 0:  # a rank's share may be empty
            return
        device = self.metric.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            features = self.network(pixels.to(device).repeat(1, self._repeat, 1, 1))
            self.metric.update(features, real=real)
        if self.keep and indices is not None:
            (self.real_bank if real else self.bank).add(indices, features)

    def compute(self, expected: int | None = None) -> Score:
        """The distance over the images of all ranks; every rank must call it and gets the same result.

        expected: the number of generated images requested. Raises ValueError for fewer, and for fewer than 2 images on
        either side; warns once (FewImagesWarning) below the number of feature dimensions.
        """
        with self.metric.sync_context():
            fake = (self.metric.fake_features_sum, self.metric.fake_features_cov_sum)
            count = int(self.metric.fake_features_num_samples)
        if expected is not None and count < expected:
            raise ValueError(f"{self.name}: expected {expected} generated images, got only {count}")
        return self._score(*fake, count)

    def score(self, features: Tensor) -> Score:
        """The distance of these features, (n, d) float64, to the reference, like `compute` for their images."""
        return self._score(features.sum(0), features.T @ features, len(features))

    def _score(self, total: Tensor, products: Tensor, count: int) -> Score:
        with self.metric.sync_context():
            real = (self.metric.real_features_sum, self.metric.real_features_cov_sum)
            real_count = int(self.metric.real_features_num_samples)
        if min(count, real_count) < 2:
            raise ValueError(
                f"{self.name} needs at least 2 images on each side, got {count} generated and {real_count} real"
            )
        if min(count, real_count) < self.num_features and not self._warned:
            self._warned = True
            text = (
                f"{self.name}@{count}: {count} generated and {real_count} real images for {self.num_features} features"
            )
            warnings.warn(f"{text}; compare it only with values of equal counts", FewImagesWarning, stacklevel=3)
        if real_count not in self._real:
            self._real[real_count] = _Gaussian.of(*_moments(*real, real_count))
        value = _distance(self._real[real_count], _Gaussian.of(*_moments(total, products, count)))
        return Score(f"{self.name}@{count}", float(value), count, real_count)

    def reset(self, real: bool = False) -> None:
        """Forget the generated images, and with `real` the reference images too."""
        self.metric.reset_real_features = real
        self.metric.reset()
        self.bank.clear()
        if real:
            self.real_bank.clear()
            self._real = {}  # not cleared: copies share it


class _Given(nn.Module):
    """Torchmetrics expects a network; ours has already run, so that other metrics share its features."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _moments(total: Tensor, products: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) from sum x and sum x x^T."""
    mean = total / count
    return mean, (products - count * mean.outer(mean)) / (count - 1)
