"""Log-concave sampling: laws on Gaussian targets and a logistic regression, keys, diagnostics, errors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.datasets import load_breast_cancer
from torch import Tensor

from mlem.logconcave import METHODS, Chains, default_step_size, sample
from tests.test_your_own_family import blocks

MEAN = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)


class Gaussian(NamedTuple):
    """N(MEAN, covariance), its precision with eigenvalues from 1 to L."""

    precision: Tensor
    covariance: Tensor

    @staticmethod
    def of(L: float) -> Gaussian:
        basis = torch.linalg.qr(torch.tensor([[1.0, 2, 3], [0, 1, 4], [5, 6, 0]], dtype=torch.float64)).Q
        precision = basis @ torch.diag(torch.tensor([1.0, math.sqrt(L), L], dtype=torch.float64)) @ basis.T
        return Gaussian(precision, torch.linalg.inv(precision))

    def gradient(self, x: Tensor) -> Tensor:
        return (x - MEAN) @ self.precision

    def twice_as_wide(self, chains: int) -> Tensor:
        z = torch.randn(chains, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return MEAN + math.sqrt(2) * z @ torch.linalg.cholesky(self.covariance).T


def unit(x: Tensor) -> Tensor:
    """grad V of N(0, I)."""
    return x


def run(steps: int = 3, chains: int = 2, gradient=unit, **options: Any) -> Chains:
    return sample(gradient, torch.ones(chains, 2), steps=steps, **{"m": 1, "L": 1, **options})


# --- laws ----------------------------------------------------------------------------------------------------------

# The step is in units of 1/sqrt(L). With the score frozen the variance of the stiffest mode is too large by a fourth
# of the (small) step; that must stay well below one standard error, sqrt(2 / chains).
PRECISE = {
    "randomized_midpoint": {"step_size": 0.4},
    "underdamped": {"step_size": 0.1},
    "parallel": {"step_size": 1.0, "points": 10, "rounds": 4},
}


@pytest.mark.parametrize("L", [1, 10, 100])
@pytest.mark.parametrize("method", METHODS)
def test_gaussian_targets(method: str, L: int) -> None:
    """Mean and covariance of independent chains within 4 standard errors, after a start twice as wide."""
    chains, target = 600, Gaussian.of(L)
    options = PRECISE[method] | {"step_size": PRECISE[method]["step_size"] / math.sqrt(L)}
    # excess variance decays at rate m / sqrt(L): by e^-4.5
    steps = round(4.5 * math.sqrt(L) / options["step_size"])
    x0 = target.twice_as_wide(chains)
    last = sample(target.gradient, x0, method=method, m=1, L=L, steps=1, warmup=steps, **options).x[:, 0].numpy()
    exact = target.covariance.numpy()
    variances = np.diag(exact)
    assert (np.abs(last.mean(0) - MEAN.numpy()) < 4 * np.sqrt(variances / chains)).all()
    error = np.sqrt((np.outer(variances, variances) + exact**2) / chains)
    assert (np.abs(np.cov(last.T) - exact) < 4 * error).all()


class Posterior(NamedTuple):
    """Weights of a logistic regression with prior N(0, I / 10): signed inputs, and moments with standard errors."""

    inputs: np.ndarray
    mode: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    mean_error: np.ndarray
    variance_error: np.ndarray


PRIOR = 10.0


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    """Moments by importance sampling: 40,000 draws of a Student t (8 degrees of freedom) around the mode.

    Self-normalised, with the Laplace approximation's covariance as scale; 37 percent of the draws are effective.
    """
    table, labels = load_breast_cancer(return_X_y=True)
    table = (table - table.mean(0)) / table.std(0)
    inputs = (2 * labels - 1.0)[:, None] * np.column_stack([np.ones(len(table)), table])
    d = inputs.shape[1]

    def potential(w: np.ndarray) -> np.ndarray:
        return np.logaddexp(0, -w @ inputs.T).sum(-1) + PRIOR / 2 * (w**2).sum(-1)

    def gradient(w: np.ndarray) -> np.ndarray:
        return PRIOR * w - expit(-w @ inputs.T) @ inputs

    mode = minimize(potential, np.zeros(d), jac=gradient, method="L-BFGS-B", options={"gtol": 1e-8}).x
    p = expit(inputs @ mode)
    scale = np.linalg.cholesky(np.linalg.inv(inputs.T @ ((p * (1 - p))[:, None] * inputs) + PRIOR * np.eye(d)))
    generator = np.random.default_rng(0)
    z = generator.standard_normal((40_000, d)) / np.sqrt(generator.chisquare(8, (40_000, 1)) / 8)
    w = mode + z @ scale.T
    log_weights = -potential(w) + (8 + d) / 2 * np.log1p((z**2).sum(1) / 8)
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    assert 1 / (weights**2).sum() > 10_000
    mean = weights @ w
    squares = (w - mean) ** 2
    variance = weights @ squares
    errors = np.sqrt(weights**2 @ squares), np.sqrt(weights**2 @ (squares - variance) ** 2)
    return Posterior(inputs, mode, mean, variance, *errors)


@pytest.mark.parametrize(
    ("method", "chains", "steps", "options"),
    [
        ("randomized_midpoint", 400, 160, {"step_size": 0.03}),
        ("underdamped", 150, 1000, {"step_size": 0.004}),
        ("parallel", 100, 100, {"step_size": 0.04, "points": 10, "rounds": 3}),
    ],
)
def test_logistic_regression(
    method: str, chains: int, steps: int, options: dict[str, Any], posterior: Posterior
) -> None:
    """Breast-cancer data, 31 weights: means and variances agree with importance sampling to 4 standard errors.

    From 0, where the Hessian is 12 times that at the mode. The standard errors are those of independent chains.
    """
    inputs = torch.from_numpy(posterior.inputs).float()

    def gradient(w: Tensor) -> Tensor:
        return PRIOR * w - torch.sigmoid(-w @ inputs.T) @ inputs

    start = torch.zeros(chains, inputs.shape[1])
    result = sample(gradient, start, method=method, steps=steps, warmup=steps, thin=10, friction=PRIOR, **options)
    x = result.x.double().numpy()
    means, squares = x.mean(1), ((x - posterior.mean) ** 2).mean(1)
    for chain, exact, error in (
        (means, posterior.mean, posterior.mean_error),
        (squares, posterior.variance, posterior.variance_error),
    ):
        z = (chain.mean(0) - exact) / np.sqrt(chain.var(0, ddof=1) / chains + error**2)
        assert np.abs(z).max() < 4
    if method == "randomized_midpoint":
        # sharp enough to tell the mean from the mode
        assert np.abs((means.mean(0) - posterior.mode) / (means.std(0) / math.sqrt(chains))).max() > 4


def test_default_steps_keep_their_promise() -> None:
    """On a Gaussian with L = 4 m every spread is right to `accuracy`, 0.1, and 4 standard errors."""
    chains, target = 1000, Gaussian.of(4)
    for method in METHODS:
        steps = round(4.5 * 2 / default_step_size(method, 1, 4))
        x0 = target.twice_as_wide(chains)
        last = sample(target.gradient, x0, method=method, m=1, L=4, steps=1, warmup=steps).x[:, 0].numpy()
        whitened = (last - MEAN.numpy()) @ np.linalg.cholesky(target.precision.numpy())
        assert np.abs(whitened.std(0) - 1).max() < 0.1 + 4 / math.sqrt(2 * chains)


# --- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_chain_depends_on_seed_and_index_alone(method: str) -> None:
    few, many = run(method=method, chains=2), run(method=method, chains=5)
    assert torch.equal(few.x, many.x[:2])
    assert torch.equal(few.x, run(method=method, chains=2).x)
    assert not torch.equal(few.x, run(method=method, chains=2, seed=1).x)
    assert not torch.equal(many.x[0], many.x[1])


def test_thinning_and_warmup_pick_from_one_path() -> None:
    whole = run(steps=12, warmup=0)
    assert torch.equal(run(steps=9, warmup=3, thin=2).x, whole.x[:, [4, 6, 8, 10]])
    assert torch.equal(run(steps=8).x, whole.x[:, 4:])


def test_parallel_is_underdamped_in_big_steps() -> None:
    """With a round for each point it is the same path: the same normals, in the same order."""
    small = run(steps=6, warmup=2, thin=2, method="underdamped", step_size=0.1)
    big = run(steps=3, warmup=1, method="parallel", step_size=0.2, points=2, rounds=2)
    torch.testing.assert_close(big.x, small.x)


# --- results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "gradients", "rounds"), [("randomized_midpoint", 2, 2), ("underdamped", 1, 1), ("parallel", 12, 3)]
)
def test_counts(method: str, gradients: int, rounds: int) -> None:
    """The gradients counted are those taken; parallel takes all points in one call."""
    calls = []

    def gradient(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x

    chains = run(steps=4, warmup=1, chains=3, method=method, gradient=gradient, points=4, rounds=3)
    assert chains.gradients == 5 * gradients == sum(calls) / 3
    assert chains.rounds == 5 * rounds == len(calls)


def test_shapes_dtypes_and_moments() -> None:
    chains = sample(unit, torch.zeros(3, 2, 2, dtype=torch.float64), steps=10, m=1, L=4, friction=1.5, thin=2)
    assert chains.x.shape == (3, 5, 2, 2)
    assert chains.x.dtype == torch.float64
    assert chains.friction == 1.5
    assert chains.step_size == default_step_size("randomized_midpoint", 1, 4)
    x = chains.x.numpy()
    np.testing.assert_allclose(chains.mean, x.mean((0, 1)))
    np.testing.assert_allclose(chains.std, x.reshape(15, 2, 2).std(0, ddof=1))
    np.testing.assert_allclose(chains.chain_mean, x.mean(1))
    np.testing.assert_allclose(chains.chain_std, x.std(1, ddof=1))
    assert run(step_size=0.1, L=None, m=None, friction=3.0).friction == 3
    assert run(L=9).friction == 6


def test_autograd_in_the_gradient() -> None:
    """grad V by autograd gives the same chains, and no graph is kept."""

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad((x**2).sum() / 2, x, create_graph=True)[0]

    chains = run(gradient=gradient)
    assert torch.equal(chains.x, run().x)
    assert not chains.x.requires_grad


def test_progress_is_shown_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert capsys.readouterr().out == ""
    run(progress=True)
    assert "sampling" in capsys.readouterr().out


# --- diagnostics ---------------------------------------------------------------------------------------------------


def autoregression(phi: float, chains: int, draws: int) -> Chains:
    """A stationary chain with correlations phi^n and variance 1, in the first of two elements; noise in the other."""
    z = torch.randn(chains, draws, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = z.clone()
    for i in range(1, draws):
        x[:, i, 0] = phi * x[:, i - 1, 0] + math.sqrt(1 - phi**2) * z[:, i, 0]
    return Chains(x, "underdamped", 0.1, 2.0, 1, draws, draws)


def test_ess_of_a_known_autocorrelation() -> None:
    """(1 - phi) / (1 + phi) of the draws, to 10 percent; all of them when independent."""
    draws = 4 * 5000
    ess = autoregression(0.8, 4, 5000).ess
    assert ess[0].item() == pytest.approx(draws / 9, rel=0.1)
    assert ess[1].item() == pytest.approx(draws, rel=0.1)


def test_rhat_sees_shift_and_width() -> None:
    """Near 1 for chains alike; above 1.1 when one is moved, or, by the folded ranks, when one is wider."""
    alike = autoregression(0.5, 4, 2000)
    assert alike.rhat.max() < 1.01
    factor = torch.ones(4, 1, 1, dtype=torch.float64)
    factor[0] = 5
    for x in (alike.x + factor - 1, alike.x * factor):
        assert dataclasses.replace(alike, x=x).rhat.min() > 1.1


def test_diagnostics_as_arviz() -> None:
    """R-hat, ESS and the groups of arrays, where arviz is installed; ties and short chains too."""
    arviz = pytest.importorskip("arviz")
    for draws in (4, 7, 50, 401):
        chains = autoregression(0.7, 3, draws)
        chains = dataclasses.replace(chains, x=torch.stack([chains.x, chains.x.round()], -1))
        groups = chains.to_arviz()
        data = arviz.from_dict(groups) if int(arviz.__version__.split(".")[0]) else arviz.from_dict(**groups)
        np.testing.assert_allclose(chains.rhat, arviz.rhat(data)["x"], rtol=1e-10)
        np.testing.assert_allclose(chains.ess, arviz.ess(data)["x"], rtol=1e-10)


def test_groups_for_arviz() -> None:
    groups = run(steps=6, thin=2, chains=4).to_arviz()
    assert groups["posterior"]["x"].shape == (4, 3, 2)
    assert {name: array.shape for name, array in groups["sample_stats"].items()} == {
        "step_size": (4, 3),
        "n_steps": (4, 3),
    }
    assert (groups["sample_stats"]["n_steps"] == 2).all()


def test_diagnostics_need_draws() -> None:
    with pytest.raises(ValueError, match="need >= 4 draws per chain, got 3"):
        _ = run(steps=3).rhat


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"step_size": 0.0}, "step_size must be a positive number, got 0.0"),
        ({"step_size": math.nan}, "step_size must be a positive number, got nan"),
        ({"friction": -1.0}, "friction must be a positive number, got -1.0"),
        ({"m": 0}, "m must be a positive number, got 0"),
        ({"m": 2, "L": 1}, "m must be <= L, got m=2 and L=1: they bound the Hessian from below and above"),
        ({"m": None}, "step_size is unknown: give step_size, or m and L, the bounds of the Hessian of V"),
        (
            {"L": None, "step_size": 0.1},
            "friction is unknown: give friction, or L, the upper bound of the Hessian of V",
        ),
        ({"method": "parralel"}, "method must be one of .*, got 'parralel'; did you mean parallel?"),
        ({"warmup": -1}, "warmup must be >= 0, got -1"),
        ({"thin": 0}, "thin must be >= 1, got 0"),
        ({"thin": 4}, "thin must be <= steps, got thin=4 and steps=3: nothing would be kept"),
        ({"points": 0}, "points must be >= 1, got 0"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message.replace('?', '[?]')}$"):
        run(**options)


def test_the_page_on_midpoints(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("docs/midpoints.md")[1], "docs/midpoints.md", "exec"), {})
    assert capsys.readouterr().out.startswith("torch.Size([64, 500, 10]) ")


def test_bad_starts() -> None:
    for x0 in (torch.zeros(5), torch.tensor(0.0), torch.zeros(0, 3)):
        with pytest.raises(
            ValueError, match=r"^x0 must be \(chains, \*shape\), got \(.*\): one chain is x0\[None\].*$"
        ):
            sample(unit, x0, steps=1, m=1, L=1)
    with pytest.raises(ValueError, match=r"^x0 must have a floating dtype, got torch.int64: pass x0.double\(\)$"):
        sample(unit, torch.zeros(2, 3, dtype=torch.int64), steps=1, m=1, L=1)


def test_bad_gradients() -> None:
    with pytest.raises(ValueError, match=r"^grad_potential must return the shape of x, \(2, 2\), got \(2,\)$"):
        run(gradient=lambda x: x.sum(1))
    calls = iter(range(100))

    def breaks(x: Tensor) -> Tensor:
        return torch.where((torch.arange(len(x)) == 1)[:, None] & (next(calls) == 4), math.nan, x)

    message = (
        "^chain 1 became NaN or infinite at step 5 of 8, as did 1 of 3 chains: grad_potential is not finite there, .*"
    )
    with pytest.raises(ValueError, match=message + "or step_size=0.1 is too large$"):
        run(steps=6, warmup=2, chains=3, gradient=breaks, method="underdamped", step_size=0.1)
    with pytest.raises(ValueError, match=r"^chain 0 became NaN or infinite at step .*step_size=100 is too large$"):
        run(steps=200, step_size=100.0, method="underdamped")
