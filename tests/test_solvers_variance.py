"""Every solver as a user first meets it: its default grid, and the default number of steps of the command line.

Data are a Gaussian with independent coordinates, of deviations 0.1 to 0.7. A method of order 2 must keep its variance
to 10 percent in every coordinate, any other to a third; the table stands in `docs/solvers.md`.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from mlem.schedule import NoiseSchedule
from mlem.solvers import SOLVERS, GridPoint, Solver, make_solver
from mlem.trajectory import noise_estimate, trajectory
from tests.commands import REPOSITORY
from tests.problems import DEVIATIONS, uneven_gaussian

SAMPLERS = {path.stem: OmegaConf.load(path) for path in sorted((REPOSITORY / "configs/sampler").glob("*.yaml"))}
PAGE = REPOSITORY / "docs/solvers.md"
OURS = {name: config for name, config in SAMPLERS.items() if config.solver in SOLVERS}
SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "cosine": NoiseSchedule.cosine(),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(3.0),
}


def variance(solver: Solver, schedule: NoiseSchedule, steps: int, grid: str | None, seed: int = 0) -> Tensor:
    """Of the samples, in units of the data's: (4,).

    Samples are linear in x_T and the path. So x_T of -1 and 1 is enough: of an ODE two give the variance exactly, where
    midpoints are random some more give its mean, and of an SDE 1,000 leave a standard error of 4.5 percent.
    """
    count = 1000 if solver.stochastic else 100 if "midpoint" in solver.name else 2
    x_T = torch.randint(0, 2, (count, 4), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    points = GridPoint.of(schedule, solver.grid(schedule, steps, grid))
    estimate = noise_estimate(uneven_gaussian(schedule), schedule)
    x = trajectory(estimate, solver, points, x_T, torch.arange(count), seed)
    return x.square().mean(0) / DEVIATIONS.square()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("name", OURS)
def test_defaults_keep_the_variance_of_a_gaussian(name: str, kind: str) -> None:
    config = OURS[name]
    solver = make_solver(config.solver, **config.get("options", {}))
    found = variance(solver, SCHEDULES[kind], config.steps, config.grid)
    assert (found - 1).abs().max() < (0.1 if solver.order >= 2 else 1 / 3)


def test_every_solver_is_among_them() -> None:
    assert {config.solver for config in OURS.values()} == set(SOLVERS)


@pytest.mark.usefixtures("float64")
def test_the_table_of_the_page_has_every_sampler_and_its_figures() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\d+) .*\| (.+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert [(name, solver, int(steps)) for name, solver, steps, *_ in rows] == [
        (name, config.solver, config.steps) for name, config in OURS.items()
    ]
    for name, solver, steps, *figures in rows:
        method = make_solver(solver)
        if not method.stochastic and "midpoint" not in solver:  # of the others they are means over draws
            for kind, text in zip(("linear", "cosine"), figures, strict=True):
                found = variance(method, SCHEDULES[kind], int(steps), OURS[name].grid)
                assert text == ", ".join(f"{value:.2f}" for value in found.tolist())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_default_of_sample_does_too(kind: str) -> None:
    """`sample(model)` takes ddim in 50 steps."""
    assert (variance(make_solver("ddim"), SCHEDULES[kind], 50, None) - 1).abs().max() < 1 / 3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", SCHEDULES)
def test_midpoints_of_the_sde_are_stable_from_16_steps_on(kind: str) -> None:
    """There kappa falls by less than half a step; a grid even in t made the variance 14 to 560 times too large.

    Of a flow the first step, from pure noise, goes further, and all that is left is wider.
    """
    solver = make_solver("randomized_midpoint_sde")
    points = GridPoint.of(SCHEDULES[kind], solver.grid(SCHEDULES[kind], 17))
    if not points[0].pure_noise:
        assert all(there.kappa > here.kappa / 2 for here, there in itertools.pairwise(points[:-1]))
    assert (variance(solver, SCHEDULES[kind], 25, None) - 1).abs().max() < 1 / 3
