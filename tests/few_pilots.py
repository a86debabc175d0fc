"""Calibrations that run few pilots, for tests of other things; `python tests/few_pilots.py` is `train.py` with them."""

from __future__ import annotations

from typing import Any

from mlem.cli.main import train
from mlem.multilevel import pilot

FEW: dict[str, Any] = {
    "discretisations": lambda: [("unipc", "uniform")],
    "PILOTS": (("unipc", "uniform", (8, 16), 1),),
    "REUSES": (),
    "FORECASTS": (),
}
"""What to put in place of the names of mlem.multilevel.pilot."""

if __name__ == "__main__":
    vars(pilot).update(FEW)
    train()
