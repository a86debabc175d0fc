"""Frechet distance between images and reference images, named after its protocol and its count.

Lives here: the distance, the metric `FID` on torchmetrics' sums, and the cache of reference sums. The features are
`random_features.py` or torchmetrics' Inception. Images become uint8 by `mlem.images.quantise` before anything else,
so a PNG and the tensor it was written from give the same value.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlem.files import atomic_write, sha256
from mlem.images import quantise
from mlem.metrics.random_features import RandomFeatures

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

# The same file under the names that pytorch-fid and torch-fidelity keep it; its SHA-256 starts as the names end.
_INCEPTION_HASH = "6726825d"
_INCEPTION_FILES = (
    f"pt_inception-2015-12-05-{_INCEPTION_HASH}.pth",
    f"weights-inception-2015-12-05-{_INCEPTION_HASH}.pth",
)
_SUMS = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")


class FewImagesWarning(UserWarning):
    """Fewer images than feature dimensions: the covariance is singular and the distance biased upwards."""


@dataclass(frozen=True)
class FIDResult:
    """name: protocol and count, as in `fid_random256@2000`; value: squared Frechet distance, round-off included;
    count, real_count: generated and reference images used, over all ranks.
    """

    name: str
    value: float
    count: int
    real_count: int


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> Tensor:
    """Squared Frechet (2-Wasserstein) distance of N(mean_1, cov_1) and N(mean_2, cov_2); Dowson and Landau (1982).

        |mean_1 - mean_2|^2 + tr cov_1 + tr cov_2 - 2 tr (cov_1^(1/2) cov_2 cov_1^(1/2))^(1/2)

    mean: (d,), cov: (d, d) symmetric positive semi-definite, singular ones too. Round-off can leave equal arguments
    slightly below zero. The last trace is computed as the sum of the singular values of root_1^T root_2, where
    cov = root root^T: eigenvalues of the product would lose half the digits when the square root is taken of zeros.
    """
    cross = torch.linalg.svdvals(_root(cov_1).T @ _root(cov_2)).sum()
    return (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross


def _root(cov: Tensor) -> Tensor:
    """A factor (d, rank) with cov = root root^T; eigenvalues that are round-off are left out."""
    values, vectors = torch.linalg.eigh(cov)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


class FID:
    """Frechet distance to reference images; under DDP each rank updates with its own images, sums meet in `compute`.

    features: "random256" (no download, `RandomFeatures`), "inception" (needs the extra `fid` and a weights file; grey
    images are repeated to three channels), or a module from uint8 (N, C, H, W) to (N, num_features) that has the
    attributes `num_features` and `protocol` (its name). image_shape: (C, H, W). weights: the Inception file; None
    looks in the torch hub cache. Sums are float64. Raises ValueError where Inception cannot run; downloads nothing.
    """

    def __init__(
        self,
        features: str | nn.Module = "random256",
        image_shape: tuple[int, int, int] = (1, 8, 8),
        weights: str | Path | None = None,
    ):
        channels, height, width = image_shape
        self.image_shape = (channels, height, width)
        self._repeat = 1
        if features == "inception":
            if channels not in (1, 3):
                raise ValueError(f"fid_inception takes images of 1 or 3 channels, got image_shape {self.image_shape}")
            self._repeat = 3 // channels
            self.protocol = "inception"
            network = _inception(weights)
        elif features == "random256":
            network = RandomFeatures(channels, min(height, width))
            self.protocol = network.protocol
        elif isinstance(features, nn.Module):
            network, self.protocol = features, str(features.protocol)
        else:
            raise ValueError(f'features must be "random256", "inception" or a module, got {features!r}')
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.metric: FrechetInceptionDistance = FrechetInceptionDistance(network)
        self.metric.inception.requires_grad_(False)
        self.num_features = self.metric.real_features_sum.numel()
        self._warned = False

    @property
    def name(self) -> str:
        """The name without the count: `fid_random256`."""
        return f"fid_{self.protocol}"

    def to(self, device: str | torch.device) -> FID:
        """Move network and sums; images are moved there by the updates."""
        self.metric.to(device)
        return self

    def update_real(self, images: Tensor) -> None:
        """Add reference images, (N, C, H, W): uint8, or floating point in [-1, 1]."""
        self._update(images, real=True)

    def update(self, images: Tensor) -> None:
        """Add generated images, (N, C, H, W): uint8, or floating point in [-1, 1]."""
        self._update(images, real=False)

    def _update(self, images: Tensor, real: bool) -> None:
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(f"{self.name} was made for images {self.image_shape}, got a batch {tuple(images.shape)}")
        pixels = images if images.dtype == torch.uint8 else quantise(images)
        if len(pixels) == 0:  # the share of a rank may be empty
            return
        device = self.metric.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            self.metric.update(pixels.to(device).repeat(1, self._repeat, 1, 1), real=real)

    def compute(self, expected: int | None = None) -> FIDResult:
        """The distance over the images of all ranks; every rank must call it, and gets the same result.

        expected: how many generated images were asked for. Raises ValueError for fewer than that, and for fewer
        than 2 images on either side; warns once (FewImagesWarning) below the number of feature dimensions.
        """
        with self.metric.sync_context():
            real = (self.metric.real_features_sum, self.metric.real_features_cov_sum)
            fake = (self.metric.fake_features_sum, self.metric.fake_features_cov_sum)
            real_count, count = int(self.metric.real_features_num_samples), int(self.metric.fake_features_num_samples)
        if expected is not None and count < expected:
            raise ValueError(f"{self.name}: {expected} generated images were asked for, only {count} came")
        if min(count, real_count) < 2:
            raise ValueError(
                f"{self.name} needs at least 2 images on each side, got {count} generated and {real_count} real"
            )
        if min(count, real_count) < self.num_features and not self._warned:
            self._warned = True
            text = (
                f"{self.name}@{count}: {count} generated and {real_count} real images for {self.num_features} features"
            )
            warnings.warn(f"{text}; compare it only with values of the same counts", FewImagesWarning, stacklevel=2)
        value = frechet_distance(*_moments(*real, real_count), *_moments(*fake, count))
        return FIDResult(f"{self.name}@{count}", float(value), count, real_count)

    def reset(self, real: bool = False) -> None:
        """Forget the generated images, and with `real` the reference images too."""
        self.metric.reset_real_features = real
        self.metric.reset()


def _moments(total: Tensor, products: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) from sum x and sum x x^T."""
    mean = total / count
    return mean, (products - count * mean.outer(mean)) / (count - 1)


def _inception(weights: str | Path | None) -> nn.Module:
    """Torchmetrics' Inception with the resize of the original FID, or one line about what is missing."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    candidates = [Path(weights)] if weights is not None else [cache / name for name in _INCEPTION_FILES]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    missing = [] if find_spec("torch_fidelity") else ["torch-fidelity (pip install mlem-diffusion[fid])"]
    missing += [] if path else [f"its weights file at {candidates[0]}"]
    if path is None or missing:
        raise ValueError(f'fid_inception needs {" and ".join(missing)}; features="random256" needs neither')
    if not sha256(path).startswith(_INCEPTION_HASH):
        raise ValueError(f"{path} is not {_INCEPTION_FILES[0]}: its SHA-256 does not start with {_INCEPTION_HASH}")
    from torchmetrics.image.fid import NoTrainInceptionV3

    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=False)
    network.num_features = 2048
    return network


def reference_statistics(
    images: Iterable[Tensor], fid: FID, cache_path: str | Path | None, key: Mapping[str, Any]
) -> bool:
    """Fill `fid` with the reference, from the cache where its key agrees, else from `images`, then cached.

    images: batches as for `update_real`, not read when the cache serves; under DDP each rank passes its own share.
    cache_path: a safetensors file, or None for no cache. key: what identifies the reference (data set, manifest hash,
    size, count), JSON values; protocol and image shape are added. A `count` in it is checked against the images read.
    Returns whether the cache served. Raises ValueError if `fid` already holds real images, or for a wrong count.
    """
    if fid.metric.real_features_num_samples > 0:
        raise ValueError("reference_statistics needs an FID without real images: call fid.reset(real=True) first")
    full_key = json.dumps({**key, "protocol": fid.protocol, "image_shape": fid.image_shape}, sort_keys=True)
    served = _read_sums(Path(cache_path), full_key) if cache_path is not None and _rank() == 0 else None
    if _said_by_rank_0(served is not None):
        for name, value in (served or {}).items():  # the ranks are summed: all but rank 0 stay at zero
            setattr(fid.metric, name, value.to(fid.metric.device))
        return True
    for batch in images:
        fid.update_real(batch)
    with fid.metric.sync_context():
        sums = {name: getattr(fid.metric, name).cpu() for name in _SUMS}
    count = int(sums["real_features_num_samples"])
    if key.get("count", count) != count:
        raise ValueError(f"the reference should hold {key['count']} images, {count} were read on all ranks together")
    if cache_path is not None and _rank() == 0:
        from safetensors.torch import save

        with atomic_write(cache_path) as file:
            file.write(save(sums, metadata={"key": full_key}))
    return False


def _read_sums(path: Path, full_key: str) -> dict[str, Tensor] | None:
    """The cached sums, or None where there is no readable file with this very key."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != full_key:
                return None
            return {name: file.get_tensor(name) for name in _SUMS}
    except SafetensorError:  # a damaged cache is made again
        return None


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0


def _said_by_rank_0(answer: bool) -> bool:
    """The answer of rank 0, on every rank: ranks that disagreed would wait for each other for ever."""
    if not _distributed():
        return answer
    answers = [answer]
    torch.distributed.broadcast_object_list(answers, src=0)
    return answers[0]
