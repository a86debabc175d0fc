"""Classifier-free guidance on a conditional family of digits: accuracy of a classifier, and FID, by scale.

    python train.py experiment=digits_labels
    python benchmarks/guidance.py runs/digits_labels/family

The largest level alone, and a plan at the same cost in FLOPs. Sample i has class i modulo 10, from the same noise at
every scale. The classifier is scikit-learn's SVC, trained on all real digits; also given is its accuracy on held-out
real digits. FID is `fid_random256` against all 1,797 digits. Every guided family is calibrated once, and its
calibration is saved beside the family.

Writes `guidance.json` to --out and a figure, `docs/guidance.png` by default.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import time
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlem.data.datasets.digits import Digits
from mlem.family import Family
from mlem.files import write_json
from mlem.metrics import FID, FewImagesWarning, quantise
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.spec import PlanSpec
from mlem.plots.style import COLOURS, STYLES, panels, save
from mlem.sampling import sample

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
SOLVER, STEPS, BUDGET = "dpm_solver_pp", 32, 0.5
HELD_OUT = 300


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path, help="folder of a conditional family of digits")
    parser.add_argument("--samples", type=int, default=2000, help="at every scale")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="of guidance; 1 is none")
    parser.add_argument("--images", type=int, default=16, help="trajectories of a calibration")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of guidance.json")
    parser.add_argument("--figure", type=Path, default=Path(__file__).parents[1] / "docs" / "guidance.png")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FewImagesWarning)  # the caption has the count
    family, begin = Family.load(options.family), time.perf_counter()
    rows: list[dict[str, Any]] = []
    for scale in options.scales:
        for row in measure(family, scale, options.samples, options.images):
            rows.append(row)
            print(
                f"scale {scale:g}, {row['sampler']}: label seen in {100 * row['agreement']:.1f} percent, "
                f"fid_random256 {row['fid']:.4f}, {row['evaluations']:.1f} evaluations of {family.names[-1]} (FLOPs)",
                flush=True,
            )
    real = held_out_agreement()
    print(f"real digits that the classifier was not trained on: {100 * real:.1f} percent")
    steps = {level.name: level.measured.get("steps") for level in family.levels}
    about = {"samples": options.samples, "training_steps": steps, "weights": family.weights_hash, "real": real}
    about |= {"solver": SOLVER, "plan": {"steps": STEPS, "budget": BUDGET, "cost": "flops"}}
    write_json(options.out / "guidance.json", {"about": about, "rows": rows})
    draw(rows, real, options.figure, family, options.samples)
    print(f"{time.perf_counter() - begin:.0f} s")


def measure(family: Family, scale: float, samples: int, images: int) -> list[dict[str, Any]]:
    """The largest level and the plan at one scale: agreement, FID, and cost in evaluations of the largest level."""
    guided = calibrated(family if scale == 1 else family.guided(scale), images)
    spec = PlanSpec(budget=BUDGET, cost="flops")
    runs: dict[str, dict[str, Any]] = {
        f"level {family.names[-1]}": {"steps": round(STEPS * BUDGET)},
        "plan": {"steps": STEPS, "plan": spec},
    }
    rows: list[dict[str, Any]] = []
    for name, options in runs.items():
        result = sample(guided, solver=SOLVER, indices=range(samples), batch_size=250, **options)
        flops = sum(cost.flops for cost in result.ledger.levels.values()) / samples
        row = {"scale": scale, "sampler": name, "agreement": agreement(result.x, torch.arange(samples) % 10)}
        row |= {"fid": fid(result.x), "evaluations": flops / guided.level().flops}
        rows.append(row | {"calls": {level: cost.calls / samples for level, cost in result.ledger.levels.items()}})
    return rows


def calibrated(family: Family, images: int) -> Family:
    """The family with its own calibration, saved beside it."""
    if not family.fitted.has("calibration"):
        family.fitted = Fitted(calibration=calibrate(family, images=images, times=24))
        if family.folder is not None:
            family.save_fitted(family.folder)
    return family


@cache
def real_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 8, 8, 1) uint8, and labels."""
    source = Digits().build()
    assert source.labels is not None
    pixels = source.images(0, source.count)
    assert isinstance(pixels, np.ndarray)
    return pixels, source.labels.values(0, source.count)


@cache
def classifier(held_out: int = 0) -> Any:
    """scikit-learn's SVC of its own example of digits, trained on all real ones but the last `held_out`."""
    from sklearn import svm

    machine: Any = svm.SVC  # whose stubs know no number for gamma
    pixels, labels = real_digits()
    kept = len(pixels) - held_out
    return machine(gamma=0.001).fit(features(pixels[:kept]), labels[:kept])


def features(pixels: np.ndarray) -> np.ndarray:
    """Images (N, 8, 8, 1) uint8 in scikit-learn's form, (N, 64) in [0, 16]."""
    return pixels.reshape(len(pixels), -1) / (255 / 16)


def agreement(x: Tensor, labels: Tensor) -> float:
    """Share of the samples (N, 1, 8, 8) whose label the classifier recognises."""
    seen = classifier().predict(features(quantise(x).permute(0, 2, 3, 1).numpy()))
    return float((seen == labels.numpy()).mean())


def held_out_agreement() -> float:
    """Share of the last real digits recognised by a classifier trained on the others."""
    pixels, labels = real_digits()
    return float(classifier(HELD_OUT).score(features(pixels[-HELD_OUT:]), labels[-HELD_OUT:]))


def fid(x: Tensor) -> float:
    """`fid_random256` of samples (N, 1, 8, 8) against all real digits."""
    score, pixels = FID("random256", (1, 8, 8)), real_digits()[0]
    score.update_real(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    score.update(x)
    return score.compute().value


def draw(rows: Sequence[dict[str, Any]], real: float, path: Path, family: Family, samples: int) -> None:
    """Agreement and FID against the scale, one line per sampler; bars are one standard error."""
    steps = ", ".join(f"{level.name} {level.measured.get('steps', '?')}" for level in family.levels)
    caption = (
        f"{family.data}, {samples} samples per scale, seed 0; {SOLVER}, {round(STEPS * BUDGET)} steps, and a plan "
        f"of {STEPS} at the same FLOPs; training steps: {steps}; bars: one standard error"
    )
    figure, (left, right) = panels("guidance scale", ["label recognised [%]", "fid_random256"], caption)
    for name, colour, (marker, line) in zip(
        dict.fromkeys(row["sampler"] for row in rows), COLOURS, STYLES, strict=False
    ):
        own = [row for row in rows if row["sampler"] == name]
        scales, share = [row["scale"] for row in own], np.array([row["agreement"] for row in own])
        bars = 100 * np.sqrt(share * (1 - share) / samples)
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4}
        left.errorbar(scales, 100 * share, bars, label=name, **look)
        right.plot(scales, [row["fid"] for row in own], **look)
    left.axhline(100 * real, color="0.5", linewidth=0.8, label="real, held out")
    right.set_ylim(bottom=0)
    left.legend(frameon=False)
    save(figure, path)


if __name__ == "__main__":
    main()
