"""The gradient of the learned coefficients: unbiased, equal to reverse mode on the same coins, flat in memory."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.level import Level
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.coefficients import CERTAIN, Coefficients
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.learning import (
    Objective,
    Response,
    first_coefficients,
    first_order,
    frozen,
    interval,
    law_path,
    nearest_coefficients,
    objective_for,
    optimal_path,
)
from mlem.multilevel.learning import objective as learning
from mlem.multilevel.learning.chance import CHANCES, Draws, segments
from mlem.multilevel.learning.optimum import least_variance, predicted_variance
from mlem.multilevel.plan import Plan
from mlem.multilevel.planner import make_plan
from mlem.multilevel.predict import Predictor
from mlem.multilevel.spec import PlanSpec
from mlem.networks import unet
from mlem.sampling import Sampler
from mlem.schedule import NoiseSchedule
from mlem.solvers import SOLVERS, make_solver
from tests.problems import mixture

SCHEDULE = NoiseSchedule.cosine()
WEIGHT = 60.0
DRAWS = 20_000


def perturbed(amount: float, frequency: float):
    """The exact denoiser of the mixture, with a smooth error."""
    exact = mixture(SCHEDULE)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return exact(x, t) + amount * torch.sin(frequency * x) * t[:, None]

    return eps


def objective(levels: int, steps: int, solver: str = "ddpm", knots: int = 0, coins: str = "bernoulli") -> Objective:
    """Levels with errors that halve, the last one exact; each costs four times the one below."""
    denoisers = [perturbed(0.4 / 2**k, 1.5 + k) for k in range(levels - 1)] + [mixture(SCHEDULE)]
    costs = 4.0 ** torch.arange(1 - levels, 1, dtype=torch.float64)
    grid = TimeGrid.make("log_snr", SCHEDULE, steps)
    return Objective(denoisers, SCHEDULE, (3,), make_solver(solver), grid, costs, seed=1, coins=coins, knots=knots)


def outcomes(coins: str, p: Tensor) -> tuple[Tensor, Tensor]:
    """All tables of two levels, and their probabilities, differentiable in p (R, 2)."""
    if coins == "systematic":
        chance, counts = segments(p[:, 1])
    else:
        counts = torch.tensor(list(itertools.product((0, 1), repeat=len(p))))
        chance = torch.where(counts.bool(), p[:, 1], 1 - p[:, 1]).prod(1)
    assert torch.isclose(chance.sum(), torch.ones((), dtype=torch.float64))
    return chance, torch.stack([torch.ones_like(counts), counts], -1)


def exact_gradient(problem: Objective, theta: Tensor, indices: Tensor, truth: Tensor) -> Tensor:
    """By autograd through all outcomes of the coins with their probabilities."""
    theta = theta.clone().requires_grad_()
    p = problem.probabilities(theta)
    chance, counts = outcomes(problem.coins, p)
    shape = (len(counts), *truth.shape)
    errors = problem.errors(problem.weights(counts, p), counts, indices.expand(len(counts), -1), truth.expand(shape))
    (chance * errors.mean(1)).sum().add(WEIGHT * problem.cost(theta)).backward()
    assert theta.grad is not None
    return theta.grad


THETA = torch.tensor([[-0.4], [-1.2]], dtype=torch.float64)


def some_response(problem: Objective) -> Response:
    """A quadratic form, of about the size of the errors of `objective(2, 4)`: any will do."""
    rows = len(problem.times)
    root = torch.randn(rows, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Response((1e-2 * root @ root.T).view(1, rows, 1, rows))


@pytest.mark.parametrize("controlled", [False, True])
@pytest.mark.parametrize(("coins", "kind"), [*itertools.product(("bernoulli", "systematic"), ("exact", "random"))])
@pytest.mark.usefixtures("float64")
def test_the_estimate_is_unbiased(coins: str, kind: str, controlled: bool) -> None:
    """The mean over 20,000 independent draws, taken in fours, against the enumerated gradient, in standard errors."""
    problem, indices = objective(2, 4, coins=coins), torch.arange(36, 38)  # whose parts are all well above the noise
    truth = problem.reference(indices, 50)
    expected = exact_gradient(problem, THETA, indices, truth)
    problem.response = some_response(problem) if controlled else None
    drawn = problem.draw(THETA, 0, DRAWS)
    directions = problem.directions(0, DRAWS) if kind == "random" else None
    mse, pathwise = problem.differentiate(THETA, drawn.counts, indices, truth, directions)
    errors = problem.table_errors(THETA, drawn, mse, indices, truth)

    def grouped(part: Tensor) -> Tensor:
        return part.view(DRAWS // 4, 4, *part.shape[1:])

    tables = None if drawn.tables is None else grouped(drawn.tables)
    fours = Draws(grouped(drawn.counts), tables, grouped(drawn.scores))
    along = None if directions is None else grouped(directions)
    found = problem.assemble(THETA, fours, grouped(errors), grouped(pathwise), WEIGHT, along)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - expected).abs() / error).max() < 4
    if controlled:  # by what is no prediction at all: noisy
        return
    # each of the three parts is needed for that: without it, the mean would be this far off
    coins_alone = problem.assemble(THETA, drawn, errors, torch.zeros_like(pathwise), 0.0)
    pathwise_alone = problem.assemble(THETA, drawn, torch.zeros_like(errors), pathwise, 0.0)
    for part in (pathwise_alone, coins_alone, WEIGHT * problem.cost_gradient(THETA)):
        assert (part / error).abs().max() > 4


@pytest.mark.parametrize("coins", ["bernoulli", "systematic"])
@pytest.mark.usefixtures("float64")
def test_the_means_of_linear_response_are_its_gradient(coins: str) -> None:
    """The parts of a quadratic form, against autograd through all outcomes; a certain row among them."""
    response = some_response(objective(2, 4))
    knotted = torch.tensor([[-0.4], [0.7], [-1.2]], dtype=torch.float64)
    for theta in (THETA, torch.tensor([[15.0], [24.0]], dtype=torch.float64), knotted):
        problem = objective(2, 4, coins=coins, knots=len(theta) - 2)
        free = theta.clone().requires_grad_()
        p = problem.probabilities(free)
        assert bool((p[:, 1] == 1).any()) == (theta[-1] > 0)
        chance, counts = outcomes(coins, p)
        (pathwise,) = torch.autograd.grad((chance.detach() * response(counts, p)).sum(), free, retain_graph=True)
        mean = (chance * response(counts, p)).sum()
        (whole,) = torch.autograd.grad(mean, free)
        found = problem.chance.expected(problem, theta, response.matrix)
        torch.testing.assert_close(found[0], mean.detach())
        torch.testing.assert_close(found[1], pathwise)
        torch.testing.assert_close(found[1] + found[2], whole)


@pytest.mark.parametrize("coins", ["bernoulli", "systematic"])
@pytest.mark.usefixtures("float64")
def test_a_prediction_that_is_right_leaves_little_variance(coins: str) -> None:
    """Errors that go as linear response says, of three levels, by 500 updates of eight draws."""
    problem, theta = objective(3, 6, coins=coins), torch.tensor([[-0.4, 0.5], [0.1, -0.6]], dtype=torch.float64)
    root = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    response = Response((root @ root.T).view(2, 6, 2, 6))
    drawn = problem.draw(theta, 0, 4000)
    p = problem.probabilities(theta)
    errors = 3 * response(drawn.counts[:, None] if drawn.tables is None else drawn.tables, p) + 1
    pathwise = 3 * response.slopes(problem, theta, drawn.counts)

    def grouped(part: Tensor) -> Tensor:
        return part.view(500, 8, *part.shape[1:])

    eights = Draws(*(None if part is None else grouped(part) for part in (drawn.counts, drawn.tables, drawn.scores)))
    spread: list[Tensor] = []
    due = 3 * sum(problem.chance.expected(problem, theta, response.matrix)[1:])
    for problem.response in (None, response):
        found = problem.assemble(theta, eights, grouped(errors), grouped(pathwise), 0.0)
        spread.append(found.var(0))
        assert ((found.mean(0) - due).abs() / (spread[-1] / len(found)).sqrt()).max() < 4
    assert spread[0].sum() / spread[1].sum() > (4 if coins == "bernoulli" else 0.9)


@pytest.mark.usefixtures("float64")
def test_the_first_order_gradient_is_exact_to_first_order() -> None:
    """Levels that differ by what x does not change: errors are quadratic in the weights.

    The mean over all tables of three levels, against autograd.
    """
    problem, indices = objective(3, 3, "ddim", knots=1), torch.arange(2)
    problem.denoisers = tuple(lambda x, t, k=k: 0.5 * x + 0.01 * k**2 * t[:, None] for k in range(3))
    theta = torch.tensor([[-0.4, 0.5], [0.7, 0.2], [0.3, -0.6]], dtype=torch.float64, requires_grad=True)
    plain, p = problem.reference(indices), problem.probabilities(theta)
    coins = torch.tensor(list(itertools.product((0, 1), repeat=6))).view(-1, 3, 2)
    chance = torch.where(coins.bool(), p[:, 1:], 1 - p[:, 1:]).flatten(1).prod(1)
    counts = torch.cat([torch.ones_like(coins[..., :1]), coins], -1)
    several, due = indices.expand(len(counts), -1), plain.expand(len(counts), *plain.shape)
    added = chance @ problem.errors(problem.weights(counts, p), counts, several, due).mean(1)
    (expected,) = torch.autograd.grad(added + WEIGHT * problem.cost(theta), theta)
    parts = [
        first_order(problem, theta, counts[i : i + 1], several[i : i + 1], due[i : i + 1], WEIGHT)
        for i in range(len(counts))
    ]
    found = sum(share * part.gradient for share, part in zip(chance.detach(), parts, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    mse = sum(share * part.mse for share, part in zip(chance.detach(), parts, strict=True))
    torch.testing.assert_close(mse, added.detach()[None])
    # what sets the size vanishes in the mean: the shape alone is the gradient
    assert (expected - WEIGHT * problem.cost_gradient(theta)).abs().max() > 1e-3


LINEAR = sorted(name for name, solver in SOLVERS.items() if solver.linear)


@pytest.mark.parametrize(("solver", "knots"), [*((name, 0) for name in LINEAR), ("ddpm", 3)])
@pytest.mark.usefixtures("float64")
def test_forward_mode_is_reverse_mode(solver: str, knots: int) -> None:
    """On the same coins, for three levels, exactly and along random directions."""
    problem, indices = objective(3, 6, solver, knots), torch.arange(3)
    theta = torch.tensor([[-0.4, 0.5], *[[0.2, -0.3]] * knots, [0.1, -0.6]], dtype=torch.float64)
    truth, counts = problem.reference(indices, 20), problem.draw(theta, 3, 4).counts
    reverse = reversed_gradients(problem, theta, counts, indices, truth)
    forward = problem.differentiate(theta, counts, indices, truth, None)[1]
    torch.testing.assert_close(forward, reverse, rtol=1e-8, atol=1e-8 * reverse.abs().max().item())
    directions = problem.directions(3, 4)
    assert directions.abs().eq(1).all()
    along = problem.differentiate(theta, counts, indices, truth, directions)[1]
    expected = (reverse * directions).sum((1, 2))[:, None, None] * directions
    torch.testing.assert_close(along, expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())


def reversed_gradients(problem: Objective, theta: Tensor, counts: Tensor, indices: Tensor, truth: Tensor) -> Tensor:
    """The pathwise part of each draw, by reverse mode: (D, 2, K - 1)."""
    theta = theta.clone().requires_grad_()
    weights = problem.weights(counts, problem.probabilities(theta))
    shape = (len(counts), *truth.shape)
    errors = problem.errors(weights, counts, indices.expand(len(counts), -1), truth.expand(shape)).mean(1)
    return torch.stack([torch.autograd.grad(error, theta, retain_graph=True)[0] for error in errors])


def family(*sizes: str) -> Family:
    torch.manual_seed(0)
    levels = [Level(size, unet(size, (1, 8, 8)), SCHEDULE, (1, 8, 8), data="noise") for size in sizes]
    for level in levels:
        for parameter in level.network.parameters():
            nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 else None
    return Family(levels)


@pytest.mark.usefixtures("float64")
def test_forward_mode_through_networks() -> None:
    """Networks in float64: as reverse mode; and the family's own stay as they were."""
    ours = family("xs", "s")
    ours.level("xs").network.train()
    before = copy.deepcopy([level.network.state_dict() for level in ours.levels])
    strides = [[part.stride() for part in level.network.parameters()] for level in ours.levels]
    problem = Objective(frozen(ours), SCHEDULE, (1, 8, 8), make_solver("ddpm"), log_snr(4), torch.ones(2), seed=2)
    indices = torch.arange(2)
    truth, counts = problem.reference(indices, 5), problem.draw(THETA, 0, 3).counts
    forward = problem.differentiate(THETA, counts, indices, truth, None)[1]
    reverse = reversed_gradients(problem, THETA, counts, indices, truth)
    torch.testing.assert_close(forward, reverse, rtol=1e-8, atol=1e-8 * reverse.abs().max().item())
    for level, state, stride in zip(ours.levels, before, strides, strict=True):
        assert [part.stride() for part in level.network.parameters()] == stride
        assert any(part.is_contiguous(memory_format=torch.channels_last) for part in level.network.parameters())
        assert all(part.requires_grad for part in level.network.parameters())
        assert all(torch.equal(part, state[name]) for name, part in level.network.state_dict().items())
    assert ours.level("xs").network.training


def log_snr(steps: int) -> TimeGrid:
    return TimeGrid.make("log_snr", SCHEDULE, steps)


def peak(steps: int, kind: str) -> int:
    """Most bytes alive at once, as the allocator of the CPU counts them."""
    problem, indices = objective(2, steps), torch.arange(300)
    wide = torch.ones(3, 64, dtype=torch.float64) / 64  # most of the memory is in the network, as usual
    problem.denoisers = tuple(lambda x, t, k=k: torch.tanh(x @ wide + k) @ wide.T * t[:, None] for k in range(2))
    truth, counts = torch.zeros(300, 3, dtype=torch.float64), problem.draw(THETA, 0, 2).counts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        if kind == "reverse":
            first_order(problem, THETA, counts, indices.expand(2, -1), truth.expand(2, *truth.shape), 1.0)
        else:
            problem.differentiate(THETA, counts, indices, truth, None)
    kineto = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in kineto.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(changes)))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the profiler
def test_memory_does_not_grow_with_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of forward mode; of reverse mode the states of the samples do, and the activations of networks do not."""
    peak(2, "forward")  # what is set up once
    # from 16 on the Brownian path holds what it draws at once
    assert peak(80, "forward") < 1.1 * peak(16, "forward")
    few, many = peak(4, "reverse"), peak(40, "reverse")
    monkeypatch.setattr(learning, "checkpoint", lambda run, *args, **_: run(*args))
    kept = peak(40, "reverse")
    assert kept > 5 * peak(4, "reverse")  # so that this is a measurement
    assert many - few < 0.2 * kept


def test_the_cost_is_that_of_a_plan_and_its_gradient_is_right() -> None:
    problem = objective(4, 7)
    theta = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.0, -1.5]], dtype=torch.float64)
    plan = Plan.draw(problem.probabilities(theta), "bernoulli")
    assert problem.cost(theta).item() == pytest.approx(plan.expected_cost(problem.costs) / 7, rel=1e-12)
    by_autograd = torch.autograd.grad(problem.cost(free := theta.clone().requires_grad_()), free)[0]
    torch.testing.assert_close(problem.cost_gradient(theta), by_autograd, rtol=1e-12, atol=1e-14)
    stored = problem.coefficients(theta)
    assert (stored.alpha[0], stored.beta[0]) == (0.0, CERTAIN)
    torch.testing.assert_close(stored.probabilities(SCHEDULE, problem.times), problem.probabilities(theta))


@pytest.mark.parametrize("coins", ["bernoulli", "systematic"])
def test_samples_are_those_of_the_sampler(coins: str) -> None:
    """The same noise, coins and weights as `sample(plan=...)`, each sample with coins of its own."""
    ours, indices = family("xs", "s"), torch.tensor([5, 3, 8])
    solver, grid = make_solver("ddpm"), log_snr(4)
    problem = Objective(frozen(ours), SCHEDULE, ours.shape, solver, grid, torch.tensor([0.25, 1.0]), seed=4)
    truth = problem.reference(indices, 6)
    sampler = Sampler(ours, solver="ddpm", grid=grid, seed=4, level="s")
    torch.testing.assert_close(problem.reference(indices).float(), sampler.run(indices.tolist()).x, rtol=0, atol=1e-4)
    for theta in (THETA, torch.full((2, 1), CERTAIN, dtype=torch.float64)):
        plan = Plan.draw(problem.probabilities(theta), coins, 4, per_sample=True)
        x = Sampler(ours, solver="ddpm", grid=grid, seed=4, plan=plan).run(indices.tolist()).x
        expected = (x - truth).square().flatten(1).mean(1)
        found = problem.held_out(theta, coins, indices, truth, 1)
        torch.testing.assert_close(found, expected.double(), rtol=1e-3, atol=0)


@pytest.mark.usefixtures("float64")
def test_the_weight_makes_the_beginning_near_stationary() -> None:
    """Where corrections are small, the derivative of J by a shift of all beta vanishes beside that of the cost."""
    problem, indices = objective(3, 16), torch.arange(4)
    problem.denoisers = (perturbed(0.01, 1.5), perturbed(0.005, 2.5), problem.denoisers[-1])
    theta = torch.tensor([[0.0, 0.0], [-0.5, -1.0]], dtype=torch.float64)
    # no discretisation error: its product with that of the coins has mean near 0, and would hide it
    truth, drawn = problem.reference(indices), problem.draw(theta, 0, 4000)
    several = indices.expand(4000, -1)
    weight = problem.weight_for(theta, drawn.counts, several, truth.expand(4000, *truth.shape))
    score = problem.estimate(theta, drawn, indices, truth, 0.0, None).gradient[1].sum()
    cost = weight * problem.cost_gradient(theta)[1].sum()
    assert abs(float(score / cost) + 1) < 0.25


def test_coins_and_directions_are_keyed_by_the_step() -> None:
    problem = objective(3, 6)
    theta = torch.zeros(2, 2, dtype=torch.float64)
    assert torch.equal(problem.draw(theta, 2, 3).counts, problem.draw(theta, 0, 9).counts[6:])
    assert torch.equal(problem.directions(2, 3), problem.directions(0, 9)[6:])
    counts = problem.draw(theta, 0, 4000).counts.double()
    assert (counts[..., 0] == 1).all()
    assert (counts[..., 1:].mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(4000)


def calibrated_family(*sizes: str) -> Family:
    ours = family(*sizes)
    return Family(ours.levels, Fitted(calibrate(ours, images=2, times=4)))


@pytest.fixture(scope="module")
def calibrated() -> Family:
    return calibrated_family("xs", "s", "m")


def test_learning_begins_near_what_the_budget_buys(calibrated: Family) -> None:
    ours = Family(calibrated.levels)
    problem = Objective(
        frozen(ours),
        SCHEDULE,
        ours.shape,
        make_solver("ddpm"),
        log_snr(32),
        torch.tensor([level.flops for level in ours.levels]),
    )
    levels, theta = first_coefficients(ours, make_solver("ddpm"), log_snr(32), 0.3)
    assert (levels, theta.shape) == (("xs", "s", "m"), (2, 2))
    assert problem.cost(theta).item() == pytest.approx(0.3, rel=0.02)
    # a budget that buys everything: nothing is certain, so that something can be learned
    _, everything = first_coefficients(ours, make_solver("ddpm"), log_snr(32), 1.0)
    assert problem.probabilities(everything)[:, 1:].max() < 0.995
    nearest = nearest_coefficients(calibrated, make_solver("ddpm"), log_snr(32), 0.3)
    assert problem.cost(nearest).item() == pytest.approx(0.3, rel=0.4)  # here a bell, which a sigmoid is not
    _, best = first_coefficients(calibrated, make_solver("ddpm"), log_snr(32), 0.3, levels=ours.names)
    assert problem.cost(best).item() == pytest.approx(0.3, abs=1e-6)
    assert (best[0] != theta[0]).all()
    with pytest.raises(ValueError, match=r"budget=0\.1 of 32 evaluations"):  # s alone costs a quarter
        first_coefficients(calibrated, make_solver("ddpm"), log_snr(32), 0.1, levels=("s", "m"))
    with pytest.raises(ValueError, match=r"budget=0\.001"):
        first_coefficients(ours, make_solver("ddpm"), log_snr(32), 0.001)


@pytest.fixture(scope="module")
def shipped() -> Family:
    return Family.load("pretrained:dead_leaves16")


@pytest.mark.parametrize("coins", ["bernoulli", "systematic"])
def test_levels_that_are_not_worth_their_cost_are_left_out(shipped: Family, coins: str) -> None:
    """The errors of the laws of all subsets, here of plans as `Predictor` predicts them, at equal cost."""
    solver, grid = make_solver("ddpm"), log_snr(16)
    predictor = Predictor(shipped.fitted.calibration_for(shipped), shipped.schedule, solver, grid)
    chosen: set[tuple[str, ...]] = set()
    for budget in (0.2, 0.35, 0.6):
        best, theta = first_coefficients(shipped, solver, grid, budget, 2, coins=coins)
        errors: dict[tuple[str, ...], float] = {}
        for levels in (("xs", "m", "l"), ("xs", "l"), ("m", "l")):
            if budget < shipped.level(levels[0]).flops / shipped.level().flops:
                continue
            law = objective_for(shipped, solver, grid, levels, knots=2)
            _, own = first_coefficients(shipped, solver, grid, budget, 2, levels)
            assert law.cost(own).item() == pytest.approx(budget, abs=1e-5)
            plan = Plan.draw(law.probabilities(own), "bernoulli", levels=levels)
            assert law.response is not None
            expected = {kind: CHANCES[kind](0).expected(law, own, law.response.matrix)[0].item() for kind in CHANCES}
            assert expected["bernoulli"] == pytest.approx(predictor.variance(plan), rel=1e-9)
            errors[levels] = expected[coins]
            assert levels != best or torch.equal(own, theta)
        assert best == min(errors, key=errors.__getitem__)
        chosen.add(best)
    assert len(chosen) > 1  # so that this is a choice


def test_the_path_takes_the_best_levels_at_each_cost(shipped: Family) -> None:
    solver, grid = make_solver("ddpm"), log_snr(16)
    path = law_path(shipped, solver, grid, points=6)
    assert len(path) > 3
    assert all(after.cost > before.cost and after.error < before.error for before, after in itertools.pairwise(path))
    assert len({point.levels for point in path}) > 1
    for point in path:
        levels, theta = first_coefficients(shipped, solver, grid, point.cost)
        assert levels == point.levels
        torch.testing.assert_close(theta, point.theta, rtol=0, atol=0.05)


def test_samples_of_some_levels_are_those_of_the_sampler(calibrated: Family) -> None:
    """Coefficients learned for a subset, saved in the family, and a plan made from them."""
    solver, grid, levels, indices = make_solver("ddpm"), log_snr(4), ("xs", "m"), torch.tensor([5, 3])
    problem = objective_for(calibrated, solver, grid, levels, seed=4)
    assert problem.costs.tolist() == [calibrated.level("xs").flops / calibrated.level("m").flops, 1.0]
    learned = problem.coefficients(THETA)
    kept = Coefficients(learned.alpha, learned.beta, levels, {"weights": calibrated.weights_hash})
    ours = Family(calibrated.levels, Fitted(coefficients=Coefficients.from_dict(kept.to_dict())))
    spec = PlanSpec(probabilities="learned", estimator="jump", coins="bernoulli", seed=4, per_sample=True)
    result = Sampler(ours, solver="ddpm", grid=grid, seed=4, plan=spec).run(indices.tolist())
    truth = problem.reference(indices, 6)
    expected = (result.x - truth).square().flatten(1).mean(1)
    found = problem.held_out(THETA, "bernoulli", indices, truth, 1)
    torch.testing.assert_close(found, expected.double(), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match=r"learned coefficients are for xs, m, got levels=xs, s, m"):
        make_plan(PlanSpec(probabilities="learned", estimator="jump", levels=ours.names), ours, solver, grid)


def test_laws_come_close_to_the_free_allocation() -> None:
    """Of a sharp peak that is to be measured at every row: p rises from 0.01 to 1 within eight of them."""
    problem = objective(2, 64, knots=8)
    x = torch.linspace(-8, 8, 64, dtype=torch.float64)
    worth = torch.exp(-x.square())[:, None] + 1e-6
    free = (worth.sqrt() / worth.sqrt().max() * 3).clamp(max=1)
    least = (worth * (1 / free - 1)).sum().item()
    cost = (0.25 * 64 + free.sum().item()) / 64
    start = torch.tensor([[0.0]] * 9 + [[-1.0]], dtype=torch.float64)
    theta = least_variance(problem, worth, start, cost)
    assert problem.cost(theta).item() == pytest.approx(cost, abs=1e-6)
    assert least < predicted_variance(problem, theta, worth) < 1.5 * least


@pytest.mark.parametrize("knots", [0, 2])
def test_the_path_is_the_least_error_plus_lambda_cost(knots: int) -> None:
    """Each point for its own lambda, against the others and against what is near; lambda is the slope of the curve."""
    problem = objective(3, 24, knots=knots)
    worth = torch.stack([torch.linspace(1, 9, 24).square(), torch.linspace(3, 1, 24)], 1).double()
    start = torch.tensor([*[[0.0, 0.0]] * (1 + knots), [-0.5, -1.5]], dtype=torch.float64)
    path = optimal_path(problem, worth, start, [0.5, 0.2, 0.3, 0.302, 0.7])
    assert [round(point.cost, 5) for point in path] == [0.2, 0.3, 0.302, 0.5, 0.7]
    for point in path:
        best = point.error + point.weight * point.cost
        assert all(other.error + point.weight * other.cost >= best for other in path)
        for seed in range(20):
            torch.manual_seed(seed)
            near = point.theta + 0.05 * torch.randn_like(start)
            assert predicted_variance(problem, near, worth) + point.weight * problem.cost(near) > best
    assert (path[1].error - path[2].error) / 0.002 == pytest.approx((path[1].weight + path[2].weight) / 2, rel=1e-2)


def test_the_start_is_where_no_other_law_of_the_same_cost_is_predicted_to_err_less() -> None:
    """On a made-up worth: its gradient is that of the cost, and what is near, at equal cost, is worse."""
    for knots in (0, 2):
        _check_optimum(objective(3, 24, knots=knots))


def _check_optimum(problem: Objective) -> None:
    worth = torch.stack([torch.linspace(1, 9, 24).square(), torch.linspace(3, 1, 24)], 1).double()
    start = torch.tensor([*[[0.0, 0.0]] * (1 + problem.knots), [-0.5, -1.5]], dtype=torch.float64)
    for cost in (0.3, 0.5):
        theta = least_variance(problem, worth, start, cost).requires_grad_()
        error, spent = predicted_variance(problem, theta, worth), problem.cost(theta)
        assert spent.item() == pytest.approx(cost, abs=1e-6)
        by, price = (torch.autograd.grad(value, theta)[0].flatten() for value in (error, spent))
        assert (by @ price / by.norm() / price.norm()).item() == pytest.approx(-1, abs=1e-4)
        for seed in range(20):
            torch.manual_seed(seed)
            other = theta.detach() + 0.1 * torch.randn_like(start)
            for _ in range(50):  # to the same cost, all betas alike
                other[-1] -= (problem.cost(other) - cost) / problem.cost_gradient(other)[-1].sum()
            assert predicted_variance(problem, other, worth) > error


def test_one_level_has_nothing_to_share() -> None:
    with pytest.raises(ValueError, match=r"one; train another: model.levels=\[xs,s\]"):
        objective(1, 4)


def test_learned_probabilities_that_are_not_there_name_the_command() -> None:
    spec = PlanSpec(probabilities="learned")
    with pytest.raises(ValueError, match=r"no learned coefficients: python train.py model=coefficients"):
        make_plan(spec, family("xs", "s"), make_solver("ddpm"), log_snr(4))


def test_learned_coefficients_make_a_plan() -> None:
    ours = family("xs", "s")
    alpha, beta = torch.tensor([0.0, 0.5]), torch.tensor([CERTAIN, -1.0])
    learned = Coefficients(alpha, beta, tuple(ours.names), {"weights": ours.weights_hash})
    ours.fitted = Fitted(coefficients=learned)
    plan = make_plan(PlanSpec(probabilities="learned", estimator="jump"), ours, make_solver("ddpm"), log_snr(4))
    assert (plan.probabilities[:, 0] == 1).all()
    assert (plan.probabilities[:, 1].diff() > 0).all()  # alpha > 0: more where the noise is low
    spec = PlanSpec(probabilities="learned", estimator="jump", delta=1.0)
    assert (make_plan(spec, ours, make_solver("ddpm"), log_snr(4)).probabilities[:, 1] > plan.probabilities[:, 1]).all()


def test_intervals() -> None:
    torch.manual_seed(0)
    means = [interval(torch.randn(400, dtype=torch.float64) + 3) for _ in range(400)]
    covered = sum(abs(mean - 3) < half for mean, half in means) / 400
    assert 0.91 < covered < 0.98
