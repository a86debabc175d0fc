"""Hooks of sampling: starts, what is revised, who watches; and the examples that use them."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.multilevel.plan import Plan
from mlem.sampling import Step, noised, sample
from mlem.schedule import NoiseSchedule
from mlem.solvers import SOLVERS
from tests.problems import gaussian, gaussian_flow, level

COSINE = NoiseSchedule.cosine()
SEQUENTIAL = [name for name, solver in SOLVERS.items() if solver.sequential]
EXAMPLES = Path(__file__).parent.parent / "examples"


def run(**options: Any) -> Tensor:
    """Samples of correlated Gaussian data."""
    usual: dict[str, Any] = {"schedule": COSINE, "shape": (3,), "indices": range(6), "steps": 12}
    return sample(gaussian(COSINE), **usual | options).x


def test_samples_that_are_stopped_and_started_again_are_the_same() -> None:
    grid = TimeGrid.make("log_snr", COSINE, 24)
    seen: list[Step] = []
    whole = run(grid=grid, watch=seen.append)
    assert [step.number for step in seen] == list(range(1, 25))
    assert [step.point.t for step in seen] == list(grid.times[1:])
    assert torch.equal(seen[-1].x.float(), whole)
    assert seen[0].indices.tolist() == list(range(6))
    half = grid.times[12]
    again = run(grid=grid.below(half), start=lambda indices, z: seen[11].x[indices])
    assert torch.allclose(again, whole, atol=1e-6)


def test_a_start_is_a_function_of_the_index() -> None:
    pictures = torch.linspace(-1, 1, 12).view(4, 3)
    t = 0.6
    grid = TimeGrid.make("log_snr", COSINE, 200).below(t)
    start = noised(pictures, COSINE, t)
    whole = sample(
        gaussian(COSINE), schedule=COSINE, shape=(3,), indices=range(6), grid=grid, start=start, solver="heun",
        return_noise=True,
    )  # fmt: skip
    assert torch.equal(whole.x[4:], run(grid=grid, start=start, solver="heun", indices=[4, 5]))
    noise = sample(gaussian(COSINE), schedule=COSINE, shape=(3,), indices=range(6), steps=1, return_noise=True).x_T
    assert noise is not None
    assert whole.x_T is not None
    alpha = COSINE.alpha(t).item()
    expected = alpha * pictures[[0, 1, 2, 3, 0, 1]] + math.sqrt(1 - alpha**2) * noise
    assert torch.allclose(whole.x_T, expected, atol=1e-6)
    exact = gaussian_flow(whole.x_T.double() / alpha, COSINE.kappa(t).item(), 0.0)
    assert (whole.x - exact).abs().max() < 1e-3


@pytest.mark.parametrize("solver", SEQUENTIAL)
def test_what_is_revised_before_each_step_is_where_the_step_begins(solver: str) -> None:
    seen: list[Step] = []

    def revise(step: Step) -> Tensor:
        seen.append(step)
        return step.x if step.number else torch.zeros_like(step.x)

    revised = run(solver=solver, revise=revise)
    assert [step.number for step in seen] == list(range(12))
    assert torch.equal(revised, run(solver=solver, start=lambda indices, z: torch.zeros_like(z)))
    assert torch.equal(run(solver=solver, revise=lambda step: step.x), run(solver=solver))


def test_hooks_of_multilevel_runs_see_what_hindsight_moved() -> None:
    family = Family([level("xs"), level("s", seed=1)])
    p = torch.tensor([[1.0, 1.0]] + [[1.0, 0.5]] * 7, dtype=torch.float64)
    plan = Plan.draw(p, coins="systematic", estimator="hindsight", levels=("xs", "s"))
    seen: list[Step] = []

    def revise(step: Step) -> Tensor:
        seen.append(step)
        return step.x

    plain = sample(family, solver="ddim", steps=8, indices=range(2), plan=plan)
    hooked = sample(family, solver="ddim", steps=8, indices=range(2), plan=plan, revise=revise)
    # x there and y back round once
    assert torch.allclose(hooked.x, plain.x, atol=1e-5)
    before: list[Step] = []
    sample(family, solver="ddim", steps=8, indices=range(2), plan=plan, watch=before.append)
    assert any((one.x - two.x).abs().max() > 1e-4 for one, two in zip(before, seen[1:], strict=False))


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_levels_run_again_where_a_hook_changes_what_hindsight_moved(shift: float) -> None:
    """The smallest, at the state that the hook leaves; a hook that changes nothing costs nothing."""
    family = Family([level("xs"), level("s", seed=1)])
    rows = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 1], [1, 0], [1, 1], [1, 0], [1, 0]])
    plan = Plan.given(rows, levels=("xs", "s"))
    assert plan.revised.nonzero().flatten().tolist() == [3, 5]
    how: dict[str, Any] = {"solver": "ddim", "steps": 8, "indices": range(2), "plan": plan}
    found = sample(family, **how, revise=lambda step: step.x + shift * (step.number == 3))
    assert {name: cost.calls / 2 for name, cost in found.ledger.levels.items()} == {"xs": 8 + (shift > 0), "s": 3}


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a part of a grid": (
        {"grid": TimeGrid("mine", (0.5, 0.0))},
        "the grid begins at t = 0.5, where samples are not pure",
    ),
    "start of another shape": (
        {"start": lambda i, z: z[:, :2]},
        r"start= must return x of shape \(6, 3\), got \(6, 2\)",
    ),
    "start that is not finite": ({"start": lambda i, z: z / 0}, "start= returned NaN or infinity"),
    "revised to another shape": (
        {"revise": lambda s: s.x[:1]},
        r"revise= must return x of shape \(6, 3\), got \(1, 3\)",
    ),
    "watched in parallel": ({"solver": "parallel_midpoint", "watch": print}, "leave out watch= and revise="),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line(mistake: str) -> None:
    options, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=words):
        run(**options)


@pytest.mark.parametrize("t", [0.0, 1.5, float("nan")])
def test_a_part_of_a_grid_begins_within_it(t: float) -> None:
    with pytest.raises(ValueError, match=r"t must be in \(0, 1\] and above the end of the grid, 0, got"):
        TimeGrid.make("uniform", COSINE, 4).below(t)


def example(name: str) -> Any:
    """The module of an example."""
    about = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert about is not None
    assert about.loader is not None
    module = importlib.util.module_from_spec(about)
    about.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def family() -> Family:
    return Family([level("xs")])


def test_image_to_image_stays_near_where_it_begins_late(family: Family) -> None:
    picture = torch.zeros(1, 8, 8)
    near, far = (example("image_to_image").variations(family, picture, t, 4) for t in (0.02, 0.9))
    assert near.shape == (4, 1, 8, 8)
    assert near.abs().max() < 0.3 < far.abs().max()


def test_inpainting_keeps_what_is_known(family: Family) -> None:
    picture, known = torch.full((1, 8, 8), 0.5), torch.zeros(1, 8, 8, dtype=torch.bool)
    known[:, :4] = True
    found = example("inpainting").inpaint(family, picture, known, 3)
    assert (found[:, :, :4] == 0.5).all()
    plain = sample(family, solver="ddpm", steps=64, indices=range(3)).x
    assert (found[:, :, 4:] - plain[:, :, 4:]).abs().max() > 1e-3


def test_a_trajectory_ends_at_the_samples(family: Family) -> None:
    found = example("trajectory").way(family, count=2, steps=16, every=4)
    assert found.shape == (4, 2, 1, 8, 8)
    assert torch.equal(found[-1].float(), sample(family, solver="ddim", steps=16, indices=range(2)).x)


def test_gradient_guidance_goes_downhill(family: Family) -> None:
    plain = sample(family, solver="ddim", steps=64, indices=range(4)).x
    dark = example("gradient_guidance").guided(family, lambda x: x.mean((1, 2, 3)), 20.0, 4)
    assert (dark.mean((1, 2, 3)) < plain.mean((1, 2, 3))).all()


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_examples_say_how_they_are_run(name: str) -> None:
    assert f"python examples/{name}.py" in (example(name).__doc__ or "")
    assert name not in sys.modules
