"""The papers' measurements, at their scale, on a GPU: 64x64, five levels with FLOPs 1 : 250, in seconds.

    python benchmarks/gpu.py                       # everything: trains experiment=dead_leaves64 on the way
    python benchmarks/gpu.py --family FOLDER       # an existing calibrated family, for the data of --experiment
    python benchmarks/gpu.py --minutes 10          # as much as fits into ten minutes; run again to continue
    python benchmarks/gpu.py --small --out small   # the same on a CPU, tiny and with random weights, in seconds

First come measurements without a trained family: seconds per call of every level in fp32, bf16, compiled and as CUDA
graphs, at batch 1, 16, 64 and 200; training throughput; folders of samples. Then error to the reference, and FID,
against seconds, of the largest level alone and of several levels; and parallel midpoints against sequential solvers at
equal error. Every row is saved immediately, in `gpu.json`, with its machine: a call that is killed, or that ends with
status 75 because its time is up, continues when run again. A row that fails is saved with its error; remove it to try
again. Figures are beside the rows.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import itertools
import logging
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_figures import advantages, draw, report
from gpu_pieces import Bench, family_jobs, fresh_family, speed_jobs
from gpu_rows import Clock, Job, OutOfTime, Rows
from gpu_samplers import LARGE, SMALL, Scale

from mlem.family import Family
from mlem.metrics import FID, Measure
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.fitted import Fitted
from mlem.provenance import machine

REPOSITORY = Path(__file__).resolve().parent.parent
MORE_TO_DO = 75
"""Exit status when time is up."""
LEAST, SAVING = 120.0, 45.0
"""Least seconds to start training with, and seconds to save its state."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="dead_leaves64", help="of train.py (default dead_leaves64)")
    parser.add_argument("--family", type=Path, help="folder of a calibrated family; without it one is trained")
    parser.add_argument("--minutes", type=float, help="that this call may take; without it, what it takes")
    parser.add_argument("--small", action="store_true", help="tiny and with random weights, on a CPU too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of gpu.json and the figures")
    parser.add_argument("--root", type=Path, default=Path("runs/gpu"), help="folder of references (default runs/gpu)")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        raise SystemExit("there is no GPU here: add --small, which tests on a CPU that everything runs")
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    scale = SMALL if options.small else LARGE
    trains = options.family is None and not options.small
    settings = {"small": options.small, "experiment": options.experiment, "family": str(options.family or "trained")}
    settings |= {name: getattr(scale, name) for name in ("images", "reference_steps", "rounds", "fid_images", "cost")}
    rows = Rows(options.out / "gpu.json", {"machine": machine(device), "settings": settings})
    bench = _bench(options, scale, device, rows)
    clock = Clock(options.minutes)
    training = [Job("train", (options.experiment,), lambda: train(options.experiment, clock), LEAST)]
    try:
        rows.measure(itertools.chain(speed_jobs(bench), training if trains else []), clock)
        rows.measure(family_jobs(bench), clock)
    except OutOfTime:
        print(f"{len(rows.rows)} rows; time is up: run the same command again to continue", flush=True)
        return MORE_TO_DO
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    rows.write(summary=advantages(rows))
    report(rows)
    draw(rows, options.out)
    for row in rows.failed:
        print(f"failed: {row['piece']} {row['key']}: {row['failed']}")
    return 0


def _bench(options: argparse.Namespace, scale: Scale, device: str, rows: Rows) -> Bench:
    """What the pieces share; for --small, all of it is made on the spot."""
    if options.small:

        def calibrated() -> Family:
            family = fresh_family(scale, device)
            size = scale.batches[-1]
            family.fitted = Fitted(calibrate(family, images=2, times=4, batch_sizes=(size,), device=device))
            return family

        return Bench(scale, device, options.root, rows, False, calibrated, lambda: _noise(scale))
    from mlem.cli.main import job_of
    from mlem.cli.metrics import measure_of, prepared

    job = job_of("train", [f"experiment={options.experiment}"])
    folder = options.family or Path(job.root) / "family"

    def measure() -> Measure:
        found = measure_of(job.metric, job.data, prepared(job.data))
        assert found is not None
        return found

    return Bench(scale, device, options.root, rows, options.family is not None, lambda: Family.load(folder), measure)


def _noise(scale: Scale) -> Measure:
    """FID against images of noise."""
    images = torch.randint(0, 256, (16, *scale.shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Measure(FID("random256", scale.shape), [(range(16), images)], {"data": "noise", "count": 16})


def training_options(experiment: str) -> list[str]:
    """Options of train.py: full training, with as little evaluation as possible."""
    options = [f"experiment={experiment}", "trainer=gpu", "logger=jsonl", "metric=none"]
    evaluation = ["samplers=[{solver:dpm_solver_pp,steps:[8]}]", "indices=0-1", "reference_steps=20"]
    return options + [f"evaluation.{option}" for option in evaluation]


def train(experiment: str, clock: Clock) -> dict[str, Any]:
    """Train and calibrate the family, as far as time allows. Raises OutOfTime, or SystemExit if train.py fails."""
    command = [sys.executable, str(REPOSITORY / "train.py"), *training_options(experiment)]
    process = subprocess.Popen(command)
    wait = max(clock.left, LEAST) - SAVING
    try:
        status = process.wait(None if wait == float("inf") else wait)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # saves a checkpoint
        process.wait()
        raise OutOfTime from None
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if status:
        raise SystemExit(f"train.py failed (status {status}); fix its error, and run the same command again")
    return {"command": " ".join(["train.py", *command[2:]])}


def _stopped(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)  # so that training is stopped too


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stopped)
    sys.exit(main())
