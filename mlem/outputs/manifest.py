"""What a folder of samples should hold, byte by byte, and what it does hold.

folder/images.sha256     SHA-256 and path of every image, in the format of `sha256sum`
folder/manifest.json     count, indices, settings, and the SHA-256 of that list; written last
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mlem.files import read_object, sha256, write_record, write_text
from mlem.outputs.images import is_whole, sample_indices, sample_path

__all__ = ["Survey", "spans", "survey", "verify", "write_manifest"]

_FORMAT = 1
_MANIFEST, _LIST = "manifest.json", "images.sha256"
_READERS = 8  # files read in parallel: a network disk is mostly waiting


@dataclass(frozen=True)
class Survey:
    """The contents of a folder of samples.

    Args:
        sound: index -> SHA-256 of the image.
        broken: index -> fault.
        noted: index -> SHA-256 in the manifest; empty without a manifest.
    """

    sound: dict[int, str]
    broken: dict[int, str]
    noted: dict[int, str]

    def named(self) -> str:
        """The first broken images, in one line."""
        first = [f"sample {index} {why}" for index, why in list(self.broken.items())[:3]]
        more = f"; and {len(self.broken) - 3} more" if len(self.broken) > 3 else ""
        return "; ".join(first) + more


def survey(folder: Path) -> Survey:
    """Check every image: it must match the manifest, or be a complete PNG if not listed yet."""
    noted = _noted(folder)
    there = sample_indices(folder)

    def look(index: int) -> tuple[str, str | None]:
        path = sample_path(folder, index)
        digest = sha256(path)
        if index in noted:
            return digest, None if digest == noted[index] else f"differs from its SHA-256 in {_LIST}"
        return digest, None if is_whole(path) else "is not a complete PNG"

    with ThreadPoolExecutor(_READERS) as pool:
        seen = dict(zip(there, pool.map(look, there), strict=True))
    broken = dict.fromkeys(noted.keys() - seen.keys(), "is missing")
    broken |= {index: why for index, (_, why) in seen.items() if why is not None}
    sound = {index: digest for index, (digest, why) in seen.items() if why is None}
    return Survey(sound, dict(sorted(broken.items())), noted)


def write_manifest(folder: Path, hashes: Mapping[int, str]) -> None:
    """Record that `folder` holds the images with these indices and SHA-256s."""
    lines = [f"{hashes[index]}  {sample_path(Path(), index).as_posix()}\n" for index in sorted(hashes)]
    write_text(folder / _LIST, "".join(lines))
    about = {"format": _FORMAT, "count": len(hashes), "indices": spans(hashes)}
    write_record(
        folder / _MANIFEST,
        about | {"settings": read_object(folder / "settings.json"), "sha256": sha256(folder / _LIST)},
    )


def _noted(folder: Path) -> dict[int, str]:
    """The list, if the manifest confirms it: a kill between the two leaves an older manifest."""
    if not (folder / _MANIFEST).exists() or not (folder / _LIST).exists():
        return {}
    listed = (folder / _LIST).read_bytes()
    if read_object(folder / _MANIFEST).get("sha256") != hashlib.sha256(listed).hexdigest():
        return {}
    lines = (line.split("  ", 1) for line in listed.decode().splitlines())
    return {int(Path(name).stem): digest for digest, name in lines}


def verify(folder: Path) -> tuple[int, dict[int, str]]:
    """Number of images in the manifest of `folder`, and index -> fault, including images not listed.

    Raises FileNotFoundError if there is no manifest and ValueError if it is damaged.
    """
    if not (folder / _MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder} has no {_MANIFEST}: run its sample command again, which writes it at the end"
        )
    found = survey(folder)
    if not found.noted:
        raise ValueError(f"{folder}/{_LIST} does not match {_MANIFEST}: run its sample command again")
    extra = dict.fromkeys(found.sound.keys() - found.noted.keys(), f"is not in {_MANIFEST}")
    return len(found.noted), dict(sorted((found.broken | extra).items()))


def spans(indices: Iterable[int]) -> str:
    """`"0-9,20"`, as `seeds=` takes them."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)
