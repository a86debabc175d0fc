"""Randomized midpoints: unbiased, the paper's step, orders by slope, midpoints and noise on one path, with plans."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import torch
from torch import Tensor

from mlem.brownian import BrownianPath
from mlem.grids import TimeGrid
from mlem.sampling import Sampler, sample
from mlem.schedule import NoiseSchedule
from mlem.solvers import EvaluationPoint, GridPoint, make_solver, model_input
from mlem.solvers.clock import CLOCKS, KappaClock, make_clock
from mlem.solvers.randomized_midpoint import RandomizedMidpoint, draw_midpoints
from tests.problems import closed_family, mixture, rms, slope

COSINE = NoiseSchedule.cosine()
STILL: Any = None


def point(t: float) -> GridPoint:
    return GridPoint.at(COSINE, t)


# --- unbiased ------------------------------------------------------------------------------------------------------

HERE, THERE = point(0.7), point(0.4)
NODES, WEIGHTS = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(60))


def along(place: EvaluationPoint) -> Tensor:
    """The integrand of a path that is given: eps as a function of kappa alone."""
    kappa = torch.as_tensor(place.kappa if isinstance(place, GridPoint) else place, dtype=torch.float64)
    return torch.sin(3 * kappa) + kappa**2


def mean_step(solver: RandomizedMidpoint) -> float:
    """One step from y = 0, integrated over the midpoint by quadrature: the nodes are the samples."""
    y = torch.zeros(len(NODES), 1, dtype=torch.float64)
    state = ((NODES + 1) / 2)[None]
    ends, rest = solver.step(lambda y, place: along(place).expand(len(y))[:, None], y, state, HERE, THERE, STILL)
    assert len(rest) == 0
    return (ends[:, 0] * WEIGHTS / 2).sum().item()


EXACT = scipy.integrate.quad(lambda kappa: math.sin(3 * kappa) + kappa**2, HERE.kappa, THERE.kappa, epsabs=1e-13)[0]


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_step_is_unbiased(clock: str) -> None:
    assert abs(mean_step(RandomizedMidpoint(clock)) - EXACT) < 1e-8


def test_a_wrong_clock_is_biased() -> None:
    """Midpoints uniform in t, weighted as if they were uniform in kappa: what one public implementation does."""

    class InTime(KappaClock):
        def place(self, kappa: Any, there: Any, fraction: Tensor) -> Tensor:
            return COSINE.kappa(HERE.t + (THERE.t - HERE.t) * fraction)

    solver = RandomizedMidpoint()
    solver.clock = InTime()
    assert abs(mean_step(solver) - EXACT) > 0.01


def test_ou_clock_is_algorithm_1() -> None:
    """Written out in x and OU time, with the score, as in the paper."""
    denoiser = mixture(COSINE)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = draw_midpoints(torch.arange(50), 0, 1, "own")

    def score(x: Tensor, s: Tensor) -> Tensor:
        t = COSINE.time_from_ou_time(s)
        return -denoiser(x, t) / COSINE.sigma(t)[:, None]

    s = torch.full((50,), COSINE.ou_time(HERE.t).item(), dtype=torch.float64)
    h = s - COSINE.ou_time(THERE.t)
    grow, grow_mid, rest = (torch.exp(power)[:, None] for power in (h, a[0] * h, (1 - a[0]) * h))
    x_mid = grow_mid * x + (grow_mid - 1) * score(x, s)
    expected = grow * x + h[:, None] * rest * score(x_mid, s - a[0] * h)

    def eps(y: Tensor, place: EvaluationPoint) -> Tensor:
        return denoiser(*model_input(COSINE, y, place))

    y, _ = RandomizedMidpoint("ou").step(eps, x / HERE.alpha, a, HERE, THERE, STILL)
    torch.testing.assert_close(y * THERE.alpha, expected, rtol=1e-10, atol=1e-10)


def test_midpoints_are_own_or_shared_and_know_no_batch() -> None:
    indices = torch.arange(1000)
    own, shared = (draw_midpoints(indices, 3, 20, kind) for kind in ("own", "shared"))
    assert torch.equal(draw_midpoints(indices[5:9], 3, 20, "own"), own[:, 5:9])
    assert torch.equal(draw_midpoints(indices[5:9], 3, 20, "shared"), shared[:, 5:9])
    assert (shared == shared[:, :1]).all()
    assert not torch.equal(draw_midpoints(indices, 4, 20, "shared"), shared)
    assert abs(own.mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / own.numel())
    assert abs(np.corrcoef(own[:-1].flatten(), own[1:].flatten())[0, 1]) < 4 / math.sqrt(own.numel())


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^clock must be one of kappa, ou, got 'time'$"):
        RandomizedMidpoint("time")
    with pytest.raises(ValueError, match=r"^clock must be one of kappa, ou, got 3$"):
        make_clock(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^midpoints must be one of own, shared, got 'batch'$"):
        RandomizedMidpoint(midpoints="batch")


# --- orders --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_order_in_root_mean_square_and_in_the_mean() -> None:
    """At least 1.4 and 1.8, on a mixture from one starting noise; the error of the mean is that over midpoints."""
    counts, draws = [20, 40, 80], 10_000
    denoiser, y = mixture(COSINE), torch.tensor([[0.8, -0.3, 0.5]]) * 3
    points = lambda n: GridPoint.of(COSINE, TimeGrid("even", tuple(0.9 - 0.8 * i / n for i in range(n + 1))))  # noqa: E731

    def run(name: str, n: int, batch: int) -> Tensor:
        def eps(y: Tensor, place: EvaluationPoint) -> Tensor:
            return denoiser(*model_input(COSINE, y, place))

        solver = make_solver(name)
        return solver.integrate(eps, y.expand(batch, 3), points(n), STILL, torch.arange(batch), 0)

    exact = run("heun", 4000, 1)
    ends = [run("randomized_midpoint", n, draws) for n in counts]
    assert slope(counts, [rms(end - exact) for end in ends]) >= 1.4
    assert slope(counts, [rms(end.mean(0) - exact) for end in ends]) >= 1.8


# --- on one path ---------------------------------------------------------------------------------------------------


def test_the_path_in_between_is_the_path() -> None:
    """At nodes of their own, samples see what a grid through these would."""
    times = torch.tensor([0.75, 0.8, 0.523, 0.6, 0.501], dtype=torch.float64)
    indices = torch.arange(5)
    path = BrownianPath(COSINE, 0, indices, (3,), torch.float64)
    path.at(0.9)
    inside, below = path.between(0.5, COSINE.kappa(times))
    for row, t in enumerate(times.tolist()):
        other = BrownianPath(COSINE, 0, indices, (3,), torch.float64)
        assert torch.equal(other.at(t)[row], inside[row])
    assert torch.equal(other.at(0.5), below)
    assert torch.equal(path.at(0.4), BrownianPath(COSINE, 0, indices, (3,), torch.float64).at(0.4))


def test_the_path_between_nodes_has_the_right_law() -> None:
    count, times = 50_000, (0.5003, 0.5002, 0.5001)
    path = BrownianPath(COSINE, 1, torch.arange(count), (1,), torch.float64)
    above = path.at(times[0])
    inside, below = path.between(times[2], torch.full((count,), COSINE.kappa(times[1]).item(), dtype=torch.float64))
    high, middle, low = (COSINE.kappa(t).item() ** 2 for t in times)
    for difference, variance in ((above - inside, high - middle), (inside - below, middle - low), (below, low)):
        assert abs(difference.square().mean().item() / variance - 1) < 4 * math.sqrt(2 / count)
    assert abs(((above - inside) * (inside - below)).mean()) < 4 * math.sqrt((high - middle) * (middle - low) / count)


def test_between_needs_a_last_time() -> None:
    path = BrownianPath(COSINE, 0, torch.arange(2), (1,), torch.float64)
    with pytest.raises(ValueError, match="call at"):
        path.between(0.5, torch.ones(2, dtype=torch.float64))


# --- with several levels -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "options", [{"probabilities": (1.0, 1.0, 1.0)}, {"probabilities": (1.0, 0.5, 0.3), "coins": "bernoulli"}]
)
def test_levels_share_the_evaluations(options: dict[str, Any]) -> None:
    """A plan has a row for each of the two evaluations; with p = 1 it is the top level bit for bit."""
    family = closed_family()
    plan = family.plan(**options, estimator="jump")
    sampler = Sampler(family, solver="randomized_midpoint", steps=6, plan=plan)
    assert sampler.plan is not None
    assert sampler.plan.evaluations == 12
    result = sampler.run(range(4))
    alone = sample(family, solver="randomized_midpoint", steps=6, indices=range(4))
    assert torch.equal(result.x, alone.x) == (options["probabilities"] == (1.0, 1.0, 1.0))
    assert alone.ledger.rounds == 12
    assert result.ledger.rounds == result.ledger.evaluations  # levels of one row run one after another
