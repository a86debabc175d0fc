"""Conditions: every sample is told its own, whoever evaluates it, and in whatever batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlem.family import Family
from mlem.level import Level
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.learning import Objective, frozen
from mlem.multilevel.memorise import memorise
from mlem.multilevel.pilot import pilot
from mlem.multilevel.plan import Plan
from mlem.sampling import sample
from mlem.schedule import NoiseSchedule
from mlem.solvers import SOLVERS, make_solver
from tests.labelled import DEVIATIONS, PATHS, gaussian_factor, labelled_family, labels, shrunk

COUNT = 32


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module", params=PATHS)
def calibrated(request: pytest.FixtureRequest) -> Family:
    """A family of labelled Gaussians on each path, calibrated."""
    torch.set_default_dtype(torch.float64)
    family = labelled_family(path=request.param)
    found = pilot(family, calibrate(family, images=6, times=8, batch_sizes=[8]), images=3, reference_steps=64)
    family.fitted = Fitted(found)
    return family


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", range(4))
def test_samples_of_a_class_have_its_law(value: int, path: str) -> None:
    found = shrunk(labelled_family(path=path), value)
    assert torch.allclose(found, gaussian_factor(DEVIATIONS[value].item(), path=path), rtol=2e-3)


def test_without_conditions_classes_take_turns() -> None:
    family = labelled_family()
    given = sample(family, indices=range(7, 20), steps=5, conditions=lambda indices: {"class_labels": indices % 3})
    assert torch.equal(sample(family, indices=range(7, 20), steps=5).x, given.x)


@pytest.mark.parametrize(("path", "guided"), [("vp", False), ("vp", True), ("edm", False), ("flow", True)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_an_index_has_one_image_in_any_batch_by_every_solver(solver: str, path: str, guided: bool) -> None:
    family = labelled_family(path=path)
    family = family.guided(1.5) if guided else family
    options: dict[str, Any] = {"solver": solver, "steps": 6, "conditions": labels([2, 0, 3, 1, 1])}
    whole = sample(family, indices=range(COUNT), batch_size=COUNT, **options).x
    for size in (1, 7):
        some = range(COUNT) if size == 7 else range(9, 14)
        found = sample(family, indices=some, batch_size=size, **options).x
        assert (found - whole[some.start : some.stop]).abs().max() < 1e-9
    assert (whole[0] - sample(family, indices=[0], **options | {"conditions": labels([1])}).x[0]).abs().max() > 1e-3


@pytest.mark.parametrize("chunk", [5, None])
def test_parallel_midpoints_in_flight_have_the_conditions_of_their_sample(chunk: int | None) -> None:
    method = make_solver("parallel_midpoint", midpoints=3, window=6, rounds=4, chunk=chunk)
    family = labelled_family()
    together = sample(family, solver=method, steps=6, indices=range(9), conditions=labels([0, 2, 1, 3])).x
    for index in range(9):
        alone = sample(family, solver=method, steps=6, indices=[index], conditions=labels([0, 2, 1, 3])).x
        assert (alone[0] - together[index]).abs().max() < 1e-9


SHARED: dict[str, dict[str, Any]] = {
    "ddim": {"solver": "ddim"},
    "parallel": {"solver": make_solver("parallel_midpoint", midpoints=3, window=6, rounds=4, chunk=5)},
    "plan": {"plan": Plan.draw(torch.tensor([[1.0, 0.5]]).expand(6, 2), coins="systematic", levels=("1", "2"))},
}


def sampled(name: str, **options: Any) -> Tensor:
    """Samples of which every row has another label than its neighbours."""
    usual: dict[str, Any] = {"steps": 6, "indices": range(7), "conditions": labels([2, 0, 3, 1])}
    return sample(labelled_family(), **usual | SHARED[name] | options).x


def sample_on_rank(rank: int, folder: Path) -> None:
    """One process of two."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.save({name: sampled(name, spread=True) for name in SHARED}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_that_share_a_call_share_its_conditions(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(sample_on_rank, (tmp_path,), nprocs=2, start_method="fork")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name in SHARED:
            assert (found[name] - sampled(name)).abs().max() < 1e-9


class Text(nn.Module):
    """A network that is told an embedding of its own width."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(width, 2, generator=generator))

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return torch.tanh(x + text.mean(1) @ self.weight)


def test_levels_may_be_told_different_things() -> None:
    schedule = NoiseSchedule.cosine()
    levels = [
        Level(name, Text(width, width), schedule, (2,), conditions={"text": (5, width)})
        for name, width in (("s", 3), ("l", 7))
    ]
    family = Family(levels)

    def source(indices: Tensor) -> dict[str, Any]:
        texts = torch.cos(indices[:, None, None] + torch.arange(35.0).view(5, 7))
        return {"s": {"text": texts[..., :3]}, "l": {"text": texts}}

    plan = Plan.draw(torch.tensor([[1.0, 0.5]]).expand(8, 2), coins="systematic", levels=("s", "l"))
    whole = sample(family, indices=range(6), steps=8, plan=plan, conditions=source)
    apart = sample(family, indices=range(6), steps=8, plan=plan, conditions=source, batch_size=4)
    assert (whole.x - apart.x).abs().max() < 1e-9
    assert all(cost.calls for cost in whole.ledger.levels.values())
    with pytest.raises(ValueError, match="level l takes text, rows of shape"):
        sample(family, indices=range(2), steps=2)


@pytest.mark.parametrize("path", PATHS)
def test_with_certain_coins_the_levels_give_the_largest_one(path: str) -> None:
    family = labelled_family(path=path)
    plan = Plan.draw(torch.ones(6, 2, dtype=torch.float64), levels=tuple(family.names))
    options: dict[str, Any] = {"indices": range(9), "steps": 6, "conditions": labels([2, 0, 3, 1, 1])}
    assert torch.equal(sample(family, plan=plan, **options).x, sample(family, **options).x)


@pytest.mark.parametrize("per_sample", [False, True])
def test_calibrated_plans_and_coins_of_each_sample_keep_conditions_apart(calibrated: Family, per_sample: bool) -> None:
    shape = {"estimator": "jump", "coins": "bernoulli", "per_sample": True} if per_sample else {}
    plan = calibrated.plan(budget=0.6, cost="flops", **shape)
    options: dict[str, Any] = {"solver": "ddpm", "steps": 16, "plan": plan, "conditions": labels([2, 0, 3, 1, 1])}
    whole = sample(calibrated, indices=range(12), batch_size=12, **options)
    apart = sample(calibrated, indices=range(12), batch_size=5, **options)
    assert (whole.x - apart.x).abs().max() < 1e-9
    other = sample(calibrated, indices=range(12), batch_size=12, **options | {"conditions": labels([0])})
    assert (whole.x - other.x).abs().amax(1).gt(1e-3).tolist() == [index % 5 != 1 for index in range(12)]


def test_a_calibration_depends_on_its_conditions_alone(calibrated: Family) -> None:
    def measured(**options: Any) -> Tensor:
        levels = calibrated.levels
        return calibrate(Family(levels), images=6, times=8, batch_sizes=[8], **options).responses["ode"].inner

    assert calibrated.fitted.calibration is not None
    turns = calibrated.fitted.calibration.responses["ode"].inner
    assert torch.equal(measured(conditions=lambda indices: {"class_labels": indices % 3}), turns)
    assert not torch.allclose(measured(conditions=labels([2])), turns, rtol=0.1)


def test_memorised_plans_and_learning_are_told_too(calibrated: Family) -> None:
    spec = calibrated.plan(budget=0.7, estimator="jump", coins="systematic", cost="flops")
    options: dict[str, Any] = {"solver": "ddim", "steps": 8, "draws": 3, "images": 4, "reference_steps": 16}
    own = memorise(calibrated, spec, **options, conditions=labels([1])).about["others_mse"]
    assert own != memorise(calibrated, spec, **options, conditions=labels([2])).about["others_mse"]
    solver = make_solver("ddim")
    grid = solver.grid(calibrated.schedule, 6)
    problem = Objective(
        frozen(calibrated),
        calibrated.schedule,
        calibrated.shape,
        solver,
        grid,
        torch.tensor([0.25, 1.0]),
        conditions=lambda indices: [labels([2, 0, 1])(indices)] * 2,
    )
    theta = torch.zeros(2, 1)
    index = torch.arange(5)
    truth = problem.reference(index)
    plain = sample(calibrated, solver="ddim", grid=grid, indices=range(5), conditions=labels([2, 0, 1])).x
    assert (truth - plain).abs().max() < 1e-9
    counts = problem.draw(theta, 0, 4).counts
    p = problem.probabilities(theta)
    every = index.expand(4, -1)
    together = problem.errors(problem.weights(counts, p), counts, every, truth.expand(4, -1, -1))
    for draw in range(4):
        one = counts[draw : draw + 1]
        alone = problem.errors(problem.weights(one, p), one, index[None], truth[None])
        assert torch.allclose(alone[0], together[draw], rtol=1e-9)


MISTAKES: dict[str, tuple[Any, str]] = {
    "another name": (lambda i: {"label": i}, "conditions= gives 'label', but level 2 takes class_labels"),
    "nothing": (lambda i: {}, "level 2 takes class_labels, which conditions= does not give; it gives nothing"),
    "no mapping": (lambda i: i, "conditions= must return a mapping, name -> tensor with one row per index"),
    "too large": (lambda i: {"class_labels": i + 4}, r"must be in \[0, 3\], 3 meaning no class; got 4 to 6"),
    "negative": (lambda i: {"class_labels": i - 1}, r"must be in \[0, 3\], 3 meaning no class; got -1 to 1"),
    "fractions": (lambda i: {"class_labels": i / 2}, "must be whole numbers, got torch.float64"),
    "rows": (lambda i: {"class_labels": i[:2]}, r"must have shape \(3,\), got \(2,\)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_conditions_that_do_not_fit_get_one_line(mistake: str) -> None:
    source, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=words):
        sample(labelled_family(), indices=range(3), steps=2, conditions=source)


def test_a_denoiser_or_level_that_is_told_nothing_says_so() -> None:
    schedule = NoiseSchedule.cosine()
    with pytest.raises(ValueError, match="this denoiser takes nothing besides x and t"):
        sample(lambda x, t: x, schedule=schedule, shape=(2,), indices=[0], steps=1, conditions=labels([1]))
    family = Family([Level("s", nn.Linear(2, 2), schedule, (2,), flops=1)])
    with pytest.raises(ValueError, match=r"level s takes nothing besides x and t; declare it: Level\(..., conditions="):
        sample(family, indices=[0], steps=1, conditions=labels([1]))


@pytest.mark.parametrize("value", [0, -1, True, 1.5, (3, 0), "ten"])
def test_a_level_describes_its_conditions_in_whole_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match=r"conditions\['text'\] must be a number of classes or the shape of a row"):
        Level("s", nn.Linear(2, 2), NoiseSchedule.cosine(), (2,), flops=1, conditions={"text": value})
