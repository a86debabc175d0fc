"""The Inception network of the published FID: finding its weights file, checking it, building the network.

The network is torch-fidelity's, through torchmetrics, with the TensorFlow 1 resize of the original FID. Nothing is
downloaded, and only tensors are unpickled from the file.
"""

from __future__ import annotations

import pickle
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from mlem.files import sha256 as sha256_of
from mlem.metrics.checksums import check_sha256

__all__ = ["ORIGINAL", "inception"]

ORIGINAL = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of the file with the original weights."""
# The same file under its names in pytorch-fid and torch-fidelity.
_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")


def inception(weights: str | Path | None = None, sha256: str | None = None) -> tuple[nn.Module, str]:
    """The network, from uint8 (N, 3, H, W) to float32 (N, 2048), and its protocol.

    Args:
        weights: the file; None: look in the torch hub cache.
        sha256: the first 8 or more hexadecimal digits of the SHA-256 of other weights; None: expect the original
            ones.

    Returns:
        The network and its protocol: `inception`, or for other weights `inception-` and 8 digits of their SHA-256.

    Raises:
        ValueError: names what is missing.
    """
    path = _weights_file(weights)
    found = sha256_of(path)
    if sha256 is not None:
        check_sha256(path, found, sha256)
    elif found != ORIGINAL:
        raise ValueError(
            f"{path} is not the original Inception: its SHA-256 does not start with {ORIGINAL[:8]}; for other weights "
            f"add metric.sha256={found[:12]}"
        )
    return _network(path), "inception" if found == ORIGINAL else f"inception-{found[:8]}"


def _weights_file(weights: str | Path | None) -> Path:
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    candidates = [Path(weights)] if weights is not None else [cache / name for name in _FILES]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    missing = [] if find_spec("torch_fidelity") else ["torch-fidelity (pip install mlem-diffusion[fid])"]
    missing += [] if path else [f"its weights file at {candidates[0]}"]
    if path is None or missing:
        raise ValueError(f'fid_inception needs {" and ".join(missing)}; features="random256" needs neither')
    return path


def _network(path: Path) -> nn.Module:
    try:  # torch-fidelity would unpickle anything: check first that there are only tensors
        torch.load(path, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, IndexError, KeyError) as error:  # from reading garbage
        raise ValueError(f"{path} is damaged or holds more than tensors; fetch it again") from error
    try:
        import torch_fidelity  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
        from torchmetrics.image.fid import NoTrainInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision made for another torch
        raise ValueError(
            f"fid_inception needs torch-fidelity, which cannot be imported ({error}); install the torchvision that "
            "matches this torch"
        ) from error
    try:
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=False)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit Inception ({why}); use weights in the layout of {_FILES[1]}") from error
    network.num_features = 2048  # type: ignore[assignment]
    return network
