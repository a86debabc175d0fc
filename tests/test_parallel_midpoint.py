"""Midpoints in parallel: the fixed point that the same chance gives one after the other, windows, stopping, memory."""

from __future__ import annotations

import functools
import gc
import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mlem.noise import NoiseStream
from mlem.sampling import Sampler, sample
from mlem.schedule import NoiseSchedule
from mlem.solvers import EvaluationPoint, GridPoint, make_solver, model_input
from mlem.solvers.clock import CLOCKS
from mlem.solvers.parallel_midpoint import ParallelMidpoint
from tests.problems import MEAN, closed_family, gaussian, mixture, point_mass, rms, slope

COSINE = NoiseSchedule.cosine()
COUNT = 40
pytestmark = pytest.mark.usefixtures("float64")


def run(solver: Any, steps: int, **options: Any) -> Any:
    given: dict[str, Any] = {"schedule": COSINE, "shape": (3,), "indices": range(COUNT), "batch_size": COUNT}
    return sample(mixture(COSINE), solver=solver, steps=steps, **given | options)


@functools.cache
def one_after_the_other(clock_name: str, parts: int, steps: int) -> Tensor:
    """Every midpoint by itself, in order: `y_i = known + d(k_i-1 -> m_i) eps(y_i, m_i)`, iterated until it stands."""
    clock, denoiser = CLOCKS[clock_name], mixture(COSINE)
    sampler = Sampler(
        denoiser, solver=ParallelMidpoint(parts, clock=clock_name), schedule=COSINE, shape=(3,), steps=steps
    )
    points, indices = GridPoint.of(COSINE, sampler.grid), torch.arange(COUNT)
    own = NoiseStream(0, "midpoint-parallel").uniform(indices, range(steps * parts), torch.float64)
    y = sampler.start(indices) / points[0].alpha

    def eps(y: Tensor, place: EvaluationPoint) -> Tensor:
        return denoiser(*model_input(COSINE, y, place))

    for block, (here, there) in enumerate(itertools.pairwise(points)):
        edges = clock.parts(here.kappa, there.kappa, parts)
        known, end, found = y, y, torch.zeros_like(y)
        for part in range(parts):
            left, right = edges[part], edges[part + 1]
            middle = clock.place(left, right, own[block * parts + part])
            drift = clock.drift(left, middle, middle).expand_as(middle)[:, None]
            y_mid = known
            before = torch.full_like(known, torch.inf)
            while (y_mid - before).abs().max() > 1e-11:
                found, before = eps(y_mid, middle), y_mid
                y_mid = known + drift * found
            known = known + clock.drift(left, right, middle).expand_as(middle)[:, None] * found
            end = end + clock.weight(left, right, middle).expand_as(middle)[:, None] * found
        y = end
    return y * points[-1].alpha


@pytest.mark.parametrize("options", [{}, {"window": 8, "tolerance": 1e-9}, {"window": 24, "tolerance": 1e-9}])
@pytest.mark.parametrize("clock", CLOCKS)
def test_with_enough_rounds_it_is_the_sequential_solution(clock: str, options: dict[str, Any]) -> None:
    # parts even in OU time are long beside a small kappa, where rounds contract slowly
    rounds = {"kappa": 60, "ou": 600 if options else 200}[clock]
    count = COUNT if options else 12  # all rounds are made
    solver = ParallelMidpoint(8, rounds, **{"tolerance": None} | options, clock=clock)
    found = run(solver, 8, indices=range(count), batch_size=count)
    torch.testing.assert_close(found.x, one_after_the_other(clock, 8, 8)[:count], rtol=0, atol=1e-6)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("steps", [1, 2, 16])
def test_rounds_contract_wherever_parts_are_long(clock: str, steps: int) -> None:
    """From kappa = 400 in few blocks, down to 0: more rounds do not hurt."""
    options: dict[str, Any] = {"grid": "uniform"}
    few, many = (run(ParallelMidpoint(4, rounds, None, clock=clock), steps, **options).x for rounds in (10, 60))
    assert many.abs().max() <= max(1.1 * few.abs().max().item(), 5.0)


@pytest.mark.parametrize("steps", [1, 2, 16])
def test_data_of_one_point_stay_exact(steps: int) -> None:
    """For all rounds, in blocks however long; freezing the score (clock=ou) is not exact there."""
    given: dict[str, Any] = {"schedule": COSINE, "shape": (3,), "grid": "uniform", "steps": steps}
    x = sample(point_mass(COSINE, MEAN), solver=ParallelMidpoint(4, 30, None), indices=range(20), **given).x
    torch.testing.assert_close(x, MEAN.expand(20, 3), rtol=0, atol=1e-10)


def test_order() -> None:
    """At least 1.4 in the number of blocks, all rounds made."""
    exact = run("dpm_solver_pp", 4000, grid="uniform").x
    counts = [20, 40, 80]
    errors = [rms(run(ParallelMidpoint(2, 10, None), steps, grid="uniform").x - exact) for steps in counts]
    assert slope(counts, errors) >= 1.4


def test_rounds_are_what_was_asked_for() -> None:
    """1 call of B rows, and K of R B, for each block; in a window every block follows one round behind."""
    rows: list[int] = []

    def eps(x: Tensor, t: Tensor) -> Tensor:
        rows.append(len(x))
        return mixture(COSINE)(x, t)

    options: dict[str, Any] = {"schedule": COSINE, "shape": (3,), "steps": 3}
    result = Sampler(eps, solver=ParallelMidpoint(4, 2, None), **options).run(range(5))
    assert rows == [5, 20, 20] * 3
    assert (result.ledger.rounds, result.ledger.evaluations) == (9, 27)
    rows.clear()
    result = Sampler(eps, solver=ParallelMidpoint(4, 2, None, window=12), **options).run(range(5))
    assert rows == [5, 25, 45, 40, 20]
    assert (result.ledger.rounds, result.ledger.evaluations) == (5, 27)
    rows.clear()
    Sampler(eps, solver=ParallelMidpoint(4, 2, None, chunk=7), **options).run(range(5))
    assert max(rows) == 7
    assert sum(rows) == 5 * 27


def test_every_sample_stops_by_itself() -> None:
    """A tolerance saves calls, and a sample does not know its batch."""
    solver = ParallelMidpoint(8, 40, 1e-4, window=16)
    whole = run(solver, 10)
    assert (
        whole.ledger.evaluations
        < solver.evaluations(Sampler(gaussian(COSINE), solver=solver, steps=10, schedule=COSINE, shape=(3,)).points) / 2
    )
    for batch_size in (1, 7):
        torch.testing.assert_close(run(solver, 10, batch_size=batch_size).x, whole.x, rtol=0, atol=1e-12)
    tight = run(ParallelMidpoint(8, 60, None), 10)
    assert rms(whole.x - tight.x) < 1e-3
    loose = run(ParallelMidpoint(8, 40, 1e-2, window=16), 10)
    assert loose.ledger.rounds < whole.ledger.rounds


def test_fewer_rounds_than_ddim_has_steps() -> None:
    """At the error of 160 DDIM steps, at least five times fewer calls one after another."""
    exact = run("dpm_solver_pp", 1500).x
    ddim = run("ddim", 160)
    ours = run(ParallelMidpoint(8, 20, 1e-3, window=24), 10)
    assert rms(ours.x - exact) <= rms(ddim.x - exact)
    assert 5 * ours.ledger.rounds <= ddim.ledger.rounds


def test_memory_is_flat_in_the_number_of_steps() -> None:
    """Of what tensors hold at once: live storage while the estimate is called, with samples of 20,000 numbers."""

    def peak(steps: int) -> int:
        seen = []

        def eps(x: Tensor, t: Tensor) -> Tensor:
            gc.collect()
            alive = {
                part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
                for part in gc.get_objects()
                if type(part) is Tensor
            }
            seen.append(sum(alive.values()))
            return 0.1 * x

        solver = ParallelMidpoint(4, 2, None, window=8)
        Sampler(eps, solver=solver, schedule=COSINE, shape=(20_000,), steps=steps).run([0])
        return max(seen)

    gc.collect()
    gc.freeze()  # what is there already is not looked through each time
    try:
        assert peak(20) <= 1.1 * peak(4)
    finally:
        gc.unfreeze()


def test_a_block_alone_is_a_step() -> None:
    """What the predictor-corrector uses: `step` with its own number keys the midpoints."""
    solver = ParallelMidpoint(4, 3, None)
    options: dict[str, Any] = {"schedule": COSINE, "shape": (3,), "steps": 3}
    sampler = Sampler(mixture(COSINE), solver=solver, **options)
    indices = torch.arange(5)
    points = GridPoint.of(COSINE, sampler.grid)
    y, state = sampler.start(indices) / points[0].alpha, solver.init(points, indices, 0)
    for here, there in itertools.pairwise(points):
        y, state = solver.step(
            lambda y, place: mixture(COSINE)(*model_input(COSINE, y, place)),
            y,
            state,
            here,
            there,
            None,  # type: ignore[arg-type]
        )
    torch.testing.assert_close(y * points[-1].alpha, sampler.run(range(5)).x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"midpoints": 0}, "midpoints must be a whole number >= 1, got 0"),
        ({"rounds": 0}, "rounds must be a whole number >= 1, got 0"),
        ({"chunk": 0}, "chunk must be a whole number >= 1, got 0"),
        ({"window": 4}, "window must hold whole blocks of midpoints=8, at least one, got 4"),
        ({"window": 12}, "window must hold whole blocks of midpoints=8, at least one, got 12"),
        ({"tolerance": 0.0}, "tolerance must be a positive number, got 0.0; null runs all rounds"),
        ({"clock": "time"}, "clock must be one of kappa, ou, got 'time'"),
        (
            {"round": 3},
            "parallel_midpoint has no option 'round'; its options are midpoints, rounds, tolerance, window, chunk, "
            "clock; did you mean rounds?",
        ),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_solver("parallel_midpoint", **options)


def test_a_plan_is_refused() -> None:
    family = closed_family()
    with pytest.raises(
        ValueError, match=r"^parallel_midpoint evaluates many times at once, but a plan once per row; leave out plan=$"
    ):
        Sampler(family, solver="parallel_midpoint", steps=3, plan=family.plan(probabilities=(1.0, 0.5, 0.2)))


def test_nan_is_reported_and_ends() -> None:
    def eps(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t[:, None] < 0.5, torch.nan, 0.1 * x)

    with pytest.raises(FloatingPointError, match="sample 0 became NaN or infinite at step"):
        Sampler(eps, solver=ParallelMidpoint(4, 3), schedule=COSINE, shape=(2,), steps=4).run(range(2))
