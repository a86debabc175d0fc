"""Joining the sample folders of several runs, such as cluster jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlem.files import atomic_write, clear_leftovers, folder_lock, read_object, write_record
from mlem.ledger import Ledger
from mlem.outputs.folder import claim, differences, write_grid
from mlem.outputs.images import sample_path
from mlem.outputs.manifest import survey, write_manifest

__all__ = ["merge"]


def merge(out: Path, parts: Sequence[Path]) -> int:
    """Copy the samples of `parts` into `out`; return how many it then holds. Run again, it continues.

    `out` may hold samples of earlier merges; its ledger is the sum over `parts`. Everything is checked before anything
    is copied.

    Raises:
        FileNotFoundError: a part holds no samples.
        ValueError: settings differ, two folders hold different images under one index (names both), a part has broken
            images, or `out` was sampled into.
    """
    ledger = out / "ledger.json"
    if ledger.exists() and "merged" not in read_object(ledger):
        raise ValueError(f"{out} was sampled into; name it as a part, and merge into a new folder")
    settings, total = _common_settings(parts), _total(parts)
    sources: dict[int, tuple[Path, str]] = {}
    for part in parts:
        found = survey(part)
        if found.broken:
            raise ValueError(f"{part}: {found.named()}; run its sample command again, then merge")
        _refuse_others(sources, part, found.sound)
        sources |= {index: (part, digest) for index, digest in found.sound.items()}
    claim(out, settings)
    with folder_lock(out):
        clear_leftovers(out)
        there = survey(out)
        _refuse_others(sources, out, there.noted | there.sound)
        for index, (part, _) in sources.items():
            if index not in there.sound:
                with atomic_write(sample_path(out, index), durable=False) as file:
                    file.write(sample_path(part, index).read_bytes())
        hashes = there.noted | there.sound | {index: digest for index, (_, digest) in sources.items()}
        write_grid(out, sorted(hashes))
        write_record(ledger, total.to_dict() | {"merged": [str(part) for part in parts]})
        write_manifest(out, hashes)
    return len(hashes)


def _common_settings(parts: Sequence[Path]) -> dict[str, Any]:
    for part in parts:
        if not (part / "settings.json").is_file():
            raise FileNotFoundError(f"{part} holds no samples (no settings.json); name folders written by sample.py")
    first = read_object(parts[0] / "settings.json")
    for part in parts[1:]:
        if odd := differences(first, read_object(part / "settings.json"), f"in {parts[0]}", f"in {part}"):
            raise ValueError(f"samples made with other settings cannot be merged: {odd}")
    return first


def _total(parts: Sequence[Path]) -> Ledger:
    """The cost of the samples of `parts`."""
    total = Ledger()
    for path in (part / "ledger.json" for part in parts):
        if path.exists():  # not if the first run was killed
            total.add(Ledger.from_dict(read_object(path), str(path)))
    return total


def _refuse_others(sources: Mapping[int, tuple[Path, str]], folder: Path, hashes: Mapping[int, str]) -> None:
    """Raise ValueError if `folder` holds a different image under an index in `sources`."""
    odd = sorted(index for index in sources.keys() & hashes.keys() if sources[index][1] != hashes[index])
    if odd:
        other, digest = sources[odd[0]]
        raise ValueError(
            f"{len(odd)} images differ between {other} and {folder}, the first is sample {odd[0]}: SHA-256 "
            f"{digest[:12]} and {hashes[odd[0]][:12]}; equal bytes need equal batches and devices"
        )
