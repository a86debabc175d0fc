"""DINOv2 features for the Frechet distance of Stein et al. (arXiv:2306.04675): finding and reading the network.

The network is transformers' Dinov2Model. Images are prepared as in their code: resized to 224 x 224 pixels by Pillow's
bicubic filter in 8 bits, normalised by the mean and standard deviation of ImageNet. The output is the class token after
the last normalisation. Nothing is downloaded and no pickle is read.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlem.files import damaged, read_object
from mlem.files import sha256 as sha256_of
from mlem.metrics.checksums import check_sha256

__all__ = ["DINOv2", "dinov2"]

_SIDE = 224
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIZES = {384: "s", 768: "b", 1024: "l", 1536: "g"}
"""Width -> letter of the published size."""
_WEIGHTS = "model.safetensors"
_BATCH = 32  # images at a time: 256 of 224 x 224 would take gigabytes in the large sizes
_FOLDER = "the folder of a Dinov2Model saved by transformers"
_REMEDY = "copy the folder again"


class DINOv2(nn.Module):
    """Class tokens of a Dinov2Model.

    Args:
        network: in float32. Its position embeddings are resampled to 224 x 224 pixels.
        protocol: the name.
    """

    def __init__(self, network: Any, protocol: str) -> None:
        super().__init__()
        self.protocol, self.num_features = protocol, int(network.config.hidden_size)
        self.network = network.eval()
        patch = network.embeddings.patch_embeddings.patch_size[0]
        positions = network.embeddings.position_embeddings
        network.embeddings.position_embeddings = nn.Parameter(_resampled(positions.detach(), _SIDE // patch))
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None])
        self.register_buffer("deviation", torch.tensor(_DEVIATION)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W), uint8. Returns (N, num_features), float32."""
        return torch.cat([self._tokens(part) for part in images.split(_BATCH)])

    def _tokens(self, images: Tensor) -> Tensor:
        from PIL import Image

        pictures = (Image.fromarray(image) for image in images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        resized = np.stack([np.asarray(one.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)) for one in pictures])
        x = torch.from_numpy(resized).to(images.device).permute(0, 3, 1, 2) / 255
        x = (x - self.get_buffer("mean")) / self.get_buffer("deviation")
        return self.network(pixel_values=x.contiguous()).pooler_output


def _resampled(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + n^2, d) for side^2 patches, resampled as in the original network.

    transformers resamples by side / n; the original, and the published numbers, by (side + 0.1) / n.
    """
    own = math.isqrt(positions.shape[1] - 1)
    if own == side:
        return positions
    grid = positions[:, 1:].unflatten(1, (own, own)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / own, mode="bicubic")
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def dinov2(weights: str | Path | None, sha256: str | None = None) -> DINOv2:
    """The network in a folder.

    Args:
        weights: the folder, with config.json and model.safetensors.
        sha256: the first 8 or more hexadecimal digits of the expected SHA-256 of model.safetensors; None: any.

    Returns:
        The network. Its protocol is, for example, `dinov2-l-1a2b3c4d`: the size, and 8 digits of that SHA-256.

    Raises:
        ValueError: names what is missing or does not fit, and the remedy.
    """
    if find_spec("transformers") is None:
        raise ValueError("metric=fd_dinov2 needs transformers: pip install mlem-diffusion[pipelines]")
    if weights is None:
        raise ValueError(f"metric=fd_dinov2 needs {_FOLDER}, got none: add metric.weights=FOLDER")
    folder = Path(weights)
    _check_config(folder)
    path = folder / _WEIGHTS
    if not path.is_file():
        raise ValueError(f"metric.weights={folder} has no {_WEIGHTS}: write it with save_pretrained of transformers")
    stat = path.stat()
    found = _hash(path, stat.st_size, stat.st_mtime_ns)
    if sha256 is not None:
        check_sha256(path, found, sha256)
    network = _read(folder)
    width = int(network.config.hidden_size)
    return DINOv2(network, f"dinov2-{_SIZES.get(width, width)}-{found[:8]}")


def _check_config(folder: Path) -> None:
    """Raise ValueError unless the folder holds a Dinov2Model for 224 x 224 RGB pixels."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"metric.weights={folder} has no config.json: name {_FOLDER}")
    config = read_object(path)
    if (kind := config.get("model_type")) != "dinov2":
        raise ValueError(f"metric.weights={folder} holds a {kind}, not a dinov2: name {_FOLDER}")
    patch, channels = config.get("patch_size", 14), config.get("num_channels", 3)
    if not (isinstance(patch, int) and patch > 0 and _SIDE % patch == 0 and channels == 3):
        raise ValueError(
            f"metric.weights={folder} has patch_size {patch} and num_channels {channels}: it must take RGB images of "
            f"{_SIDE}x{_SIDE} pixels in whole patches, like all published ones"
        )


@cache
def _hash(path: Path, size: int, time: int) -> str:
    """SHA-256 of a large file, computed once per version, identified by size and time."""
    return sha256_of(path)


def _read(folder: Path) -> Any:
    from safetensors import SafetensorError
    from transformers import Dinov2Model

    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    with damaged(folder, _REMEDY), _quiet():
        try:
            read: Any = Dinov2Model.from_pretrained
            network, about = read(folder, dtype=torch.float32, **options)
        except (OSError, SafetensorError) as error:
            raise ValueError(str(error)) from error
        if odd := sorted(map(str, [*about["missing_keys"], *about["unexpected_keys"], *about["mismatched_keys"]])):
            raise ValueError(f"{len(odd)} weights do not fit its config: {', '.join(odd[:3])}")
        if bad := [name for name, weight in network.named_parameters() if not bool(torch.isfinite(weight).all())]:
            raise ValueError(f"weights {bad[0]} hold NaN or infinity")
    return network


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Silence the progress bars and reports of transformers: errors are one line."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
