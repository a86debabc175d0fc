"""The command `mlem.multilevel`: calibrate a family, show its calibration, memorise a plan."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mlem.arguments import MOST_STEPS, check_whole
from mlem.conditions import ConditionSource, rows_of
from mlem.family import Family
from mlem.files import check_writable
from mlem.invocation import called, command, in_words_of_the_user, interrupted
from mlem.level import check_name
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.calibration import Calibration
from mlem.multilevel.memorise import memorise
from mlem.multilevel.pilot import pilot
from mlem.multilevel.report import report
from mlem.multilevel.spec import PlanSpec

if TYPE_CHECKING:
    from rich.console import Console


__all__ = ["calibrate_folder", "main"]

MOST_IMAGES = 512
"""Most images of pilots, however large their standard errors."""


def calibrate_folder(
    family: Family,
    folder: Path,
    *,
    images: int = 16,
    times: int = 24,
    batch_sizes: Sequence[int] = (64,),
    reference_steps: int = 500,
    seed: int = 0,
    device: str | torch.device = "cpu",
    conditions: ConditionSource | None = None,
    until: float | None = None,
) -> Calibration:
    """Calibrate the family in `folder`, run pilots, save the result there, print the report.

    Args:
        images: number of trajectories, of the calibration and of the pilots.
        times, batch_sizes: see `calibrate`.
        reference_steps: see `pilot`.
        conditions: of the trajectories; by default classes take turns.
        until: run pilots on more images until every solver's error has a relative standard error of at most this.
    """
    check_whole("reference_steps", reference_steps, most=MOST_STEPS)  # for the pilots, which come last
    check_writable(folder)
    console = _console()
    with console.status("calibrating") as status:

        def progress(text: str) -> None:
            status.update(f"calibrating: {text}")

        found = calibrate(
            family,
            images=images,
            times=times,
            batch_sizes=batch_sizes,
            seed=seed,
            device=device,
            conditions=conditions,
            progress=progress,
        )
        while True:
            found = pilot(
                family,
                found,
                images=images,
                reference_steps=reference_steps,
                seed=seed,
                device=device,
                conditions=conditions,
                progress=progress,
            )
            unsure = found.uncertainty or 0.0
            if until is None or unsure <= until or images >= MOST_IMAGES:
                break
            images = min(MOST_IMAGES, max(2 * images, math.ceil(images * (unsure / until) ** 2)))
    family.fitted = replace(family.fitted, calibration=found)
    family.save_fitted(folder)
    report(found, console)
    return found


def _console() -> Console:
    """A console as wide as the terminal; without one, wide enough for a report of three levels."""
    from rich.console import Console

    return Console(width=None if os.isatty(1) else 140)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 with one line for bad input."""
    options = _parser().parse_args(arguments)
    try:
        family = _guided(Family.load(options.family), options)
        _check_device(getattr(options, "device", "cpu"))
        {"calibrate": _calibrate, "report": _report, "memorise": _memorise}[options.verb](family, options)
    except (ValueError, OSError) as error:
        print(f"{called('multilevel')}: {in_words_of_the_user(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return interrupted("multilevel", f"{options.family} is unchanged; the same command starts again")
    return 0


_ABOUT = "Calibrate a family, show its calibration, memorise a plan."


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows existing defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    show = _Defaults
    parser = argparse.ArgumentParser(command("multilevel"), description=_ABOUT, formatter_class=show)
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, words: str) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=words, description=words, formatter_class=show)
        one.add_argument("family", type=Path, help="folder of a family, such as runs/demo/family")
        one.add_argument("--guidance", type=float, default=None, help="guidance scale, as guidance.scale of sample.py")
        one.add_argument("--weak", default=None, help="autoguidance by this level, the cheapest")
        one.add_argument("--conditions", default=None, help="safetensors file, as conditions of sample.py")
        one.add_argument(
            "--interval", type=float, nargs=2, default=None, help="noise-to-signal ratios between which guidance acts"
        )
        return one

    one = verb("calibrate", "measure costs of the levels and their differences: FAMILY/calibration.json")
    one.add_argument("--images", type=int, default=16, help="trajectories")
    one.add_argument("--times", type=int, default=24, help="noise levels along each trajectory")
    one.add_argument("--batch-sizes", type=int, nargs="+", default=[64], help="batch sizes at which levels are timed")
    one.add_argument(
        "--reference-steps", type=int, default=500, help="steps of the reference for discretisation errors"
    )
    one.add_argument(
        "--until", type=_share, default=None, help="relative standard error to reach with more images, such as 20%%"
    )
    one.add_argument("--seed", type=int, default=0, help="seed of all noise")
    one.add_argument("--device", default="cpu", help="such as cuda")
    verb("report", "show the calibration")
    one = verb("memorise", "draw plans and keep the best on a training set of indices: FAMILY/plans/NAME.json")
    one.add_argument("--name", default="best", help="sample.py finds it as plan=NAME")
    one.add_argument("--solver", default="ddpm", help="solver of the plan")
    one.add_argument("--steps", type=int, default=64, help="steps of the solver")
    one.add_argument("--grid", default="log_snr", help="time grid, as in sampler=mlem")
    one.add_argument("--budget", type=float, default=0.35, help="share of the cost of the largest level at every step")
    one.add_argument("--estimator", default="jump", help="hindsight, held or jump")
    one.add_argument("--coins", default="systematic", help="systematic, bernoulli, nested or poisson")
    one.add_argument("--levels", nargs="+", default=None, help="cheapest first; none: the best subset")
    one.add_argument("--cost", default="flops", help="what budget counts: seconds or flops")
    one.add_argument("--draws", type=int, default=15, help="draws of the coins")
    one.add_argument("--images", type=int, default=16, help="images to choose by, and as many others for evaluation")
    one.add_argument("--reference-steps", type=int, default=1000, help="steps of the reference for errors")
    one.add_argument("--device", default="cpu", help="such as cuda")
    return parser


def _share(text: str) -> float:
    """`20%` or `0.2`."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 10:
        raise argparse.ArgumentTypeError(f"must be a share, such as 20% or 0.2, got {text!r}")
    return share


def _guided(family: Family, options: argparse.Namespace) -> Family:
    """The family under the requested guidance, with its own fitted results."""
    if options.guidance is None:
        for name in ("weak", "interval"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(f"--{name} {value} needs a scale: add --guidance 2")
        return family
    interval = None if options.interval is None else (options.interval[0], options.interval[1])
    return family.guided(options.guidance, weak=options.weak, interval=interval)


def _check_device(name: str) -> None:
    """Raise ValueError for a device that is not available."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); use cpu or another device") from error


def _calibrate(family: Family, options: argparse.Namespace) -> None:
    names = ("images", "times", "batch_sizes", "reference_steps", "seed", "device", "until")
    given = {name: getattr(options, name) for name in names}
    calibrate_folder(family, _folder(family, options), conditions=_conditions(options), **given)


def _conditions(options: argparse.Namespace) -> ConditionSource | None:
    return None if options.conditions is None else rows_of(options.conditions)


def _folder(family: Family, options: argparse.Namespace) -> Path:
    """The folder of fitted results."""
    return options.family if family.folder is None else family.folder


def _report(family: Family, options: argparse.Namespace) -> None:
    report(family.fitted.calibration_for(family), _console())


def _memorise(family: Family, options: argparse.Namespace) -> None:
    check_name("--name", options.name)
    if options.name.endswith(".json"):
        raise ValueError(f"--name must not end in .json, or plan= would take it for a path, got {options.name!r}")
    folder = _folder(family, options)
    check_writable(folder / "plans")
    levels = None if options.levels is None else tuple(options.levels)
    spec = PlanSpec(
        budget=options.budget, estimator=options.estimator, coins=options.coins, cost=options.cost, levels=levels
    )
    names = ("solver", "steps", "grid", "draws", "images", "reference_steps", "device")
    given = {name: getattr(options, name) for name in names}
    plan = memorise(family, spec, conditions=_conditions(options), **given)
    family.fitted = family.fitted.with_plan(options.name, plan)
    family.save_fitted(folder)
    found = plan.about
    print(
        f"best of {found['draws']} draws: mean squared error {found['chosen_mse']:.3g} on the {found['images']} images "
        f"it was chosen by; {found['judged_mse']:.3g} on {found['images']} others, where all draws have "
        f"{found['others_mse']:.3g} ± {found['others_spread']:.2g}"
    )
    print(f"saved as {folder}/plans/{options.name}.json: {command('sample')} plan={options.name} ...")
