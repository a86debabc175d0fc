"""Random kills and damage: `python benchmarks/faults.py`, about half an hour.

**Kills.** SIGKILL at a random moment of training, data preparation, calibration, sampling or packing; then the same
command again, to its end. The result must equal that of an undisturbed run: weights and losses, shards and manifest,
the calibration except its seconds, images and their list, packs.

**Damage.** One bit flipped, or the end cut off, at a random place of a checkpoint, shard, level, plan, calibration,
manifest or reference; then the file is used. The damage must be reported in one line naming the file, or be harmless:
the same result to the bit. A traceback, another result, or an error that does not name the file is a fault of mlem.

Everything follows from --seed. Ctrl-C ends it with the table so far. Exit status 1 if there is a fault.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from faults_damage import GOOD, KINDS, damages
from faults_kills import JOBS, kills, run
from rich.console import Console
from rich.progress import track
from rich.table import Table

FAMILY = (
    "train",
    "model=family",
    "model.levels=[xs,s]",
    "trainer=cpu",
    "logger=jsonl",
    "root=runs/tiny",
    "metric=fid_random256",
    "data.held_out=64",
    "training.steps=20",
    "training.batch_size=16",
    "training.epoch_steps=10",
    "training.checkpoint_every=5",
    "evaluation.every_n_epochs=0",
    "evaluation.indices=0-7",
    "evaluation.reference_steps=4",
    "evaluation.samplers=[{solver:ddpm,steps:[2]}]",
    "calibration.images=2",
    "calibration.times=4",
    "calibration.reference_steps=20",
)
PLAN = ("multilevel", "memorise", "runs/tiny/family", "--steps", "8", "--draws", "2", "--images", "2")
PLAN = (*PLAN, "--reference-steps", "16", "--budget", "0.6")
SAMPLES = ("sample", "root=runs/tiny", "trainer=cpu", "level=xs", "steps=3", "seeds=0-15", "out=samples")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs (default 200)")
    parser.add_argument("--flips", type=int, default=1000, help="flipped bits (default 1000)")
    parser.add_argument("--cuts", type=int, default=300, help="files cut short (default 300)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # processes are forked
    counted: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder) / "trained"
        trained.mkdir()
        for command in (FAMILY, PLAN, SAMPLES):
            if run(command, trained) != 0:
                sys.exit((trained / "said.txt").read_text())
        try:
            outcomes = kills(trained, Path(folder), options.kills, options.seed)
            _count(counted, track(outcomes, "kills", options.kills, console=Console(stderr=True)))
            outcomes = damages(trained, options.flips, options.cuts, options.seed)
            total = options.flips + options.cuts
            _count(counted, track(outcomes, "damage", total, console=Console(stderr=True)))
        except KeyboardInterrupt:
            print("interrupted: the table so far")
    Console(width=None if sys.stdout.isatty() else 100).print(_table(counted))
    bad = sum(count for (_, outcome), count in counted.items() if outcome not in GOOD)
    sys.exit(f"{bad} faults" if bad else 0)


def _count(counted: Counter[tuple[str, str]], outcomes: Iterable[tuple[str, str, str]]) -> None:
    """outcomes: kind, outcome, and the place, which is printed for faults."""
    for kind, outcome, where in outcomes:
        counted[kind, outcome] += 1
        if outcome not in GOOD:
            print(f"{kind}: {outcome}: {where}", flush=True)


def _table(counted: Counter[tuple[str, str]]) -> Table:
    found = [*GOOD, *sorted({outcome for _, outcome in counted} - {*GOOD})]
    table = Table("what", "times", *found)
    for kind in _kinds(counted):
        row = [counted[kind, outcome] for outcome in found]
        table.add_row(kind, str(sum(row)), *(str(count) if count else "" for count in row))
    return table


def _kinds(counted: Counter[tuple[str, str]]) -> Iterator[str]:
    there = {kind for kind, _ in counted}
    return (kind for kind in [*JOBS, *KINDS] if kind in there)


if __name__ == "__main__":
    main()
