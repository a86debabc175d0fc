r"""Adds a trained family to the package, in half precision and calibrated: `Family.load("pretrained:NAME")`.

    python train.py experiment=dead_leaves16_xl model.levels=[xs,m,l] model.level_steps=[40000,18000,10000] \
        model.distillation_steps=4000 root=runs/dead_leaves16_three
    python benchmarks/pretrained.py runs/dead_leaves16_three/family dead_leaves16
    python train.py experiment=digits_labels model.levels=[xs,s]
    python benchmarks/pretrained.py runs/digits_labels/family digits_labels

Weights are rounded to float16 and used in float32. Calibrate on an idle machine: the seconds are stored, and measured
again on other machines.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import shutil
from pathlib import Path

from mlem import Family
from mlem.multilevel.command import calibrate_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("name")
    parser.add_argument("--levels", nargs="+", default=None, help="default: all")
    parser.add_argument("--images", type=int, default=64, help="of the calibration")
    options = parser.parse_args()
    home = Path(mlem.__file__).parent / "pretrained"
    trained = Family.load(options.family)
    family = Family([trained.level(name) for name in options.levels or trained.names])
    for level in family.levels:
        level.network.half()
    folder = home / options.name
    shutil.rmtree(folder, ignore_errors=True)
    family.save(folder)
    calibrate_folder(Family.load(f"pretrained:{options.name}"), folder, images=options.images)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
