"""A run folder in which there is next to everything that a report shows, without a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlem.comparison.calls import Calls
from mlem.comparison.fastest import Advice, Alternative
from mlem.comparison.recommended import Recommended, source_of

__all__ = ["ADVICE", "EVIL", "HINDSIGHT", "ROWS", "SCORE", "advise"]

EVIL = "<script>document.title = 'taken'</script>\"'&"
SCORE = "fid_random256@8"


def row(
    level: str, sampler: str, steps: int, mse: float | None, calls: dict[str, float], **more: Any
) -> dict[str, Any]:
    found = {"level": level, "sampler": sampler, "steps": steps, "dial": "", "calls": calls}
    found |= {"evaluations": sum(calls.values()), "rounds": float(steps), "flops_per_image": 1e6 * steps}
    return (
        found | {"seconds_per_image": steps / 1e4, "mse": mse, "mse_stderr": mse and mse / 10, SCORE: 30 / steps} | more
    )


ROWS = [
    row(
        "xs",
        "ddpm",
        9,
        0.02,
        {"xs": 9},
        reference="ddpm",
        psnr=23.456,
        psnr_stderr=0.25,
        ssim=0.98765,
        ssim_stderr=0.0012,
    ),
    row("xs", EVIL, 100, 0.3, {"xs": 100}),
    row("s", "a_sampler_with_a_name_that_goes_on_and_on_beyond_all_measure_and_reason", 10, None, {"s": 10}),
    row("mlem", "ddpm_hindsight", 20, 0.001, {"xs": 40, "s": 9.5}, dial="budget0.6", reference="ddpm"),
]
ADVICE = Advice(
    text=f"ddpm, 20 steps on the uniform grid, hindsight of xs, s{EVIL}",
    mse=0.0008,
    interval=(0.0006, 0.001),
    seconds=0.0125,
    target=0.001,
    why="3 times as fast as s alone",
    options={"solver": "ddpm", "steps": 20, "grid": "uniform"},
    alternatives=(Alternative("ddim, 12 steps on the uniform grid, s", 0.0009, (0.0005, 0.0015), 0.04),),
)
HINDSIGHT = Calls(
    name=f"recommended: {ADVICE.text}",
    levels=("xs", "s"),
    times=(1.0, 0.75, 0.5, 0.25),
    runs=((1, 1), (1, 0), (2, 1), (1, 0)),
    probabilities=((1.0, 0.5), (1.0, 0.5), (1.0, 0.5), (1.0, 0.5)),
)


def advise(folder: Path, advice: Advice | None = ADVICE, why_not: str = "") -> None:
    """A family that says no more than the report needs, and what was recommended for it."""
    (folder / "family").mkdir()
    (folder / "family" / "family.json").write_text('{"levels": ["xs", "s"]}')
    (folder / "family" / "calibration.json").write_text("{}")
    source = source_of(folder / "family")
    assert source is not None
    Recommended(advice, why_not, (HINDSIGHT,), source, "2 cores").save(folder / "recommendation.json")
