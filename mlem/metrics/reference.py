"""The reference side of the metrics: sums and features of the real images, computed once and cached on disk."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlem.metrics.bank import distributed
from mlem.metrics.fid import FID
from mlem.weights import read_tensors, write_tensors

__all__ = ["reference_path", "reference_statistics"]

_SUMS = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")


def reference_path(folder: str | Path, fid: FID, key: Mapping[str, Any]) -> Path:
    """The cache file: `<protocol>@<count>_<hash of the whole key>.safetensors`."""
    digest = hashlib.sha256(_full_key(fid, key).encode()).hexdigest()[:12]
    return Path(folder) / f"{fid.protocol}@{key['count']}_{digest}.safetensors"


def reference_statistics(
    images: Iterable[tuple[Sequence[int], Tensor]], fid: FID, folder: str | Path | None, key: Mapping[str, Any]
) -> bool:
    """Fill `fid` with the reference: from the cache if its key agrees, else from `images`, then cached.

    Args:
        images: batches (indices, images) as for `update_real`, not read if the cache is used; under DDP each rank
            passes its own share.
        fid: without real images.
        folder: of the cache; None for no cache.
        key: identifies the reference by JSON values: data set, manifest hash, and `count`, which is checked against
            the images read. Protocol (which distinguishes Inception weights) and image shape are added.

    Returns:
        Whether the cache was used.

    Raises:
        ValueError: `fid` already holds real images, or the count is wrong.
    """
    if fid.metric.real_features_num_samples > 0:
        raise ValueError("reference_statistics needs an FID without real images: call fid.reset(real=True) first")
    path = None if folder is None else reference_path(folder, fid, key)
    served = _read(path, fid, key) if path is not None and _rank() == 0 else None
    if _of_rank_0(served is not None):
        _fill(fid, served or {})  # ranks are summed: all but rank 0 stay at zero
        return True
    for indices, batch in images:
        fid.update_real(batch, indices)
    with fid.metric.sync_context():
        tensors = {name: getattr(fid.metric, name).cpu() for name in _SUMS}
    count = int(tensors["real_features_num_samples"])
    if count != key["count"]:
        raise ValueError(f"the reference should hold {key['count']} images, but {count} were read over all ranks")
    if fid.keep:
        tensors["features"] = _smallest(fid.real_bank.gather().cpu())
    if path is not None and _rank() == 0:
        _keep(path, tensors, _full_key(fid, key))
    return False


def _keep(path: Path, tensors: Mapping[str, Tensor], key: str) -> None:
    """Write the cache; warn if that fails: the scores do not need it."""
    try:
        write_tensors(path, tensors, {"key": key})
    except OSError as error:
        warnings.warn(
            f"the reference statistics are not cached ({error}) and recomputed each time; metric.cache=FOLDER keeps "
            "them elsewhere",
            stacklevel=3,
        )


def _full_key(fid: FID, key: Mapping[str, Any]) -> str:
    return json.dumps({**key, "protocol": fid.protocol, "image_shape": fid.image_shape}, sort_keys=True)


def _smallest(features: Tensor) -> Tensor:
    """The features in float32 if that loses nothing, as for Inception."""
    return features.float() if torch.equal(features.float().double(), features) else features


def _read(path: Path, fid: FID, key: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The cached tensors, or None without an intact file with this key, and with features if needed."""
    if not path.is_file():
        return None
    wanted = (*_SUMS, "features") if fid.keep else _SUMS
    try:
        found, about = read_tensors(path)
    except (ValueError, OSError):  # a damaged cache is made again
        return None
    if about.get("key") != _full_key(fid, key) or not {*wanted} <= found.keys():
        return None
    return {name: found[name] for name in wanted}


def _fill(fid: FID, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if name == "features":
            fid.real_bank.add(range(len(value)), value)
        else:
            setattr(fid.metric, name, value.to(fid.metric.device))


def _rank() -> int:
    return torch.distributed.get_rank() if distributed() else 0


def _of_rank_0(answer: bool) -> bool:
    """The answer of rank 0, on every rank: ranks that disagree would deadlock."""
    if not distributed():
        return answer
    answers = [answer]
    torch.distributed.broadcast_object_list(answers, src=0)
    return answers[0]
