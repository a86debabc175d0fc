"""Recommendations that are measured before they are made.

A prediction is certain to some 20 percent, and a recommendation keeps clear of the upper end of its interval, which
costs time where it was good and misses the target where it was not. Here the choice is run on samples of its own
against the many-step run, the search is asked for as much more or less as that says, and so on: the errors of near-by
choices are off by nearly the same factor, so that few rounds suffice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlem.arguments import check_whole
from mlem.multilevel.candidate import Candidate, Check, Recommendation
from mlem.multilevel.probes import plan_samples, start_caches
from mlem.networks import evaluating
from mlem.noise import reserved_indices
from mlem.solvers import GridPoint, Solver, make_solver
from mlem.trajectory import samples
from mlem.waiting import Waiting

if TYPE_CHECKING:
    from mlem.family import Family

__all__ = ["Judge", "adjusted", "judge_of"]

REFERENCE = 500
"""Steps of the many-step run for a calibration that does not say its own."""
ROUNDS = 6
"""Choices that are measured at most."""
NEAR = 0.93
"""A measured choice whose error is at least this share of the target is as fast as can be told."""
FARTHEST = 4.0
"""Factor by which the request may change from one round to the next."""
BATCH = 64
"""Samples that run at once."""


class Judge:
    """Measures choices on samples that are used for nothing else.

    Args:
        family: whose networks stay where they are.
        index: (B,), of the samples, B >= 2, on the device of the networks.
        reference_steps: of the many-step run of the largest level, which is made once.
    """

    def __init__(self, family: Family, index: Tensor, reference_steps: int) -> None:
        self._family, self._steps = family, reference_steps
        self._parts = index.split(BATCH)
        self._networks = torch.nn.ModuleList(level.network for level in family.levels)
        self._truth: dict[str, list[Tensor]] = {}

    def __call__(self, one: Candidate) -> Check:
        """Its measured error."""
        with torch.inference_mode(), evaluating(self._networks):
            truth = self._reference(make_solver(one.solver).reference)
            pairs = zip(self._parts, truth, strict=True)
            errors = torch.cat([(self._run(one, part) - due).square().flatten(1).mean(1) for part, due in pairs])
        return Check(len(errors), errors.mean().item(), errors.std().item() / math.sqrt(len(errors)))

    def _reference(self, name: str) -> list[Tensor]:
        if name not in self._truth:
            solver = make_solver(name)
            self._truth[name] = [self._alone(self._family, None, solver, None, self._steps, one) for one in self._parts]
        return self._truth[name]

    def _run(self, one: Candidate, index: Tensor) -> Tensor:
        family = self._family if one.reuse is None else self._family.reusing(one.reuse)
        solver = make_solver(one.solver)
        if one.plan is None:
            return self._alone(family, one.level, solver, one.grid, one.steps, index)
        points = GridPoint.of(family.schedule, solver.grid(family.schedule, one.steps, one.grid))
        return plan_samples(family, one.plan, solver, points, index, 0)

    @staticmethod
    def _alone(
        family: Family, level: str | None, solver: Solver, grid: str | None, steps: int, index: Tensor
    ) -> Tensor:
        start_caches(family)
        points = GridPoint.of(family.schedule, solver.grid(family.schedule, steps, grid))
        return samples(family.level(level).denoiser_for(index), solver, points, family.shape, index, 0)


def judge_of(family: Family, images: int) -> Judge:
    """The family's judge on as many images, made once for each device.

    Raises ValueError for a number of images that is not a whole number of at least 2.
    """
    check_whole("check", images, least=2)
    place = next(family.level().network.parameters(), torch.empty(0)).device
    if (images, place) not in family.judges:
        steps = family.fitted.calibration_for(family).about.get("reference_steps", REFERENCE)
        family.judges[images, place] = Judge(family, reserved_indices("checking", images, place), steps)
    return family.judges[images, place]


def adjusted(
    choose: Callable[[float], Recommendation], target: float, judge: Callable[[Candidate], Check]
) -> Recommendation:
    """The fastest choice that was measured to reach the target, nine times in ten.

    Args:
        choose: the recommendation that is predicted for an error.
        target: mean squared error per pixel.
        judge: measures a choice, as a `Judge`.

    Raises:
        ValueError: no choice was predicted, or measured, to reach it.
    """
    found: dict[str, Recommendation] = {}
    asked = target
    with Waiting("measuring what is recommended", ROUNDS) as waiting:
        for _ in range(ROUNDS):
            try:
                one = choose(asked)
            except ValueError:
                if not found:
                    raise
                break
            key = repr(_plain(one))
            if key in found:
                if _reaches(found[key], target):
                    break
                asked *= NEAR  # the same was chosen for a smaller error: ask for less still
                continue
            check = judge(one)
            found[key] = replace(one, check=check)
            waiting.advance()
            share = check.upper_mse / target
            if NEAR <= share <= 1:
                break
            asked *= min(max(1 / share, 1 / FARTHEST), FARTHEST)
    reaching = [one for one in found.values() if _reaches(one, target)]
    if not reaching:
        least = min(one.check.upper_mse for one in found.values() if one.check is not None)
        raise ValueError(
            f"mse={target:g}: none of {len(found)} choices surely reaches it where they were measured, the best has "
            f"{least:.3g}; allow more, or check on more images"
        )
    return min(reaching, key=lambda one: one.predicted_seconds)


def _reaches(one: Recommendation, target: float) -> bool:
    """Whether it was measured to reach the target."""
    return one.check is not None and one.check.upper_mse <= target


def _plain(one: Candidate) -> dict[str, Any]:
    """The settings as plain data."""
    options = one.options
    return options | {"plan": one.plan.to_dict()} if one.plan is not None else options
