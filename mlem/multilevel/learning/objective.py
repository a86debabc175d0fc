"""An unbiased gradient of the error and the cost of multilevel sampling, by alpha_k and beta_k.

    J(alpha, beta) = E |x_0^ML - x_0^ref|^2 / d + weight E[cost],   p_k(t) = sigmoid(alpha_k u(t) + beta_k)

x^ML is sampled with the jump estimator (weights B_k / p_k), x^ref is the many-step run of the largest level from the
same noise, and cost is a share of the largest level's cost at every evaluation. Level 1 is certain and not learned.
The gradient has three parts:

- pathwise, through the weights B_k / p_k: forward-mode differentiation of the whole trajectory, so that memory does not
  grow with the number of steps. Either all 2 (K - 1) directions, or one random direction v per draw of the coins,
  `(directional derivative) v` (Baydin et al., arXiv:2202.08587);
- through the distribution of the coins: errors times scores, see `chance.py`, for bernoulli and systematic coins;
- cost, in closed form, the same for both.

Draws of an update share samples, noise and path. With a calibration, the prediction of linear response for each draw is
the control variate of the first two parts: its means are known, and its factor is the slope over the other draws. The
mean error of the other draws is the baseline of the second part (Kool et al., 2019). Both keep the estimate unbiased.

`reverse.py` has a first-order gradient with far less noise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from mlem.conditions import Conditions
from mlem.denoiser import Conditional, Denoiser, of_rows
from mlem.grids import TimeGrid
from mlem.multilevel.coins import coins_called
from mlem.multilevel.learning.chance import CHANCES, Draws
from mlem.multilevel.learning.law import Law
from mlem.multilevel.learning.response import Response, others, slope
from mlem.schedule import NoiseSchedule
from mlem.solvers import EvaluationPoint, GridPoint, Solver, make_solver, model_input, quadrature_weights
from mlem.trajectory import samples, starting_noise, trajectory

__all__ = ["TANGENTS", "GradientEstimate", "Objective", "interval", "refuse_one_level"]

LEAST_FALL = 0.1
"""Least change of the coins' error for a shift of all beta: below it, kinks of systematic coins hide the trend."""
TANGENTS = ("reverse", "exact", "random")
"""How errors are differentiated: in reverse, see `reverse.py`; or forward, along all directions or a random one."""


@dataclass(frozen=True)
class GradientEstimate:
    """One draw of the gradient.

    mse: (D,), of each draw of the coins. cost: expected share. gradient: like theta. left: share of the variance of the
    coins' part that remains after its control variate, over the D draws; 1 without one.
    """

    mse: Tensor
    cost: float
    gradient: Tensor
    left: float


class Objective(Law):
    """J for some denoisers, a solver and a grid; theta is (2 + knots, K - 1): alpha and beta of levels 2 .. K.

    Args:
        denoisers: cheapest first; networks among them must not be in channels_last (see `frozen`).
        schedule, shape: of the denoisers; the shape of one sample.
        solver, grid: of sampling.
        costs: (K,), of one evaluation of each level, in any unit.
        seed: of the noise of the samples, as in `Sampler`, and of coins and directions.
        coins: "systematic" or "bernoulli", used for learning.
        response: the control variate, for this solver and grid.
        conditions: indices (N,) -> conditions of each denoiser.
        knots: of the features: a law piecewise linear in log-SNR, before the sigmoid.

    Raises: ValueError for a single denoiser, and for coins that do not support learning.
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
        coins: str = "bernoulli",
        response: Response | None = None,
        conditions: Callable[[Tensor], Sequence[Conditions]] | None = None,
        knots: int = 0,
    ) -> None:
        refuse_one_level(len(denoisers))
        if coins not in CHANCES:
            raise ValueError(f"coins must be one of {', '.join(CHANCES)} for learning, got {coins!r}")
        self.points = GridPoint.of(schedule, grid)
        asked = quadrature_weights(solver, schedule, self.points)[1]
        super().__init__(schedule, [point.t for point in asked], costs, seed, knots)
        self.denoisers, self.shape = tuple(denoisers), tuple(shape)
        self._conditions = conditions
        self.coins, self.chance, self.response = coins, CHANCES[coins](seed), response
        self.solver, self.grid = solver, grid

    def reference(self, indices: Tensor, steps: int | None = None) -> Tensor:
        """x_0 of the largest level, in float64: indices (N,) -> (N, *shape).

        steps: of the solver's reference; None: those of the solver and grid themselves, with p = 1 throughout.
        """
        solver, points = self.solver, self.points
        if steps is not None:
            solver = make_solver(solver.reference)
            points = GridPoint.of(self.schedule, solver.grid(self.schedule, steps))
        return samples(self._told(indices)[-1], solver, points, self.shape, indices, self.seed)

    def _told(self, indices: Tensor) -> Sequence[Denoiser]:
        """The denoisers with conditions of the samples with these indices (N,)."""
        if self._conditions is None:
            return self.denoisers
        pairs = zip(self.denoisers, self._conditions(indices), strict=True)
        return [one.given(own) if isinstance(one, Conditional) else one for one, own in pairs]

    def samples(self, weights: Tensor, counts: Tensor, indices: Tensor) -> Tensor:
        """x_0: weights and counts (D, R, K), sample indices (D, B) -> (D, B, *shape), float64.

        Differentiable in weights, forward and in reverse; in reverse, networks run again instead of keeping their
        activations. A level runs on the draws whose coins fell for it.
        """
        draws, size = indices.shape
        fell = counts.bool().cpu()
        # a level of weight 0 between two fallen coins also runs: its weight may have a derivative
        runs = fell | torch.cat([fell[..., 1:], torch.zeros_like(fell[..., :1])], -1)
        # copied to the device before the first step, not while a step waits
        draws_of = [[one.nonzero().flatten().to(indices.device) for one in row.unbind(1)] for row in runs.unbind(1)]
        row = iter(range(weights.shape[1]))
        flat = indices.flatten()
        told, places = self._told(flat), torch.arange(len(flat), device=flat.device).view(draws, size)

        def combined(x: Tensor, t: Tensor, weights: Tensor, draws_of: Sequence[Tensor]) -> Tensor:
            total = torch.zeros_like(x)
            for k, (denoiser, some) in enumerate(zip(told, draws_of, strict=True)):
                if len(some):
                    own = of_rows(denoiser, places[some].flatten())
                    output = own(x[some].flatten(0, 1), t[some].flatten()).view(-1, size, *self.shape)
                    weight = weights[:, k][some].view(-1, 1, *[1] * len(self.shape))
                    total = total.index_add(0, some, output * weight)
            return total.flatten(0, 1)

        def eps(y: Tensor, place: EvaluationPoint) -> Tensor:
            i = next(row)
            x, t = (part.view(draws, size, *part.shape[1:]) for part in model_input(self.schedule, y, place))
            own = weights[:, i]
            if not weights.requires_grad:
                return combined(x, t, own, draws_of[i])
            # without a fallen coin, weights do not depend on theta: gradients stop at the first row with one
            own = own if fell[:, i, 1:].any() else own.detach()
            args = (x, t, own, draws_of[i])
            return checkpoint(combined, *args, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]

        x_T = starting_noise(self.seed, flat, self.shape)
        x = trajectory(eps, self.solver, self.points, x_T, flat, self.seed)
        return x.view(draws, size, *self.shape)

    def errors(self, weights: Tensor, counts: Tensor, indices: Tensor, truth: Tensor) -> Tensor:
        """Mean squared difference to the truth (D, B, *shape): (D, B)."""
        return (self.samples(weights, counts, indices) - truth).square().flatten(2).mean(2)

    def draw(self, theta: Tensor, step: int, draws: int) -> Draws:
        """The coins of this optimizer step, the same on all ranks."""
        return self.chance.draw(self, theta.detach().double().cpu(), step, draws)

    def estimate(
        self, theta: Tensor, drawn: Draws, indices: Tensor, truth: Tensor, weight: float, directions: Tensor | None
    ) -> GradientEstimate:
        """J and an unbiased estimate of its gradient.

        drawn: D >= 2 draws. indices: (B,) of the samples, all with the same draws; truth: (B, *shape), the references.
        weight: of the cost. directions: (D, 2 + knots, K - 1), or None for exact derivatives.
        """
        theta = theta.detach().double().cpu()
        mse, pathwise = self.differentiate(theta, drawn.counts, indices, truth, directions)
        errors = self.table_errors(theta, drawn, mse, indices, truth)
        gradient = self.assemble(theta, drawn, errors, pathwise, weight, directions)
        return GradientEstimate(mse, self.cost(theta).item(), gradient, self._left(theta, drawn, errors))

    @torch.no_grad()
    def table_errors(self, theta: Tensor, drawn: Draws, mse: Tensor, indices: Tensor, truth: Tensor) -> Tensor:
        """Errors of the tables of draws whose counts have errors mse (D,): (D, T)."""
        if drawn.tables is None:
            return mse[:, None]
        counts = drawn.tables.flatten(0, 1)
        weights = self.weights(counts, self.probabilities(theta)).to(truth.device)
        several, same = indices.expand(len(counts), -1), truth.expand(len(counts), *truth.shape)
        return self.errors(weights, counts, several, same).mean(1).cpu().view(drawn.tables.shape[:2])

    def assemble(
        self,
        theta: Tensor,
        drawn: Draws,
        errors: Tensor,
        pathwise: Tensor,
        weight: float,
        directions: Tensor | None = None,
    ) -> Tensor:
        """The gradient (.., 2 + knots, K - 1) from D >= 2 draws.

        errors (.., D, T) and pathwise (.., D, 2 + knots, K - 1), along the directions. Affine in both: the mean over
        ranks with the same coins is the gradient for all their samples.
        """
        moved = self._moved(theta, drawn, errors, self.response)
        if self.response is not None:
            predicted, factor = self.response.slopes(self, theta, drawn.counts), self._factor(theta, drawn, errors)
            mean = self.chance.expected(self, theta, self.response.matrix)[1]
            if directions is not None:
                predicted = (predicted * directions).sum((-2, -1), keepdim=True) * directions
            pathwise = pathwise - factor * (predicted - mean)
        return (pathwise + moved).mean(-3) + weight * self.cost_gradient(theta)

    def _predicted(self, theta: Tensor, drawn: Draws, response: Response) -> Tensor:
        """Errors of the tables, predicted by linear response: (.., D, T)."""
        tables = drawn.counts.unsqueeze(-3) if drawn.tables is None else drawn.tables
        return response(tables, self.probabilities(theta))

    def _factor(self, theta: Tensor, drawn: Draws, errors: Tensor) -> Tensor:
        """Of the control variate: (.., D, 1, 1)."""
        assert self.response is not None
        mean = self.chance.expected(self, theta, self.response.matrix)[0]
        return slope(errors, self._predicted(theta, drawn, self.response), mean)[..., None, None]

    def _moved(self, theta: Tensor, drawn: Draws, errors: Tensor, response: Response | None) -> Tensor:
        """The coins' part of the gradient, for each draw: (.., D, 2 + knots, K - 1)."""
        count = errors.shape[-1] * (errors.shape[-2] - 1)

        def scored(values: Tensor) -> Tensor:
            return ((values - others(values)[..., None] / count)[..., None, None] * drawn.scores).sum(-3)

        # moving one systematic coin by a row is too small a change for linear response: it added noise
        if response is None or drawn.tables is not None:
            return scored(errors)
        due = self.chance.expected(self, theta, response.matrix)[2]
        return scored(errors) - self._factor(theta, drawn, errors) * (
            scored(self._predicted(theta, drawn, response)) - due
        )

    def _left(self, theta: Tensor, drawn: Draws, errors: Tensor) -> float:
        """See `GradientEstimate`."""
        left, whole = (self._moved(theta, drawn, errors, one).var(0).sum() for one in (self.response, None))
        return (left / whole).item() if whole > 0 else 1.0

    def differentiate(
        self, theta: Tensor, counts: Tensor, indices: Tensor, truth: Tensor, directions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Errors (D,) and their derivatives through the weights (D, 2 + knots, K - 1), forward mode; see `estimate`."""
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
        """Errors (D,) and their derivatives along directions (V, D or 1, 2 + knots, K - 1): (V, D)."""
        device = truth.device
        weights = self.weights(counts, p).to(device)
        tangents = self.weight_tangents(counts, p, directions).to(device)
        indices, truth = indices.expand(len(counts), -1), truth.expand(len(counts), *truth.shape)

        def error(weights: Tensor) -> Tensor:
            return self.errors(weights, counts, indices, truth).mean(1)

        def along(tangent: Tensor) -> tuple[Tensor, Tensor]:
            with sdpa_kernel(SDPBackend.MATH):  # the only attention kernel with a forward mode
                return torch.func.jvp(error, (weights,), (tangent,))  # type: ignore[return-value]

        with warnings.catch_warnings():
            # torch compiles its forward-mode rules with deprecated functions of its own
            warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
            if len(tangents) == 1:
                mse, slope = along(tangents[0])
                return mse.cpu(), slope[None].cpu()
            # the trajectory itself has no batch of directions: it runs once
            mse, slopes = torch.func.vmap(along, out_dims=(None, 0))(tangents)  # type: ignore[arg-type]
            return mse.cpu(), slopes.cpu()

    def weight_for(self, theta: Tensor, counts: Tensor, indices: Tensor, plain: Tensor) -> float:
        """The weight of the cost at which J is near stationary when all beta are shifted alike.

        To first order bernoulli coins add a variance `V = sum_i v_i (1/p_i - 1)`, and `dV/dbeta = -V`; for systematic
        coins linear response predicts the decrease of V, and without it the same is assumed. So the weight is the
        decrease of V over the derivative of the cost; V is measured as the mean squared difference to the run with
        p = 1. counts: (D, R, K) for samples with these indices (D, B), and plain (D, B, *shape) their runs with p = 1.
        This roughly keeps the cost of theta, and learning moves it between levels and times.
        """
        p = self.probabilities(theta.detach())
        with torch.no_grad():
            weights = self.weights(counts, p).to(plain.device)
            variance = self.errors(weights, counts, indices, plain).mean().item()
        fall = 1.0
        if self.response is not None:
            mean, pathwise, chance = self.chance.expected(self, theta.detach().double(), self.response.matrix)
            # learned coins can be certain, and then add nothing
            fall = -((pathwise + chance)[-1].sum() / mean).item() if mean > 0 else 1.0
        return max(fall, LEAST_FALL) * variance / self.cost_gradient(theta.detach())[-1].sum().item()

    def held_out(self, theta: Tensor, coins: str, indices: Tensor, truth: Tensor, plans: int) -> Tensor:
        """Error of each sample (N,) with its own coins, averaged over `plans` plans: (N,) float64 on the CPU.

        Seeds and indices fix the uniform numbers, whatever theta: common random numbers for paired differences.
        """
        p = self.probabilities(theta.detach())
        found: list[Tensor] = []
        with torch.no_grad():
            for plan in range(plans):
                counts = coins_called(coins).toss(p, self.seed * plans + plan, indices)
                weights = self.weights(counts, p).to(truth.device)
                found.append(self.errors(weights, counts, indices[:, None], truth[:, None])[:, 0].cpu())
        return torch.stack(found).mean(0)


def refuse_one_level(count: int) -> None:
    """Raise ValueError for a single level."""
    if count < 2:
        raise ValueError(
            "coefficients need several levels, but this family has one; train another: model.levels=[xs,s]"
        )


def interval(values: Tensor) -> tuple[float, float]:
    """Mean of independent values (N,), N >= 2, and half the width of its 95 % interval."""
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values))
