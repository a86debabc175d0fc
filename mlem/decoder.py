"""The decoder of a latent space: an AutoencoderKL saved by diffusers, between images and scaled latents.

A folder with `config.json` and `diffusion_pytorch_model.safetensors`. Weights are read when first needed; until
then only the config is. No other class is built, and no pickle is read. Importing this module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlem.files import atomic_write, damaged, read_object, sha256

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Decoder"]

WEIGHTS = "diffusion_pytorch_model.safetensors"
_BATCH = 8  # latents decoded at once: decoding a whole batch of samples may not fit the memory
_REMEDY = "copy the folder again, or save it again with save_pretrained"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


class Decoder:
    """An AutoencoderKL in a folder, read when first needed. It can be pickled.

    Latents are scaled: z = (encoded - shift_factor) * scaling_factor.

    Args:
        folder: such as `vae/` of a pipeline.
        expected: the required fingerprint; None: any.

    Attributes:
        latents: `scaling_factor`, and `shift_factor` if there is one, as in `Level.latents`.

    Raises:
        FileNotFoundError: a file is missing; it is named.
        ValueError: it is not a usable AutoencoderKL, or its config is damaged; the message says why.
    """

    def __init__(self, folder: str | os.PathLike[str], expected: str | None = None) -> None:
        self.folder, self._expected = Path(folder), expected
        self._config = _config(self.folder)
        self.latents: dict[str, float] = {"scaling_factor": float(self._config.get("scaling_factor", 0.18215))}
        if self._config.get("shift_factor") is not None:
            self.latents["shift_factor"] = float(self._config["shift_factor"])
        self._network: Any = None

    @staticmethod
    def beside(folder: Path, expected: str) -> Decoder:
        """The decoder in `folder/decoder`, where `save` put it: beside a family or latents."""
        return Decoder(folder / "decoder", expected)

    @staticmethod
    def of_pipeline(folder: str | os.PathLike[str]) -> Decoder | None:
        """The decoder in `vae/` of a pipeline's folder; None if there is none, or one of another class."""
        vae = Path(folder) / "vae"
        if not (vae / "config.json").is_file() or not (vae / WEIGHTS).is_file():
            return None
        return Decoder(vae) if read_object(vae / "config.json").get("_class_name") == "AutoencoderKL" else None

    @property
    def fingerprint(self) -> str:
        """Hash of its config and weights."""
        stat = (self.folder / WEIGHTS).stat()
        own = {key: value for key, value in self._config.items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
        digest.update(_hash(self.folder / WEIGHTS, stat.st_size, stat.st_mtime_ns).encode())
        return digest.hexdigest()[:16]

    @property
    def network(self) -> Any:
        """The AutoencoderKL, in eval mode and the dtype of its weights. Raises ValueError if it is damaged."""
        if self._network is None:
            if self._expected not in (None, found := self.fingerprint):
                raise ValueError(f"{self.folder} has hash {found}, expected {self._expected}; {_REMEDY}")
            self._network = _read(self.folder, bool(self._config.get("force_upcast", True)))
        return self._network

    def latent_shape(self, picture: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, h, w), the latent shape of images (C, H, W). Raises ValueError for images that it cannot encode."""
        channels, factor = self._config["in_channels"], self._factor
        if len(picture) != 3 or picture[0] != channels:
            raise ValueError(
                f"{self.folder} encodes images with {channels} channel{'s' * (channels != 1)}, but these are "
                f"{picture}; use a decoder for such images"
            )
        _, height, width = picture
        if height % factor or width % factor:
            raise ValueError(
                f"{self.folder} needs images whose sides are multiples of {factor}, got {height}x{width}; prepare "
                "the data set at another size"
            )
        return self._config["latent_channels"], height // factor, width // factor

    def picture_shape(self, latent: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, H, W), the image shape of latents (C, h, w). Raises ValueError for latents that it cannot decode."""
        channels = self._config["latent_channels"]
        if len(latent) != 3 or latent[0] != channels:
            raise ValueError(
                f"{self.folder} decodes latents with {channels} channels, but these are {latent}; use the decoder that "
                "the networks were trained with"
            )
        return self._config["out_channels"], latent[1] * self._factor, latent[2] * self._factor

    def encode(self, pictures: Tensor) -> Tensor:
        """Mean and standard deviation of the unscaled latents of images (B, C, H, W) in [-1, 1]: (B, 2, C, h, w)."""
        import torch

        network = self.network.to(pictures.device)
        with torch.no_grad():
            found = network.encode(pictures.to(network.dtype)).latent_dist
            return torch.stack([found.mean, found.std], 1).float()

    def decode(self, latents: Tensor) -> Tensor:
        """The images of scaled latents (B, C, h, w), nominally in [-1, 1]: (B, C, H, W) float32, on their device."""
        import torch

        shape = self.picture_shape(tuple(latents.shape[1:]))
        if not len(latents):
            return torch.empty(0, *shape, device=latents.device)
        network = self.network.to(latents.device)
        scale, shift = self.latents["scaling_factor"], self.latents.get("shift_factor", 0.0)
        with torch.no_grad():
            parts = ((part.float() / scale + shift).to(network.dtype) for part in latents.split(_BATCH))
            return torch.cat([network.decode(part).sample.float() for part in parts])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Copy the files, unless they are already there."""
        folder = Path(folder)
        for name in (WEIGHTS, "config.json"):
            source, target = self.folder / name, folder / name
            if target.is_file() and sha256(target) == sha256(source):
                continue
            with open(source, "rb") as file, atomic_write(target) as copied:
                while part := file.read(2**24):
                    copied.write(part)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_network": None}

    @property
    def _factor(self) -> int:
        return 2 ** (len(self._config["block_out_channels"]) - 1)


def _config(folder: Path) -> dict[str, Any]:
    """The config of a folder that holds an AutoencoderKL in safetensors."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; name the folder of an AutoencoderKL, vae/ of a pipeline")
    config = read_object(folder / "config.json")
    if (kind := config.get("_class_name")) != "AutoencoderKL":
        raise ValueError(f"{folder} holds a {kind}; only an AutoencoderKL can be the decoder")
    if not (folder / WEIGHTS).is_file():
        if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES):
            raise ValueError(f"{folder} holds {pickles[0]}, a pickle, which mlem does not read; save it as {WEIGHTS}")
        raise FileNotFoundError(f"{folder / WEIGHTS} is missing; {_REMEDY}")
    with damaged(folder / "config.json", _REMEDY):
        _check(config)
    return config


def _check(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a config that mlem would misread."""
    sizes = [config[name] for name in ("in_channels", "out_channels", "latent_channels")]
    if not all(isinstance(size, int) and size > 0 for size in [*sizes, *config["block_out_channels"]]):
        raise ValueError("channels must be whole numbers >= 1")
    if sizes[0] != sizes[1]:
        raise ValueError(f"it encodes images with {sizes[0]} channels and decodes to {sizes[1]}")
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise ValueError("it scales each channel separately (latents_mean), which mlem does not support")
    scale, shift = float(config.get("scaling_factor", 1.0)), float(config.get("shift_factor") or 0.0)
    if not (math.isfinite(scale) and scale > 0 and math.isfinite(shift)):
        raise ValueError(f"scaling_factor must be above 0 and shift_factor a number, got {scale} and {shift}")


@cache
def _hash(path: Path, size: int, time: int) -> str:
    """SHA-256 of a file, computed once per version, identified by size and time."""
    return sha256(path)


def _read(folder: Path, upcast: bool) -> Any:
    """The network, in the dtype of its weights; upcast: float32 instead of float16, which would overflow."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            dtypes = {file.get_tensor(name).dtype for name in list(file.keys())[:1]}
    except SafetensorError as error:
        why = f"{folder / WEIGHTS} is not a safetensors file, or it was cut short ({error}); {_REMEDY}"
        raise ValueError(why) from error
    dtype = dtypes.pop() if dtypes else torch.float32
    dtype = torch.float32 if upcast and dtype == torch.float16 else dtype
    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": True}
    with damaged(folder, _REMEDY):
        try:
            read: Any = AutoencoderKL.from_pretrained
            network, about = read(folder, output_loading_info=True, **options)
        except OSError as error:
            raise ValueError(" ".join(str(error).split())) from error
        if odd := sorted([*about["missing_keys"], *about["unexpected_keys"], *about["mismatched_keys"]]):
            raise ValueError(f"{len(odd)} weights do not fit its config: {', '.join(map(str, odd[:3]))}")
        for name, weight in network.named_parameters():
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(f"weights {name} hold NaN or infinity")
    return network.eval().requires_grad_(False)
