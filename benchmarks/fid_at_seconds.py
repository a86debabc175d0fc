"""FID at equal seconds: of each way to sample, the setting with the least error within that time. Writes JSON.

    python benchmarks/fastest.py FAMILY --kind ode
    python benchmarks/fid_at_seconds.py FAMILY --data SHARDS --seconds 0.01 0.025

Seconds an image and errors are those in `fastest.py`'s file, measured on an idle machine; this benchmark only samples,
so that it may share one. FID is `fid_random256` to the images of prepared shards, over all samples, and over blocks of
them for its spread. Rows are kept as they come: a run that was cut off goes on where it was.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastest import GROUPS, OTHERS, TARGETS, family_of, jobs
from multilevel_runs import write_rows
from tqdm import tqdm

from mlem import Family
from mlem.data.shards.reading import Shards
from mlem.metrics import FID
from mlem.metrics.scores import Measure
from mlem.sampling import Sampler

SAMPLES, BLOCKS, BATCH = 5000, 5, 250
MANY = {"ode": ("unipc", 16), "sde": ("ddpm", 96)}
"""The largest level alone, in so many steps: what the others approach."""


def best_settings(rows: Sequence[dict[str, Any]], seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each way to sample, the measured row with the least error within these seconds an image, if there is one."""
    ways = {name: (name,) for name in OTHERS} | {name: GROUPS[name] for name in ("switch", "multilevel")}
    for name, groups in ways.items():
        within = [row for row in rows if row["key"][0] in groups and np.mean(row["seconds"]) <= seconds]
        if within:
            yield name, min(within, key=lambda row: row["mse"])


def score(sampler: Sampler, measure: Measure) -> dict[str, Any]:
    """FID of all samples, and mean and standard deviation over blocks of them."""
    fid = measure.start("cpu")
    for start in tqdm(range(0, SAMPLES, BATCH), leave=False):
        index = range(start, min(start + BATCH, SAMPLES))
        fid.update(sampler.run(index).x, index)
    whole, *parts = measure.scores(fid, SAMPLES)
    return {"fid": whole.value, "blocks": parts[0].value, "spread": parts[0].spread}


def reference(folder: Path) -> Measure:
    """FID to all images of the shards."""
    shards = Shards.open(folder)
    parts = ([*range(start, min(start + 500, len(shards)))] for start in range(0, len(shards), 500))
    reals = ((part, shards.images(part)) for part in parts)
    fid = FID("random256", shards.shape, keep=Measure.keeps(blocks=BLOCKS))
    return Measure(fid, reals, {"data": str(folder.name), "count": len(shards)}, blocks=BLOCKS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help="the folder that fastest.py measured")
    parser.add_argument("--data", type=Path, required=True, help="prepared shards of real images")
    parser.add_argument("--kind", choices=("ode", "sde"), default="ode")
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.01, 0.025], help="an image")
    parser.add_argument("--rows", type=Path, help="of fastest.py; default: benchmarks/fastest_KIND.json")
    parser.add_argument("--out", type=Path, help="default: benchmarks/fid_at_seconds_KIND.json")
    options = parser.parse_args(arguments)
    here = Path(__file__).parent
    found = json.loads((options.rows or here / f"fastest_{options.kind}.json").read_text())
    family, out = family_of(options.family, None), options.out or here / f"fid_at_seconds_{options.kind}.json"
    if found["about"]["weights"] != family.weights_hash:
        parser.error(f"{options.rows or 'the rows'} are of another family than {options.family}: run fastest.py on it")
    measure = reference(options.data)
    kept: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.exists() else []
    about = found["about"] | {"samples": SAMPLES, "blocks": BLOCKS, "real": measure.key, "metric": "fid_random256"}
    for way, seconds, row, make in settings(family, options.kind, found["rows"], options.seconds):
        if any(one["way"] == way and one["seconds"] == seconds for one in kept):
            continue
        same = next((one for one in kept if one["key"] == row["key"]), None)
        scores = {name: same[name] for name in ("fid", "blocks", "spread")} if same else score(make(), measure)
        kept.append({"way": way, "seconds": seconds, **row, **scores})
        write_rows(out, {"about": about, "rows": kept})
        print(f"{seconds or 'many steps'!s:10} {way:22s} FID {scores['fid']:.3f}  {row['key']}", flush=True)


def settings(
    family: Family, kind: str, rows: Sequence[dict[str, Any]], several: Sequence[float]
) -> Iterator[tuple[str, float | None, dict[str, Any], Callable[[], Sampler]]]:
    """What to sample: the way, the seconds allowed, its measured row, and what makes the sampler."""
    solver, steps = MANY[kind]
    alone = {"key": ["fewer steps", solver, "uniform", steps], "taken": None, "mse": None}
    top = family.names[-1]
    yield "many steps", None, alone, lambda: Sampler(family, solver=solver, steps=steps, level=top)
    makers = {json.dumps(key): make for key, make in jobs(family, kind, TARGETS[kind])}
    for seconds in several:
        for way, row in best_settings(rows, seconds):
            plain = {"key": row["key"], "taken": float(np.mean(row["seconds"])), "mse": row["mse"]}
            yield way, seconds, plain, makers[json.dumps(row["key"])]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
