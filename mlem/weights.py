"""Weights on disk: safetensors, written atomically and read with a checksum. No pickles."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mlem.files import atomic_write, sha256

__all__ = ["read_tensors", "read_weights", "write_tensors", "write_weights"]


def write_weights(path: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically; shared memory is written once per tensor.

    Raises:
        ValueError: names a tensor with NaN or infinity, or a value that is not a tensor.
    """
    from safetensors.torch import save

    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"weights {name} are of type {type(tensor).__name__}, not a tensor; not saved to {path}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"weights {name} hold NaN or infinity; not saved to {path}")
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        own[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    with atomic_write(path) as file:
        file.write(save(own))


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write computed tensors and metadata with a checksum over both, which safetensors lacks."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as file:
        file.write(save(plain, metadata={**about, "sha256": _digest(plain, about)}))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata written by `write_tensors`. Raises ValueError if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, str] = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or it was cut short ({error}); delete it") from error
    if about.pop("sha256", None) != _digest(tensors, about):
        raise ValueError(f"{path} differs from its checksum; delete it, and it is made again")
    return tensors, about


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """SHA-256 of names, types, shapes and bytes, and of the metadata."""
    digest = hashlib.sha256(repr(sorted(about.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_weights(
    path: str | os.PathLike[str],
    network: nn.Module,
    checksum: str | None = None,
    *,
    owner: str = "config.json",
    remedy: str = "check the size in model=",
) -> None:
    """Load safetensors into `network`, in place.

    Args:
        path: of the file.
        network: takes the weights.
        checksum: SHA-256 of the file in hex; None: not checked.
        owner: what the network was built from, for the error message.
        remedy: what to do about weights that do not fit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not safetensors, differs from its checksum, holds NaN or infinity (the tensor is
            named), or does not fit the network (at most five keys are named).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy it again or train this level again")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or it was cut short ({error}); copy it again") from error
    if checksum is not None and sha256(path) != checksum:
        raise ValueError(f"{path} differs from its checksum in mlem.json; copy it again or train this level again")
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: weights {name} hold NaN or infinity; use an earlier checkpoint")
    if odd := _differences(weights, network.state_dict()):
        shown = "; ".join(sorted(odd)[:5])
        raise ValueError(f"{path} does not fit {owner}, {len(odd)} keys differ: {shown}; {remedy}")
    network.load_state_dict(weights)


def _differences(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """The keys in which weights of a file differ from those of a network, each with the reason."""
    odd = [f"{key} (missing)" for key in own.keys() - weights.keys()]
    odd += [f"{key} (extra)" for key in weights.keys() - own.keys()]
    odd += [
        f"{key} ({tuple(weights[key].shape)} in the file, {tuple(own[key].shape)} in the network)"
        for key in own.keys() & weights.keys()
        if own[key].shape != weights[key].shape
    ]
    return odd
