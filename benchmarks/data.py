"""The speed of preparing images and feeding them to training, with two processes.

    python benchmarks/data.py

1. Loading 32x32 RGB shards: `train_loader` with 2 workers, batches of 128, until the tensors arrive.
2. Preparing 64x64 RGB from JPEGs of 178x218 in a CelebA archive: `--workers 2`, including process startup.

The images are clouds with noise: PNGs of 32x32 have 2.5 kB, the JPEGs 9 kB, similar to photographs. Each figure is the
median over rounds, with lowest and highest. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
from measuring import spread
from PIL import Image

from mlem.data import BatchSource, Shards, prepare, train_loader, write_shards
from mlem.files import write_json
from mlem.provenance import processor

WORKERS, BATCH, DIFFERENT = 2, 128, 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default 5)")
    parser.add_argument("--load", type=int, default=50_000, help="images loaded in a round (default 50,000)")
    parser.add_argument("--prepare", type=int, default=4_000, help="images prepared in a round (default 4,000)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("data.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "machine": processor(),
            "rounds": options.rounds,
            "workers": WORKERS,
            "loading 32x32, images/s": spread(_loading(Path(folder), options.rounds, options.load)),
            "preparing 178x218 JPEG to 64x64, images/s": spread(
                _preparing(Path(folder), options.rounds, options.prepare)
            ),
        }
    for name, value in results.items():
        print(f"{name:45s} {value}")
    write_json(options.out, results)


def clouds(count: int, width: int, height: int, noise: float) -> np.ndarray:
    """(count, height, width, 3) uint8"""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    large = [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in small]
    return np.clip(np.rint(large + noise * rng.standard_normal((count, height, width, 3))), 0, 255).astype(np.uint8)


def _rows(pixels: np.ndarray, start: int, stop: int) -> np.ndarray:
    return pixels[np.arange(start, stop) % len(pixels)]


def _loading(folder: Path, rounds: int, count: int) -> list[float]:
    images = partial(_rows, clouds(DIFFERENT, 32, 32, noise=10))
    write_shards(folder / "small", images, name="x", info={}, total=10_000, shard_size=1000, progress=False)
    shards = Shards.open(folder / "small")
    batches = count // BATCH
    rates = []
    for number in range(rounds):
        source = BatchSource(shards, np.arange(len(shards)), batch_size=BATCH, seed=number, stop=batches + 1)
        loaded = iter(train_loader(source, WORKERS))
        next(loaded)  # the processes have started
        begin = time.perf_counter()
        seen = sum(len(batch["image"]) for batch in loaded)
        rates.append(seen / (time.perf_counter() - begin))
    return rates


def _preparing(folder: Path, rounds: int, count: int) -> list[float]:
    names = [f"{number:06d}.jpg" for number in range(1, count + 1)]
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        jpegs = []
        for pixels in clouds(DIFFERENT, 178, 218, noise=6):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=85)
            jpegs.append(file.getvalue())
        for number, name in enumerate(names):
            archive.writestr(f"img_align_celeba/{name}", jpegs[number % DIFFERENT])
    (folder / "list_eval_partition.txt").write_text("".join(f"{name} 0\n" for name in names))
    rates = []
    for number in range(rounds):
        begin = time.perf_counter()
        out = folder / f"faces{number}"
        prepare("celeba", out, workers=WORKERS, progress=False, source=str(folder), any_checksum=True)
        rates.append(count / (time.perf_counter() - begin))
    return rates


if __name__ == "__main__":
    main()
