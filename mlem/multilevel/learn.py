"""Learning alpha_k and beta_k: an unbiased gradient of the error and the cost of multilevel sampling.

    J(alpha, beta) = E |x_0^ML - x_0^ref|^2 / d + weight E[cost],   p_k(t) = sigmoid(alpha_k u(t) + beta_k)

x^ML is sampled with the jump estimator (weights B_k / p_k), x^ref is the many-step run of the largest level from the
same noise, and cost is a share of what the largest level would cost at every evaluation. Level 1 is certain and not
learned. With bernoulli coins the gradient has three parts:

- pathwise, through the weights B_k / p_k: forward-mode differentiation of the whole trajectory, so that memory does not
  grow with the number of steps. Either all 2 (K - 1) directions, or one random direction v for each draw of the coins,
  `(directional derivative) v` (Baydin et al., arXiv:2202.08587);
- score function: `(error - baseline) sum_i (B_k - p_k) dlogit p_k`, the baseline being the mean error of the other
  draws (Kool et al., 2019), which leaves it unbiased;
- cost, by its formula.

Learn with bernoulli coins, sample with systematic ones: both have means p_k and the same expected cost. Systematic
coins of a level all hang on one uniform number: a change of p moves the rows at which they fall, all at once, and a
score function of this simple form, a sum over rows, they do not have.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlem.brownian import BrownianPath
from mlem.denoiser import Denoiser, NetworkDenoiser
from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.multilevel.coefficients import CERTAIN, Coefficients, feature
from mlem.multilevel.coins import COINS, coins_called
from mlem.multilevel.plan import collect
from mlem.multilevel.planner import make_plan
from mlem.multilevel.spec import PlanSpec
from mlem.noise import NoiseStream
from mlem.schedule import NoiseSchedule
from mlem.solvers import EvaluationPoint, GridPoint, Solver, make_solver, model_input, quadrature_weights

TANGENTS = ("exact", "random")
"""Directions of the pathwise part: all of them, or a random one for each draw."""
LARGEST = 0.99
"""Where learning begins no p_k is larger: a coin that is certain to fall teaches nothing."""
_BERNOULLI = COINS["bernoulli"]


@dataclass(frozen=True)
class GradientEstimate:
    """One draw of the gradient. mse: (D,), of each draw of the coins. cost: expected share. gradient: (2, K - 1)."""

    mse: Tensor
    cost: float
    gradient: Tensor


class Objective:
    """J for some denoisers, a solver and a grid; theta is (2, K - 1): alpha and beta of levels 2 .. K.

    denoisers: cheapest first; networks among them must not be in channels_last (see `frozen`). shape: of one sample.
    costs: (K,), of one evaluation of each level, the largest being 1. seed: of the noise of the samples, which is that
    of `Sampler`, and of coins and directions. Raises ValueError for a single denoiser.
    """

    def __init__(
        self,
        denoisers: Sequence[Denoiser],
        schedule: NoiseSchedule,
        shape: Sequence[int],
        solver: Solver,
        grid: TimeGrid,
        costs: Tensor,
        *,
        seed: int = 0,
    ) -> None:
        if len(denoisers) < 2:
            raise ValueError(
                "coefficients share out levels, and this family has one; train another: model.levels=[xs,s]"
            )
        self.denoisers, self.schedule, self.shape = tuple(denoisers), schedule, tuple(shape)
        self.solver, self.grid, self.costs, self.seed = copy.copy(solver), grid, costs.double(), seed
        self.points = GridPoint.of(schedule, grid)
        self.times = [point.t for point in quadrature_weights(self.solver, self.schedule, self.points)[1]]
        """Times of the evaluations: R."""
        self.feature = feature(schedule, self.times)
        self._coins, self._directions = NoiseStream(seed, "learning/coins"), NoiseStream(seed, "learning/directions")

    @property
    def levels(self) -> int:
        """K."""
        return len(self.denoisers)

    def coefficients(self, theta: Tensor) -> Coefficients:
        """theta with the first level, which is certain."""
        first = torch.tensor([[0.0], [CERTAIN]], dtype=torch.float64)
        alpha, beta = torch.cat([first, theta.detach().double().cpu()], 1)
        return Coefficients(alpha, beta)

    def probabilities(self, theta: Tensor) -> Tensor:
        """p: (R, K), differentiable in theta."""
        learned = torch.sigmoid(theta[0] * self.feature[:, None] + theta[1]).clamp(min=1e-9)
        return torch.cat([torch.ones_like(learned[:, :1]), learned], 1)

    def cost(self, theta: Tensor) -> Tensor:
        """Expected cost of a sample as a share of the largest level's, scalar, differentiable.

        Level k runs if coin k or coin k + 1 fell. (That weights of two fallen coins cancel where p_k = p_(k+1) exactly
        is left out: `Plan.expected_cost` knows it, and it has no derivative.)
        """
        p = self.probabilities(theta)
        q = torch.cat([p[:, 1:], torch.zeros_like(p[:, :1])], 1)
        return ((p + q - p * q) @ self.costs).mean() / self.costs[-1]

    def cost_gradient(self, theta: Tensor) -> Tensor:
        """Gradient of `cost` by its formula: (2, K - 1)."""
        p = self.probabilities(theta)
        costs, above = self.costs / self.costs[-1], torch.cat([p[:, 2:], torch.zeros_like(p[:, :1])], 1)
        by_p = costs[1:] * (1 - above) + costs[:-1] * (1 - p[:, :-1])
        return self._back(by_p * p[:, 1:] * (1 - p[:, 1:])) / len(p)

    def _back(self, by_logit: Tensor) -> Tensor:
        """From a derivative by the logits (.., R, K - 1) to one by theta (.., 2, K - 1)."""
        return torch.stack([(by_logit * self.feature[:, None]).sum(-2), by_logit.sum(-2)], -2)

    def toss(self, theta: Tensor, step: int, draws: int) -> Tensor:
        """Bernoulli coins of this optimizer step, the same on all ranks: (D, R, K) int64."""
        p = self.probabilities(theta.detach())
        keys = torch.arange(step * draws, (step + 1) * draws)
        uniforms = self._coins.uniform(keys, range(_BERNOULLI.uniforms(p)), torch.float64).T
        return _BERNOULLI.counts(p, uniforms)

    def directions(self, step: int, draws: int) -> Tensor:
        """A random sign for each coefficient and draw, the same on all ranks: (D, 2, K - 1)."""
        keys = torch.arange(step * draws, (step + 1) * draws)
        uniforms = self._directions.uniform(keys, range(2 * (self.levels - 1)), torch.float64)
        return (2 * (uniforms < 0.5).double() - 1).T.reshape(draws, 2, self.levels - 1)

    def weights(self, counts: Tensor, p: Tensor) -> Tensor:
        """Collected weights of the levels: counts (.., R, K) and p (R, K) -> (.., R, K)."""
        return collect(counts / p)

    def weight_tangents(self, counts: Tensor, p: Tensor, direction: Tensor) -> Tensor:
        """Derivative of `weights` along `direction` (.., 2, K - 1): `d(B/p) = -B (1 - p) / p dlogit p`."""
        by_logit = direction[..., :1, :] * self.feature[:, None] + direction[..., 1:, :]  # (.., R, K - 1)
        moved = -counts[..., 1:] * (1 - p[:, 1:]) / p[:, 1:] * by_logit
        return collect(torch.cat([torch.zeros_like(moved[..., :1]), moved], -1))

    def start(self, indices: Tensor) -> Tensor:
        """The noise that samples begin with: indices (N,) -> (N, *shape)."""
        return NoiseStream(self.seed, "start").normal(indices, [0], self.shape, torch.get_default_dtype())[0]

    def reference(self, indices: Tensor, steps: int | None = None) -> Tensor:
        """x_0 of the largest level, in float64: indices (N,) -> (N, *shape).

        steps: of the solver's reference; None: of the solver and grid themselves, which is p = 1 throughout.
        """
        solver, points = self.solver, self.points
        if steps is not None:
            solver = make_solver(solver.reference)
            points = GridPoint.of(self.schedule, solver.grid(self.schedule, steps))

        def eps(y: Tensor, place: EvaluationPoint) -> Tensor:
            return self.denoisers[-1](*model_input(self.schedule, y, place)).double()

        return self._solve(solver, eps, points, indices)

    def samples(self, weights: Tensor, counts: Tensor, indices: Tensor) -> Tensor:
        """x_0: weights and counts (D, R, K), sample indices (D, B) -> (D, B, *shape), float64.

        Differentiable in weights, forward and in reverse. A level runs on the draws whose coins paid for it.
        """
        draws, size = indices.shape
        paid = counts.bool().cpu()
        # a level of weight 0 whose neighbours both fell runs too: its weight may have a derivative
        runs = paid | torch.cat([paid[..., 1:], torch.zeros_like(paid[..., :1])], -1)
        # copied to the device before the first step, not while a step waits
        draws_of = [[one.nonzero().flatten().to(indices.device) for one in row.unbind(1)] for row in runs.unbind(1)]
        row = iter(range(weights.shape[1]))

        def eps(y: Tensor, place: EvaluationPoint) -> Tensor:
            i = next(row)
            x, t = (part.view(draws, size, *part.shape[1:]) for part in model_input(self.schedule, y, place))
            total = torch.zeros_like(x)
            for k, denoiser in enumerate(self.denoisers):
                some = draws_of[i][k]
                if len(some):
                    output = denoiser(x[some].flatten(0, 1), t[some].flatten()).view(-1, size, *self.shape)
                    weight = weights[:, i, k][some].view(-1, 1, *[1] * len(self.shape))
                    total = total.index_add(0, some, output * weight)
            return total.flatten(0, 1)

        return self._solve(self.solver, eps, self.points, indices.flatten()).view(draws, size, *self.shape)

    def _solve(
        self, solver: Solver, eps: Callable[[Tensor, EvaluationPoint], Tensor], points: list[GridPoint], indices: Tensor
    ) -> Tensor:
        path = BrownianPath(self.schedule, self.seed, indices, self.shape, torch.get_default_dtype())
        y = self.start(indices).double() / points[0].alpha
        return solver.integrate(eps, y, points, path, indices, self.seed) * points[-1].alpha

    def errors(self, weights: Tensor, counts: Tensor, indices: Tensor, truth: Tensor) -> Tensor:
        """Mean squared difference to the truth (D, B, *shape): (D, B)."""
        return (self.samples(weights, counts, indices) - truth).square().flatten(2).mean(2)

    def estimate(
        self, theta: Tensor, counts: Tensor, indices: Tensor, truth: Tensor, weight: float, directions: Tensor | None
    ) -> GradientEstimate:
        """J and an unbiased estimate of its gradient.

        counts: (D, R, K), from `toss`, D >= 2. indices: (B,) of the samples, all with the same draws; truth:
        (B, *shape). weight: of the cost. directions: (D, 2, K - 1), or None for exact derivatives.
        """
        theta = theta.detach().double().cpu()
        mse, pathwise = self.differentiate(theta, counts, indices, truth, directions)
        return GradientEstimate(mse, self.cost(theta).item(), self.assemble(theta, counts, mse, pathwise, weight))

    def assemble(self, theta: Tensor, counts: Tensor, mse: Tensor, pathwise: Tensor, weight: float) -> Tensor:
        """The gradient (.., 2, K - 1) from D >= 2 draws.

        counts (.., D, R, K), mse (.., D) and pathwise (.., D, 2, K - 1). Linear in mse and pathwise: the mean over
        ranks that share their coins is the gradient for all their samples together.
        """
        others = (mse.sum(-1, keepdim=True) - mse) / (mse.shape[-1] - 1)
        score = self._back(counts[..., 1:] - self.probabilities(theta)[:, 1:])
        by_chance = (mse - others)[..., None, None] * score
        return (pathwise + by_chance).mean(-3) + weight * self.cost_gradient(theta)

    def differentiate(
        self, theta: Tensor, counts: Tensor, indices: Tensor, truth: Tensor, directions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Errors (D,) and their derivatives through the weights (D, 2, K - 1), forward mode; see `estimate`."""
        p = self.probabilities(theta)
        if directions is not None:
            mse, slopes = self._forward(counts, p, directions[None], indices, truth)
            return mse, slopes[0, :, None, None] * directions
        basis = torch.eye(theta.numel(), dtype=torch.float64).view(-1, 1, *theta.shape)
        mse, slopes = self._forward(counts, p, basis, indices, truth)
        return mse, slopes.T.reshape(-1, *theta.shape)

    @torch.no_grad()
    def _forward(
        self, counts: Tensor, p: Tensor, directions: Tensor, indices: Tensor, truth: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Errors (D,) and their derivatives along directions (V, D or 1, 2, K - 1): (V, D)."""
        device = truth.device
        weights = self.weights(counts, p).to(device)
        tangents = self.weight_tangents(counts, p, directions).to(device)
        indices, truth = indices.expand(len(counts), -1), truth.expand(len(counts), *truth.shape)

        def error(weights: Tensor) -> Tensor:
            return self.errors(weights, counts, indices, truth).mean(1)

        def along(tangent: Tensor) -> tuple[Tensor, Tensor]:
            return torch.func.jvp(error, (weights,), (tangent,))  # type: ignore[return-value]

        with warnings.catch_warnings():
            # torch compiles its rules of forward mode with what it has deprecated
            warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
            if len(tangents) == 1:
                mse, slope = along(tangents[0])
                return mse.cpu(), slope[None].cpu()
            # the trajectory itself has no batch of directions: it is run once
            mse, slopes = torch.func.vmap(along, out_dims=(None, 0))(tangents)  # type: ignore[arg-type]
            return mse.cpu(), slopes.cpu()

    def weight_for(self, theta: Tensor, indices: Tensor, counts: Tensor) -> float:
        """The weight of the cost at which J is near stationary when all beta are shifted alike.

        To first order the coins add a variance `V = sum_i v_i (1/p_i - 1)`, and `dV/dbeta = -V`. So the weight is V
        over the derivative of the cost; V is measured as the mean squared difference to the run with p = 1. counts:
        (D, R, K) for samples with these indices (B,). The spending that theta stands for is thus about kept, and
        learning moves it between levels and times.
        """
        p = self.probabilities(theta.detach())
        with torch.no_grad():
            plain = self.reference(indices)
            several = indices.expand(len(counts), -1)
            weights = self.weights(counts, p).to(plain.device)
            variance = self.errors(weights, counts, several, plain.expand(len(counts), *plain.shape)).mean().item()
        return variance / self.cost_gradient(theta.detach())[1].sum().item()

    def held_out(self, theta: Tensor, coins: str, indices: Tensor, truth: Tensor, plans: int) -> Tensor:
        """Error of each sample (N,) with coins of its own, on average over `plans` plans: (N,) float64 on the CPU.

        The same seeds and indices use the same uniform numbers whatever theta: made for differences.
        """
        p = self.probabilities(theta.detach())
        found = []
        with torch.no_grad():
            for plan in range(plans):
                counts = coins_called(coins).toss(p, self.seed * plans + plan, indices)
                weights = self.weights(counts, p).to(truth.device)
                found.append(self.errors(weights, counts, indices[:, None], truth[:, None])[:, 0].cpu())
        return torch.stack(found).mean(0)


def frozen(family: Family, device: str | torch.device = "cpu") -> list[NetworkDenoiser]:
    """Copies of the levels for forward mode: in eval mode, without gradients, and in contiguous memory format.

    (torch's group norm has no forward mode in channels_last.) The family's own networks stay as they are.
    """
    denoisers = []
    for level in family.levels:
        network = copy.deepcopy(level.network).eval().requires_grad_(False)
        network.to(device=device, memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        denoisers.append(NetworkDenoiser(network, level.schedule, level.prediction))
    return denoisers


def first_coefficients(family: Family, solver: Solver, grid: TimeGrid, budget: float) -> Tensor:
    """Where learning begins, theta (2, K - 1): near the probabilities that `budget` buys.

    They are the calibrated ones, or those of the theory's law when the family is not calibrated. budget: share of the
    largest level's cost, in (0, 1], in FLOPs. Raises ValueError when it is too small.
    """
    law = "calibrated" if family.fitted.has("calibration") else "theory"
    names = tuple(family.names)
    spec = PlanSpec(budget=budget, probabilities=law, estimator="jump", coins="bernoulli", cost="flops", levels=names)
    table = make_plan(spec, family, solver, grid).probabilities.clone()
    table[:, 1:].clamp_(max=LARGEST)
    times = [point.t for point in quadrature_weights(solver, family.schedule, GridPoint.of(family.schedule, grid))[1]]
    alpha, beta = Coefficients.fit(table, family.schedule, times)
    return torch.stack([alpha[1:], beta[1:]])


def interval(values: Tensor) -> tuple[float, float]:
    """Mean of independent values (N,), N >= 2, and half the width of its 95 % interval."""
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values))
