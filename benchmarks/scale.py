"""The overhead of a folder of 2,000 samples over the network: files, checksums, manifest, packs.

    python benchmarks/scale.py

Level s, 16x16 RGB, untrained, DDIM in 20 steps, batch 100, one rank. `outside` is all wall-clock time from the empty
folder to the manifest outside the network, by the ledger, including the solver's arithmetic and noise.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import spread

from mlem.files import write_json
from mlem.level import Level
from mlem.networks import unet
from mlem.outputs import claim, finish, pack, sample_path, survey, verify, write_png, write_samples
from mlem.provenance import processor
from mlem.sampling import Sampler
from mlem.schedule import NoiseSchedule

SHAPE, BATCH, STEPS = (3, 16, 16), 100, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="samples (default 2000)")
    parser.add_argument("--rounds", type=int, default=3, help="how often a folder is made (default 3)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("scale.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    level = Level("s", unet("s", SHAPE).eval(), NoiseSchedule.cosine(), SHAPE)
    sampler = Sampler(level, solver="ddim", steps=STEPS)
    sampler.run(range(BATCH))
    rounds = [folder_round(sampler, options.count, BATCH) for _ in range(options.rounds)]
    machine = f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    results: dict[str, Any] = {"machine": machine, "rounds": options.rounds, "images": options.count}
    results |= {name: spread([one[name] for one in rounds]) for name in rounds[0]}
    for name, value in results.items():
        print(f"{name:55s} {value}")
    write_json(options.out, results)


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def folder_round(sampler: Sampler, count: int, batch: int) -> dict[str, float]:
    """A folder of `count` samples, from empty to the manifest: shares of its time, and times of further work."""
    with tempfile.TemporaryDirectory() as place:
        folder, indices = Path(place) / "samples", range(count)
        begin = time.perf_counter()
        claim(folder, {})
        ledger, _, hashes = write_samples(sampler, indices, folder, batch_size=batch)
        finish(folder, indices, ledger, hashes)
        wall = time.perf_counter() - begin
        found = {
            "percent of the wall time outside the network": 100 * (1 - ledger.network_seconds / wall),
            ".. by the sampler alone": 100 * (ledger.wall_seconds - ledger.network_seconds) / wall,
            "images/s": count / wall,
        }
        pixels = sampler.run(range(batch)).x.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        paths = [sample_path(Path(place) / "png", index) for index in range(batch)]
        per_image: dict[str, tuple[Callable[[], Any], int]] = {
            "writing a PNG and its SHA-256": (lambda: list(map(write_png, paths, pixels)), batch),
            "looking at what is there": (lambda: survey(folder), count),
            "verify": (lambda: verify(folder), count),
            "packing as npz": (lambda: pack(folder, indices, hashes, "npz"), count),
            "packing as shards": (lambda: pack(folder, indices, hashes, "shards"), count),
        }
        return found | {f"µs an image: {name}": 1e6 * _seconds(w) / n for name, (w, n) in per_image.items()}


if __name__ == "__main__":
    main()
