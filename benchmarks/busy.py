"""The slowdown by one other busy process: `python benchmarks/busy.py`, two to three minutes.

    sample(family, solver="ddim", steps=20, indices=range(64))

in separate processes, with two threads, for the small levels of the digits (untrained): alone, and beside a process
that computes endlessly; with `GOMP_SPINCOUNT=1000`, which mlem sets, and with the runtime's default (300,000). All four
run in turns, in a different order each round. A figure is the ratio busy : idle of a round.

Writes `busy.json`. The machine must be idle otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from measuring import spread
from rich.progress import track

from mlem.files import write_json
from mlem.provenance import processor

SPINS = {"GOMP_SPINCOUNT=1000 (mlem's)": "1000", "the runtime's own": "300000"}
LIMIT = 2.2
MEASURED = """
import time

from mlem import Family, Level, NoiseSchedule, sample
from mlem.networks import unet

schedule, shape = NoiseSchedule.cosine(), (1, 8, 8)
family = Family([Level(size, unet(size, shape).eval(), schedule, shape) for size in ("xs", "s")])
for _ in range(5):
    begin = time.perf_counter()
    sample(family, solver="ddim", steps=20, indices=range(64))
    print(time.perf_counter() - begin)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often each is measured (default 7)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("busy.json"))
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rounds = [_round(number) for number in track(range(options.rounds), "rounds")]
    results: dict[str, object] = {"machine": processor(), "threads": 2, "rounds": options.rounds, "load before": load}
    for name in SPINS:
        idle, busy = ([one[name, beside] for one in rounds] for beside in (False, True))
        results[name] = {
            "idle, s": spread(idle),
            "busy, s": spread(busy),
            "busy : idle": spread([high / low for low, high in zip(idle, busy, strict=True)]),
        }
    write_json(options.out, results)
    print(json.dumps(results, indent=2), f"\nratio with mlem's setting: at most {LIMIT}")


def _round(number: int) -> dict[tuple[str, bool], float]:
    """Seconds per call, by setting and whether another process was busy."""
    sides = [(name, beside) for name in SPINS for beside in (False, True)]
    random.Random(number).shuffle(sides)
    return {(name, beside): _seconds(SPINS[name], beside) for name, beside in sides}


def _seconds(spins: str, beside: bool) -> float:
    """The median call, without the first, which warms up."""
    environment = os.environ | {"GOMP_SPINCOUNT": spins, "OMP_NUM_THREADS": "2"}
    with _busy(beside):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED], env=environment, capture_output=True, text=True, check=True
        )
    return statistics.median(map(float, done.stdout.split()[1:]))


@contextmanager
def _busy(wanted: bool) -> Generator[None, None, None]:
    """Run another process that computes endlessly, if wanted."""
    if not wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            yield
        finally:
            other.kill()


if __name__ == "__main__":
    main()
