"""The damage part of `faults.py`: files of every kind, and how each is used."""

from __future__ import annotations

import hashlib
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mlem import Family
from mlem.data import Shards
from mlem.files import read_object
from mlem.metrics import FID
from mlem.metrics.reference import reference_statistics
from mlem.outputs import claim, verify
from mlem.training.checkpoint_files import AtomicCheckpointIO, steps_of

GOOD = ("equal", "named", "harmless")
LIMIT = 60
"""Seconds within which a damaged file must be handled."""


@dataclass(frozen=True)
class Kind:
    """Files of one kind. Args: pattern: below the trained folder. use: (folder, file) -> the result of using it."""

    pattern: str
    use: Callable[[Path, Path], Any]


def _hash(tensors: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def _checkpoint(folder: Path, path: Path) -> Any:
    path = path.with_name(path.name.removesuffix(".sha256"))
    found = AtomicCheckpointIO().load_checkpoint(path)
    return steps_of(path, found["state_dict"]), _hash(found["state_dict"]), repr(found["optimizer_states"])


def _data(folder: Path, path: Path) -> Any:
    shards = Shards.open(folder / "data/digits")
    pixels = _hash({str(i): shards.read(i) for i in range(0, len(shards), 50)})
    shards.close()
    return len(shards), shards.shape, pixels


def _family(folder: Path, path: Path) -> Any:
    family = Family.load(folder / "runs/tiny/family")
    levels = [(one.name, one.measured, one.common(), one.flops, str(one.network)) for one in family.levels]
    return family.weights_hash, levels


def _calibration(folder: Path, path: Path) -> Any:
    family = Family.load(folder / "runs/tiny/family")
    return family.fitted.calibration_for(family).to_dict()


def _plan(folder: Path, path: Path) -> Any:
    family = Family.load(folder / "runs/tiny/family")
    return family.fitted.plan_for(family, "best").to_dict()


def _samples(folder: Path, path: Path) -> Any:
    count, faults = verify(folder / "samples")
    if faults:
        raise ValueError(f"{path}: {faults}")  # the command prints them
    claim(folder / "samples", read_object(folder / "samples/manifest.json")["settings"])
    return count


def _reference(folder: Path, path: Path) -> Any:
    """Made again if damaged."""
    shards, fid = Shards.open(folder / "data/digits"), FID()
    key = {"data": "digits", "count": 300}
    images = [(range(300), torch.stack([shards.read(i) for i in range(300)]))]
    reference_statistics(images, fid, folder / "data/digits/reference", key)
    return _hash({name: getattr(fid.metric, f"real_features_{name}") for name in ("sum", "cov_sum", "num_samples")})


KINDS = {
    "checkpoint": Kind("runs/tiny/unet_xs/checkpoints/step-*.ckpt*", _checkpoint),
    "shard": Kind("data/digits/*.tar", _data),
    "index of shards": Kind("data/digits/.index.npz", _data),
    "manifest of data": Kind("data/digits/manifest.json", _data),
    "level": Kind("runs/tiny/family/level_*/*", _family),
    "family": Kind("runs/tiny/family/family.json", _family),
    "calibration": Kind("runs/tiny/family/calibration.json", _calibration),
    "plan": Kind("runs/tiny/family/plans/best.json", _plan),
    "manifest of samples": Kind("samples/[mis]*[!p]*", _samples),
    "image": Kind("samples/0*.png", _samples),
    "reference": Kind("data/digits/reference/*@300_*.safetensors", _reference),
}


def damages(folder: Path, flips: int, cuts: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Damage a file of each kind in turn, use it, and restore it; kind, outcome and place of each."""
    chance = random.Random(seed)
    _reference(folder, folder)  # a small one
    expected = {name: kind.use(folder, next(folder.glob(kind.pattern))) for name, kind in KINDS.items()}
    for number in range(flips + cuts):
        name = list(KINDS)[number % len(KINDS)]
        path = chance.choice(sorted(folder.glob(KINDS[name].pattern)))
        whole = path.read_bytes()
        place, bit = chance.randrange(len(whole)), chance.randrange(8)
        if number < flips:
            damaged = whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :]
        else:
            damaged = whole[:place]
        what = f"bit {bit} of byte {place}" if number < flips else f"cut at {place}"
        path.write_bytes(damaged)
        try:
            yield name, *_outcome(KINDS[name], folder, path, expected[name], what)
        finally:
            path.write_bytes(whole)


def _outcome(kind: Kind, folder: Path, path: Path, expected: Any, what: str) -> tuple[str, str]:
    where = f"{path.relative_to(folder)}, {what}"

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not judged in {LIMIT} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            same = kind.use(folder, path) == expected
    except TimeoutError as error:
        return "late", f"{where}: {error}"
    except (ValueError, OSError) as error:
        said = str(error)
        # the file, or the one in its folder that it no longer fits
        known = (path.name.removesuffix(".sha256") in said or str(path.parent) in said) and "\n" not in said
        return ("named", where) if known else ("not named", f"{where}: {said}")
    except Exception as error:
        return "traceback", f"{where}: {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return ("harmless" if same else "another result"), where
