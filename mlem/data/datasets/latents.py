"""Latents of a prepared data set, encoded once by an AutoencoderKL."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlem.data.shards.manifest import MANIFEST, Manifest, plain_folder
from mlem.data.sources import DataSet, Labels, Source, Stored
from mlem.decoder import Decoder

if TYPE_CHECKING:
    from mlem.data.shards.reading import Shards

__all__ = ["Latents"]


@dataclass(frozen=True)
class Latents(DataSet):
    """Latents of a prepared data set, encoded by an AutoencoderKL of diffusers.

    Mean and standard deviation of each image are stored, (2, C, h, w) float16; training draws from them.

    Args:
        source: the folder of the prepared data set
        decoder: the folder of the AutoencoderKL, such as vae/ of a pipeline
    """

    source: str | None = None
    decoder: str | None = None

    def __post_init__(self) -> None:
        if self.source is not None and self.decoder is None:
            raise ValueError(f"decoder must be given: the folder of the AutoencoderKL that encodes {self.source}")

    def build(self) -> Stored:
        path = None if self.source is None else plain_folder(self.source)
        decoder = None if self.decoder is None else Decoder(plain_folder(self.decoder))
        shape = None
        if path is not None and decoder is not None and (path / MANIFEST).is_file():
            shape = decoder.latent_shape(Manifest.read(path / MANIFEST).shape)
        info = {} if decoder is None else {"decoder": decoder.fingerprint}
        return Stored(shape, info, path, "FOLDER --decoder FOLDER", partial(_open, decoder), decoder)


def _open(decoder: Decoder | None, path: Path) -> Source:
    from mlem.data.shards.reading import Shards

    assert decoder is not None
    shards = Shards.open(path)
    about = shards.manifest
    if about.latents:
        raise ValueError(f"{path} already holds latents; name the image data set that they were made from")
    decoder.latent_shape(shards.shape)
    records = json.dumps([record.sha256 for record in about.shards])
    info = {"data": about.name, "data_options": about.info, "data_sha256": hashlib.sha256(records.encode()).hexdigest()}
    labels = Labels(shards.classes, partial(_labels, shards)) if shards.classes else None
    info["decoder"] = decoder.fingerprint
    return Source(partial(_latents, shards, decoder), len(shards), info, labels=labels, decoder=decoder)


def _labels(shards: Shards, start: int, stop: int) -> np.ndarray:
    return shards.labels(range(start, stop)).numpy()


def _latents(shards: Shards, decoder: Decoder, start: int, stop: int) -> np.ndarray:
    """(stop - start, 2, C, h, w) float16: mean and standard deviation, not scaled."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # one by one: the last bits of a network's output depend on the batch size
    parts = [decoder.encode(shards.images([i]).to(device)).cpu() for i in range(start, stop)]
    return torch.cat(parts).numpy().astype(np.float16)
