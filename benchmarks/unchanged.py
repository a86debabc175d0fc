"""Whether refactoring changed a number: hashes of samples, plans, training, fits, scores and the report.

    python benchmarks/unchanged.py record DIR      # with the old code
    python benchmarks/unchanged.py compare DIR     # with the new code: a table; exit status 1 if anything differs

`record` trains, fits and samples a tiny family of digits and keeps it in DIR with all hashes. `compare` does the same
in a temporary folder. Every check but training starts from the family in DIR, so that one difference does not hide
others; with `--own`, from the family that this code trains and fits, for code that rejects the files in DIR.

It uses only what refactoring keeps: the names exported by `mlem`, the commands, and the files they write. Each item
has two hashes: of its numbers in order, and of its text, keys included, so that a renamed key changes only the second.
Measured times, versions and dates are left out. Both sides must run on one machine, in one thread: other processors
and versions of torch round differently. About three minutes. `diff DIR/text.json DIR/now.json` shows more.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from unchanged_checks import CHECKS, KEPT, Items
from unchanged_files import attempt

from mlem.provenance import processor

TIMELESS = re.compile(r"second|outside|\btime\b|\bdate\b|device|commit|version|^format$|system/")
"""Keys of what was measured, or says when and by which code: left out."""
ABSENT = ["-", "-"]
"""The hashes of what is not there."""


def main() -> None:
    """Record, or compare and exit with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("record", "compare"))
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--own", action="store_true", help="compare: use the family that this code makes")
    parser.add_argument("--all", action="store_true", help="compare: a row for each item, equal or not")
    parser.add_argument("--only", nargs="+", default=[*CHECKS], choices=[*CHECKS], help="compare: these checks alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.verb == "record":
        _record(options.folder)
    else:
        sys.exit(_compare(options.folder, options.only, options.own, options.all))


def _record(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty: choose another folder, or remove it")
    items = _measured(folder / "made", [*CHECKS], make=True)
    if failed := [f"{name}: {value}" for name, value in items.items() if _failed(value)]:
        raise SystemExit("\n".join([*failed, f"{len(failed)} items failed: nothing is recorded"]))
    save_file({name: _numbers(value) for name, value in items.items()}, folder / "numbers.safetensors")
    _write(folder / "text.json", {name: _plain(value) for name, value in items.items()})
    _write(folder / "hashes.json", {"machine": _machine(), "items": _hashes(items)})
    print(f"{len(items)} items recorded in {folder}")


def _compare(folder: Path, only: Sequence[str], own: bool, everything: bool) -> int:
    recorded = json.loads((folder / "hashes.json").read_text())
    if recorded["machine"] != _machine():
        print(f"recorded on {recorded['machine']}, and this is {_machine()}: equal numbers are not to be expected")
    with TemporaryDirectory() as other:
        items = _measured(Path(other) / "made" if own else folder / "made", only, make=own)
    _write(folder / "now.json", {name: _plain(value) for name, value in items.items()})
    before = {name: hashes for name, hashes in recorded["items"].items() if name.split(": ")[0] in only}
    now, numbers = _hashes(items), load_file(folder / "numbers.safetensors")
    kinds = {name: _kind(before.get(name), now.get(name)) for name in [*before, *now]}
    print(f"{'what':100s} {'recorded':17s} {'now':17s} equal?   (hashes: numbers/text)")
    for check in only:
        names = [name for name in kinds if name.split(": ")[0] == check]
        equal = sum(kinds[name] == "yes" for name in names)
        verdict = "yes" if equal == len(names) else f"{equal} of them"
        print(_line(f"{check} ({len(names)} items)", _total(before, names), _total(now, names), verdict))
        for name in names:
            if everything or kinds[name] != "yes":
                why = _why(kinds[name], numbers.get(name), items.get(name))
                print(_line(f"  {name}", before.get(name, ABSENT), now.get(name, ABSENT), why))
    counts = {kind: [*kinds.values()].count(kind) for kind in dict.fromkeys(kinds.values())}
    print("; ".join(f"{kind}: {count}" for kind, count in counts.items()))
    return int(counts.keys() != {"yes"})


def _measured(stored: Path, only: Sequence[str], make: bool) -> Items:
    """All items, "check: item". make: what a check leaves for those after it goes to `stored`."""
    stored.mkdir(parents=True, exist_ok=True)
    items: Items = {}
    for name, check in CHECKS.items():
        if name not in only and not (make and name in KEPT):
            continue
        begin = _processor_seconds()
        with TemporaryDirectory() as folder:
            work = Path(shutil.copytree(stored, Path(folder) / "work"))
            found = attempt(check, work)
            if make and name in KEPT:
                shutil.copytree(work, stored, dirs_exist_ok=True)
        found = found if isinstance(found, dict) else {"all of it": found}
        items |= {f"{name}: {what}": value for what, value in found.items()} if name in only else {}
        print(
            f"{name}: {len(found)} items in {_processor_seconds() - begin:.0f} s of a core", file=sys.stderr, flush=True
        )
    return items


def _processor_seconds() -> float:
    """Of this process and those that it started: the time on one idle core."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


# --- hashes --------------------------------------------------------------------------------------------------------


def _hashes(items: Items) -> dict[str, list[str]]:
    """Item -> hash of its numbers, hash of its text."""
    return {
        name: [_digest(_numbers(value).numpy().tobytes()), _digest(json.dumps(_plain(value)).encode())]
        for name, value in items.items()
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _numbers(value: Any) -> Tensor:
    """All numbers of an item, in order: (N,) float64, which holds every float32 and every count exactly."""
    parts = list(_leaves(value))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach().double().flatten()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not TIMELESS.search(str(key)):
                yield from _leaves(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, (int, float)) or value is None:
        yield torch.tensor([math.nan if value is None else value], dtype=torch.float64)


def _plain(value: Any) -> Any:
    """The item with its keys, as JSON; a tensor by dtype, shape and hash."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {[*value.shape]} {_digest(_numbers(value).numpy().tobytes())[:16]}"
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items() if not TIMELESS.search(str(key))}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _write(path: Path, plain: Any) -> None:
    path.write_text(json.dumps(plain, indent=1) + "\n")


def _machine() -> str:
    return f"{processor()}, torch {torch.__version__}, Python {platform.python_version()}"


# --- the table -----------------------------------------------------------------------------------------------------


def _failed(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("failed: ")


def _kind(before: list[str] | None, now: list[str] | None) -> str:
    if before is None or now is None:
        return "new" if before is None else "missing"
    if before[0] != now[0]:
        return "other numbers"
    return "yes" if before[1] == now[1] else "same numbers, other text"


def _why(kind: str, before: Tensor | None, value: Any) -> str:
    """The kind of difference, and how large it is."""
    if _failed(value) or kind != "other numbers" or before is None:
        return value if _failed(value) else kind
    now = _numbers(value)
    if len(before) != len(now):
        return f"{kind}: {len(before)} then, {len(now)} now"
    return f"{kind}: by {(now - before).abs().nan_to_num().max():.2g} at most"


def _total(table: Mapping[str, list[str]], names: Sequence[str]) -> list[str]:
    return [_digest("".join(table.get(name, ABSENT)[part] for name in names).encode()) for part in (0, 1)]


def _line(what: str, before: Sequence[str], now: Sequence[str], equal: str) -> str:
    return f"{what:100s} {before[0][:8]:8s}/{before[1][:8]:8s} {now[0][:8]:8s}/{now[1][:8]:8s} {equal}"


if __name__ == "__main__":
    main()
