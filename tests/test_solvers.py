"""Solvers: the exact discrete law, orders of convergence by slope, and what every solver must do."""

from __future__ import annotations

import functools
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mlem import solvers
from mlem.brownian import BrownianPath
from mlem.grids import GRIDS, TimeGrid
from mlem.sampling import Sampler, sample
from mlem.schedule import NoiseSchedule
from mlem.solvers import SOLVERS, GridPoint, make_solver, model_input
from tests.problems import COVARIANCE, MEAN, gaussian, gaussian_flow, point_mass, rms, slope, solve

COSINE = NoiseSchedule.cosine()
SAMPLES = 8000


# --- the law of the output, for Gaussian data ----------------------------------------------------------------------


def affine_step(solver: str, kappa: float, kappa_next: float) -> tuple[np.ndarray, float]:
    """(A, q): the step is `y' = m + A (y - m) + N(0, q I)`, from `eps = kappa (Sigma + kappa^2)^-1 (y - m)`."""
    eps = kappa * np.linalg.inv(COVARIANCE.numpy() + kappa**2 * np.eye(3))
    data = np.eye(3) - kappa * eps  # the estimate of x_0
    ratio = (kappa_next / kappa) ** 2
    return {
        "ddim": (np.eye(3) + (kappa_next - kappa) * eps, 0.0),
        "ddpm": (ratio * np.eye(3) + (1 - ratio) * data, kappa_next**2 * (1 - ratio)),
        "euler_maruyama": (np.eye(3) + 2 * (kappa_next - kappa) * eps, kappa**2 - kappa_next**2),
    }[solver]


def discrete_law(solver: str, grid: TimeGrid) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the solver's output from x_T ~ N(0, I), carried step by step."""
    kappas = [COSINE.kappa(t).item() for t in grid.times]
    offset = -MEAN.numpy()
    covariance = np.eye(3) * (1 + kappas[0] ** 2)
    for kappa, kappa_next in itertools.pairwise(kappas):
        a, q = affine_step(solver, kappa, kappa_next)
        offset, covariance = a @ offset, a @ covariance @ a.T + q * np.eye(3)
    return MEAN.numpy() + offset, covariance


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("steps", [5, 10, 20, 50, 200])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "euler_maruyama"])
def test_gaussian_data_give_the_exact_discrete_law(solver: str, steps: int) -> None:
    """Mean and covariance within 4 standard errors: an off-by-one in the grid or in the noise is far outside."""
    options = {"schedule": COSINE, "shape": (3,), "grid": "uniform", "steps": steps, "seed": 1}
    x = sample(gaussian(COSINE), solver=solver, indices=range(SAMPLES), batch_size=SAMPLES, **options).x.numpy()
    mean, covariance = discrete_law(solver, TimeGrid.make("uniform", COSINE, steps))
    variances = np.diag(covariance)
    assert (np.abs(x.mean(0) - mean) < 4 * np.sqrt(variances / SAMPLES)).all()
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / SAMPLES)
    assert (np.abs(np.cov(x.T) - covariance) < 4 * error).all()


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "euler_maruyama"])
def test_the_discrete_law_tends_to_the_data(solver: str) -> None:
    """Keeps the recursion above honest."""
    mean, covariance = discrete_law(solver, TimeGrid.make("karras", COSINE, 5000))
    np.testing.assert_allclose(mean, MEAN.numpy(), atol=0.01)
    np.testing.assert_allclose(covariance, COVARIANCE.numpy(), atol=0.01)


# --- orders of convergence -----------------------------------------------------------------------------------------

# Even in t on [1/8, 7/8]: kappa is smooth and bounded there, so the leading term of the error shows at once. On a
# grid down to t = 0 every error is mixed with that of the last step; towards t = 1 kappa is in the hundreds.
FIRST, LAST = 896, 128
"""Ends of the interval, in 1024ths, which the Brownian path bridges between its nodes."""


def interval(steps: int, first: int = FIRST) -> list[float]:
    return [(first - (first - LAST) * i / steps) / 1024 for i in range(steps + 1)]


def start(count: int, kappa: float = COSINE.kappa(FIRST / 1024).item()) -> Tensor:
    """y at the start of the interval, with the law that it should have there, for `count` samples."""
    z = torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return MEAN + z @ torch.linalg.cholesky(COVARIANCE + kappa**2 * torch.eye(3, dtype=torch.float64)).T


def path(count: int) -> BrownianPath:
    return BrownianPath(COSINE, 0, torch.arange(count), (3,), torch.float64)


def test_the_closed_form_solves_the_ode() -> None:
    y = start(10)
    kappa, h = 1.3, 1e-5
    slope_ = (gaussian_flow(y, kappa, kappa + h) - gaussian_flow(y, kappa, kappa - h)) / (2 * h)
    alpha = 1 / math.sqrt(1 + kappa**2)
    t = COSINE.time_from_kappa(torch.full((10,), kappa, dtype=torch.float64))
    torch.testing.assert_close(gaussian(COSINE)(alpha * y, t), slope_, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "name", [name for name, solver in SOLVERS.items() if solver.sequential and not solver.stochastic]
)
def test_order_of_ode_solvers(name: str) -> None:
    """Slope against the closed form: within 0.1 of order 1, 0.2 of order 2, 0.3 of order 3."""
    order = SOLVERS[name].order
    # of a high order that the first steps lack the slope shows late
    counts = [24, 48, 96, 192, 384] if order < 3 else [384, 768, 1536]
    y = start(64)
    exact = gaussian_flow(y, COSINE.kappa(FIRST / 1024).item(), COSINE.kappa(LAST / 1024).item())
    ends = [solve(make_solver(name), gaussian(COSINE), COSINE, interval(n), y, path(64)) for n in counts]
    measured = slope(counts, [rms(end - exact) for end in ends])
    assert abs(measured - order) <= 0.1 * order, f"{name}: slope {measured:.3f}"


@pytest.mark.parametrize(
    ("schedule", "first", "off"),
    [(NoiseSchedule.edm(), FIRST, 0.15), (NoiseSchedule.flow(), FIRST, 0.15), (NoiseSchedule.flow(), 1024, 0.4)],
    ids=["edm", "flow", "pure noise"],
)
@pytest.mark.parametrize("name", ["ddim", "heun", "dpm_solver_pp"])
def test_order_of_ode_solvers_on_other_paths(name: str, schedule: NoiseSchedule, first: int, off: float) -> None:
    """Also from pure noise, where the first step is the limit of one of order 1: it is short in r = 1 - t."""
    counts = [24, 48, 96, 192]
    ends = [schedule.kappa(t / 1024).item() for t in (first, LAST)]
    y = start(16, ends[0])
    found = [solve(make_solver(name), gaussian(schedule), schedule, interval(n, first), y, path(16)) for n in counts]
    measured = slope(counts, [rms(end - gaussian_flow(y, *ends)) for end in found])
    assert abs(measured - SOLVERS[name].order) <= off, f"{name}: slope {measured:.3f}"


@functools.cache
def on_the_path(name: str, steps: int) -> Tensor:
    """Ends of 400 samples whose paths do not depend on the steps."""
    return solve(make_solver(name), gaussian(COSINE), COSINE, interval(steps), start(400), path(400))


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.stochastic and solver.coupled])
def test_strong_order_of_sde_solvers(name: str) -> None:
    """Slope of the root mean square error on shared paths, against 3072 steps of its reference (finer than cells)."""
    counts = [24, 48, 96, 192]
    fine = on_the_path(SOLVERS[name].reference, 3072)
    measured = slope(counts, [rms(on_the_path(name, n) - fine) for n in counts])
    assert abs(measured - SOLVERS[name].order) <= 0.15, f"{name}: slope {measured:.3f}"


# --- what every solver must do -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name, solver in SOLVERS.items() if solver.sequential]
    + [("randomized_midpoint", {"clock": "ou"}), ("randomized_midpoint", {"midpoints": "shared"})]
    + [("predictor_corrector", {"clock": "ou", "corrector": corrector}) for corrector in ("midpoint", "parallel")],
)
def test_steps_stay_on_the_device_and_never_wait_for_it(name: str, options: dict[str, str]) -> None:
    """On torch's `meta` device, which has no numbers: mixing devices and reading a value back are both errors."""
    solver, indices = make_solver(name, **options), torch.arange(3, device="meta")
    points = GridPoint.of(COSINE, solver.grid(COSINE, 6))
    walk = BrownianPath(COSINE, 0, indices, (3, 4, 4), torch.float32)
    y = torch.ones(3, 3, 4, 4, device="meta", dtype=torch.float64)
    end = solver.integrate(lambda y, place: model_input(COSINE, y, place)[0].cos(), y, points, walk, indices, 0)
    assert end.device.type == "meta"
    assert end.shape == y.shape


SHORT = pytest.mark.filterwarnings("ignore:the grid begins at t = ")
"""The leading grid in few steps begins far below t = 1."""


@SHORT
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SOLVERS)
def test_conformance(name: str, grid: str, steps: int) -> None:
    """Finite, deterministic, as many evaluations as promised, and the given solver is left as it was."""
    calls: list[int] = []

    def eps(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return gaussian(COSINE)(x, t)

    solver = make_solver(name)
    before = dict(vars(solver)), dict(vars(type(solver)))
    sampler = Sampler(eps, solver=solver, schedule=COSINE, shape=(3,), steps=steps, grid=grid)
    first = sampler.run(range(5)).x
    promised = solver.evaluations(sampler.points)
    if solver.sequential:
        assert calls == [5] * promised
    else:
        assert sum(calls) <= 5 * promised
    assert torch.isfinite(first).all()
    assert torch.equal(sampler.run(range(5)).x, first)
    assert not torch.equal(sampler.run(range(5, 10)).x, first)
    assert (vars(solver), dict(vars(type(solver)))) == before


@pytest.mark.usefixtures("float64")
@SHORT
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", sorted(name for name, solver in SOLVERS.items() if solver.exact_on_a_point))
def test_exact_for_data_of_one_point(name: str, grid: str, steps: int) -> None:
    result = sample(
        point_mass(COSINE, MEAN), indices=range(20), solver=name, schedule=COSINE, shape=(3,), steps=steps, grid=grid
    )
    torch.testing.assert_close(result.x, MEAN.expand(20, 3), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("float64")
@SHORT
@pytest.mark.parametrize("schedule", [NoiseSchedule.edm(), NoiseSchedule.flow(3.0)], ids=["edm", "flow"])
@pytest.mark.parametrize("name", SOLVERS)
def test_other_paths(name: str, schedule: NoiseSchedule) -> None:
    """As many evaluations as promised, on all grids in few steps, from pure noise too; one point is hit."""
    calls: list[int] = []

    def eps(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return point_mass(schedule, MEAN)(x, t)

    for grid, steps in itertools.product(GRIDS, (1, 2, 5)):
        sampler = Sampler(eps, solver=name, schedule=schedule, shape=(3,), steps=steps, grid=grid)
        calls.clear()
        x = sampler.run(range(5)).x
        promised = sampler.solver.evaluations(sampler.points)
        assert sum(calls) == 5 * promised if sampler.solver.sequential else sum(calls) <= 5 * promised
        assert torch.isfinite(x).all()
        if sampler.solver.exact_on_a_point:
            assert (x - MEAN).abs().max() < 1e-6, (grid, steps)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("grid", GRIDS)
def test_euler_maruyama_ends_at_one_point_as_its_law_says(grid: str) -> None:
    """It is not exact there: its last step doubles the estimated noise, and leaves `sum of q` around the point.

    With eps = (y - x_0) / kappa a step is `y' - x_0 = (2 r - 1) (y - x_0) + noise`, r = kappa' / kappa.
    """
    steps, count = 30, 4000
    x = sample(
        point_mass(COSINE, MEAN),
        indices=range(count),
        batch_size=count,
        solver="euler_maruyama",
        schedule=COSINE,
        shape=(3,),
        steps=steps,
        grid=grid,
    ).x
    kappas = [COSINE.kappa(t).item() for t in TimeGrid.make(grid, COSINE, steps).times]
    variance, offset = 1 + kappas[0] ** 2, -MEAN
    for kappa, kappa_next in itertools.pairwise(kappas):
        factor = 2 * kappa_next / kappa - 1
        variance, offset = factor**2 * variance + kappa**2 - kappa_next**2, factor * offset
    spread = (x - MEAN - offset).square().mean().item()
    assert abs(spread / variance - 1) < 4 * math.sqrt(2 / (3 * count))


def test_solvers_are_found_by_name() -> None:
    """Every `name = "..."` in a file of the folder."""
    files = Path(solvers.__file__).parent.glob("*.py")
    written = [name for file in files for name in re.findall(r'^    name = "(\w+)"$', file.read_text(), re.MULTILINE)]
    assert sorted(SOLVERS) == sorted(written)
    assert all(solver.name == name for name, solver in SOLVERS.items())
    given = make_solver("heun")
    assert make_solver(given) is given
    with pytest.raises(ValueError, match=r"^solver must be one of .*ddim, ddpm, .*, got 'huen'; did you mean heun\?$"):
        make_solver("huen")
