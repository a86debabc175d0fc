"""The sampling loop: independence of the batch, the ledger, faults, precision, and options."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mlem.denoiser import NetworkDenoiser
from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.ledger import Ledger, LevelLedger
from mlem.noise import RESERVED, USER_INDICES, NoiseStream
from mlem.sampling import NonFiniteError, Sampler, blocks, sample
from mlem.schedule import NoiseSchedule
from mlem.solvers import SOLVERS, make_solver
from tests.problems import gaussian, level

COSINE = NoiseSchedule.cosine()
BARE = {"schedule": COSINE, "shape": (3,)}


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_does_not_know_its_batch(solver: str) -> None:
    """The starting noise bitwise, the image to 2e-5: convolutions may choose another algorithm."""
    model = level()
    options: dict[str, Any] = {"solver": solver, "steps": 8, "seed": 5, "return_noise": True}
    whole = sample(model, indices=range(32), batch_size=32, **options)
    assert whole.x_T is not None
    for batch_size, count in ((1, 4), (7, 32)):
        parts = sample(model, indices=range(count), batch_size=batch_size, **options)
        assert torch.equal(parts.x_T, whole.x_T[:count])
        torch.testing.assert_close(parts.x, whole.x[:count], rtol=1e-6, atol=2e-5)
    backwards = sample(model, indices=[31, 3], **options)
    torch.testing.assert_close(backwards.x, whole.x[[31, 3]], rtol=1e-6, atol=2e-5)


def test_seed_and_index_make_the_image() -> None:
    model = level()
    a, b = (sample(model, indices=range(4), steps=3, seed=seed).x for seed in (0, 1))
    assert not torch.allclose(a, b, atol=0.1)
    assert not torch.allclose(a[0], a[1], atol=0.1)


def modes(network: nn.Module) -> list[bool]:
    return [part.training for part in network.modules()]


@pytest.mark.parametrize("wrap", ["level", "module", "weak side of guidance"])
def test_sampling_leaves_no_trace(wrap: str) -> None:
    """Dropout on, train mode, one part frozen in eval: two runs are equal; modes, weights and RNG as before."""
    model: Any = level(dropout=0.5)
    network = model.network
    if wrap == "module":  # a module that is a denoiser by itself
        model, network = (module := Wrapped(network)), module
    elif wrap == "weak side of guidance":
        model = Family([level("s")]).guided(2.0, weak=model)
    network.train()
    next(iter(network.children())).eval()
    before = modes(network), [weight.clone() for weight in network.parameters()], torch.get_rng_state()
    options: dict[str, Any] = {"schedule": COSINE, "shape": (1, 8, 8), "indices": range(4), "steps": 4}
    runs = [sample(model, solver="ddpm", **options).x for _ in range(2)]
    assert torch.equal(*runs)
    assert modes(network) == before[0]
    assert any(before[0])
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(weight.grad is None for weight in network.parameters())


class Wrapped(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return NetworkDenoiser(self.inner, COSINE)(x, t)


def test_making_a_level_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    assert level(dropout=0.5).network.training
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_are_restored_after_an_error() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            raise KeyError("broken")

    broken = Broken().train()
    with pytest.raises(KeyError, match="broken"):
        sample(broken, indices=[0], **BARE)
    assert broken.training


# --- the ledger ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_ledger(solver: str) -> None:
    model = level()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.network(torch.zeros(1, 1, 8, 8), torch.zeros(1))
    result = sample(model, indices=range(10), batch_size=4, solver=solver, steps=5)
    ledger, cost = result.ledger, result.ledger.levels["xs"]
    evaluations = {"ddim": 5, "heun": 9}[solver]
    assert list(ledger.levels) == ["xs"]
    assert (ledger.images, ledger.evaluations) == (10, evaluations)
    assert cost.calls == cost.expected_calls == 10 * evaluations
    assert cost.flops == 10 * evaluations * counter.get_total_flops()
    assert 0 < cost.seconds == ledger.network_seconds <= ledger.wall_seconds
    written = json.loads(json.dumps(ledger.to_dict()))
    assert written["levels"]["xs"]["calls"] == 10 * evaluations
    assert written["evaluations"] == evaluations


def test_ledgers_add_up() -> None:
    total = Ledger()
    total.add(Ledger({"xs": LevelLedger(4, 4.0, 0.5, 100.0)}, 1.0, 2))
    total.add(Ledger({"xs": LevelLedger(2, 2.0, 0.25, 50.0), "s": LevelLedger(1, 1.0, 1.0, 7.0)}, 2.0, 1))
    assert total.levels == {"xs": LevelLedger(6, 6.0, 0.75, 150.0), "s": LevelLedger(1, 1.0, 1.0, 7.0)}
    assert (total.wall_seconds, total.images, total.evaluations) == (3.0, 3, 7 / 3)
    assert Ledger().evaluations == 0


# --- faults --------------------------------------------------------------------------------------------------------


def poisoned(bad_start: Tensor, bad_t: float) -> Any:
    """The Gaussian denoiser, but NaN at times from `bad_t` down for the sample that began at `bad_start`."""
    rows: list[int] = []

    def eps(x: Tensor, t: Tensor) -> Tensor:
        if t[0] == 1:
            rows[:] = torch.isclose(x, bad_start).all(1).nonzero().flatten().tolist()
        out = gaussian(COSINE)(x, t)
        if t[0] <= bad_t:
            out[rows] = float("nan")
        return out

    return eps


def test_a_nan_is_named_and_the_others_are_kept() -> None:
    bad = NoiseStream(0, "start").normal(torch.tensor([13]), [0], (3,), torch.float32)[0, 0]
    options: dict[str, Any] = {"indices": range(10, 18), "batch_size": 4, "steps": 10, "grid": "uniform", **BARE}
    options["return_noise"] = True
    good = sample(gaussian(COSINE), **options)
    with pytest.raises(NonFiniteError) as caught:
        sample(poisoned(bad, 0.65), **options)
    message, result = str(caught.value), caught.value.result
    # times are 1, 0.9, .., and 0.6 is where step 5 begins
    assert message.startswith("sample 13 became NaN or infinite at step 5 of 10 (t = 0.6), level model; 1 of 4 samples")
    assert "\n" not in message
    assert caught.value.indices == [10, 11, 12, 14, 15, 16, 17]
    kept = [index - 10 for index in caught.value.indices]
    torch.testing.assert_close(result.x, good.x[kept])
    assert torch.equal(result.x_T, good.x_T[kept])
    # looking for the step takes a second run; the ledger counts the first alone
    assert (result.ledger.images, result.ledger.evaluations) == (8, 10)
    assert result.ledger.network_seconds <= result.ledger.wall_seconds


def test_the_level_is_named() -> None:
    model = level("xs")
    with torch.no_grad():
        model.network.conv_out.bias.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match=r"^sample 3 .* at step 1 of 5 \(t = 1\), level xs; 2 of 2") as caught:
        sample(model, indices=[3, 4], steps=5)
    assert caught.value.indices == []
    assert caught.value.result.x.shape == (0, 1, 8, 8)


def test_a_nan_that_does_not_come_again_is_still_an_error() -> None:
    left = [1]

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return x * float("nan") if left and left.pop() else x

    with pytest.raises(NonFiniteError, match=r"^sample 0 became NaN or infinite"):
        sample(eps, indices=range(2), steps=3, **BARE)


# --- precision -----------------------------------------------------------------------------------------------------


def test_bf16_stays_close() -> None:
    model = level()
    seen: list[torch.dtype] = []
    model.network.conv_in.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    options: dict[str, Any] = {"indices": range(8), "steps": 10}
    full = sample(model, **options)
    assert set(seen) == {torch.float32}
    seen.clear()
    half = sample(model, precision="bf16", **options)
    assert set(seen) == {torch.bfloat16}
    assert half.x.dtype == torch.float32
    error = (half.x - full.x).square().mean().sqrt() / full.x.std()
    assert 0 < error < 0.02


@pytest.mark.usefixtures("float64")
def test_float64_when_that_is_the_default() -> None:
    model = level()
    result = sample(model, indices=range(3), steps=4, return_noise=True)
    assert result.x.dtype == result.x_T.dtype == torch.float64
    torch.set_default_dtype(torch.float32)
    model.network.float()
    single = sample(model, indices=range(3), steps=4, return_noise=True)
    assert torch.equal(single.x_T, result.x_T.float())
    torch.testing.assert_close(single.x, result.x.float(), rtol=0, atol=1e-4)


# --- options -------------------------------------------------------------------------------------------------------


def test_noise_is_returned_when_asked_for() -> None:
    expected = NoiseStream(9, "start").normal(torch.tensor([4, 2]), [0], (3,), torch.float32)[0]
    options: dict[str, Any] = {"indices": [4, 2], "seed": 9, "steps": 2, **BARE}
    assert torch.equal(sample(gaussian(COSINE), return_noise=True, **options).x_T, expected)
    assert sample(gaussian(COSINE), **options).x_T is None


def test_a_level_of_a_family_is_chosen() -> None:
    family = Family([level("xs"), level("s")])
    options: dict[str, Any] = {"indices": range(2), "steps": 2}
    largest, small = sample(family, **options), sample(family, level="xs", **options)
    assert (list(largest.ledger.levels), list(small.ledger.levels)) == (["s"], ["xs"])
    assert torch.equal(small.x, sample(family.level("xs"), **options).x)


def test_a_solver_may_be_given_as_an_object() -> None:
    options: dict[str, Any] = {"indices": range(2), "steps": 3, **BARE}
    by_name, by_object = (sample(gaussian(COSINE), solver=s, **options).x for s in ("heun", make_solver("heun")))
    assert torch.equal(by_name, by_object)


def test_a_grid_may_be_given_as_an_object() -> None:
    grid = TimeGrid("own", (1.0, 0.6, 0.25, 0.0))
    own = sample(gaussian(COSINE), indices=range(3), solver="ddim", grid=grid, **BARE)
    assert own.ledger.evaluations == 3
    halves = TimeGrid.make("uniform", COSINE, 2)
    a = sample(gaussian(COSINE), indices=range(3), solver="ddim", grid=halves, **BARE).x
    b = sample(gaussian(COSINE), indices=range(3), solver="ddim", steps=2, grid="uniform", **BARE).x
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="times must fall strictly"):
        TimeGrid("own", (1.0, 0.6, 0.6, 0.0))


def test_progress_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    sample(gaussian(COSINE), indices=range(6), batch_size=4, steps=2, progress=True, **BARE)
    assert "6/6 images" in re.sub(r"\x1b\[[0-9;?]*\w", "", capsys.readouterr().out)


def test_blocks() -> None:
    assert blocks(range(7), 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert blocks(torch.tensor([5, 2]), 64) == [[5, 2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "dimm"}, "solver must be one of .*, got 'dimm'; did you mean ddim?"),
        ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
        ({"steps": -1}, "steps must be a whole number >= 1, got -1"),
        ({"steps": 2.5}, "steps must be a whole number >= 1, got 2.5"),
        ({"steps": 1001, "grid": "trailing"}, "steps must be in [1, 1000] on the trailing grid, got 1001"),
        ({"grid": "even"}, "grid must be one of .*, got 'even'"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ({"level": "xs"}, "level='xs' chooses within a family, but the model is not a Family; leave out level"),
        ({"schedule": None}, "a bare denoiser does not know .*; pass schedule= and shape="),
        ({"shape": None}, "a bare denoiser does not know .*; pass schedule= and shape="),
        (
            {"schedule": NoiseSchedule.linear()},
            "schedule= is .*linear.*, but the model has .*cosine.*; leave out schedule",
        ),
        ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number >= 1, got 2.5"),
        ({"indices": []}, "indices must be distinct whole numbers >= 0, at least one; got 0 of them"),
        ({"indices": [0, -1]}, "indices must be distinct whole numbers .*"),
        ({"indices": [3, 3]}, "indices must be distinct whole numbers .*"),
        ({"indices": [0.5]}, "indices must be whole numbers >= 0: .*"),
    ],
    ids=str,
)
def test_bad_options_get_one_line(options: dict[str, Any], message: str) -> None:
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=f"^{pattern}$"):
        sample(gaussian(COSINE), **{"indices": range(2), "steps": 2, **BARE} | options)


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        (sample, {"stepz": 3}, "sample() has no argument 'stepz'; did you mean steps?"),
        (sample, {"sampler": "ddim"}, "sample() has no argument 'sampler'; did you mean "),
        (sample, {"quality": 3}, "sample() has no argument 'quality'; there are model, indices, solver, steps, seed, "),
        (Sampler, {"sheed": 3}, "Sampler() has no argument 'sheed'; did you mean seed?"),
        (Sampler, {"batch_size": 3}, "Sampler() has no argument 'batch_size'; there are model, solver, steps, "),
    ],
)
def test_a_misspelt_argument_names_the_nearest(call: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        call(gaussian(COSINE), **BARE, **options)


def test_every_argument_of_the_sampler_is_one_of_sample() -> None:
    sampler, front = (inspect.signature(one).parameters for one in (Sampler.__init__, sample))
    for name, parameter in sampler.items():
        if name != "self":
            assert front[name] == parameter


@pytest.mark.parametrize("use", RESERVED)
def test_reserved_indices_are_refused(use: str) -> None:
    """What was fitted is never applied to the noise that it was fitted to."""
    first, last = RESERVED[use].start, RESERVED[use].stop - 1
    for index in (first, last):
        says = f"^indices must be in \\[0, 1000000000\\), got {index}: those above are reserved \\(calibration, "
        with pytest.raises(ValueError, match=says):
            sample(gaussian(COSINE), indices=[0, index], steps=2, **BARE)
        with pytest.raises(ValueError, match=says):
            Sampler(gaussian(COSINE), steps=2, **BARE).run([index])
        with pytest.raises(ValueError, match=says):
            blocks([index], 4)
    assert sample(gaussian(COSINE), indices=[USER_INDICES[-1]], steps=2, **BARE).x.isfinite().all()


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^level must be one of xs, got 'xl'$"):
        sample(Family([level("xs")]), indices=[0], level="xl")


# --- memory --------------------------------------------------------------------------------------------------------


def peak_growth(small: str, large: str) -> float:
    """MiB by which the peak memory of a fresh process rises from running `small` to running `large`."""
    code = f"""
    import resource, torch
    from mlem.sampling import Sampler, blocks
    from mlem.schedule import NoiseSchedule
    from mlem.grids import TimeGrid
    torch.set_num_threads(1)
    def run(solver, steps, images, shape, batch):
        model = lambda x, t: 0.1 * x
        sampler = Sampler(model, solver=solver, steps=steps, shape=shape, schedule=NoiseSchedule.cosine())
        for block in blocks(range(images), batch):
            sampler.run(block)
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    run({small})
    before = peak()
    run({large})
    print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.parametrize("solver", ["ddpm", "dpm_solver_pp"])
def test_memory_is_flat_in_steps(solver: str) -> None:
    """One tensor of the batch is 0.4 MiB: keeping one for each step would add 150 MiB."""
    batch = "(3, 64, 64), 8"
    assert peak_growth(f"{solver!r}, 20, 8, {batch}", f"{solver!r}, 400, 8, {batch}") < 40


def test_memory_is_flat_in_samples() -> None:
    """An image is 0.2 MiB: keeping the images of every block would add 84 MiB."""
    batch = "(3, 128, 128), 16"
    assert peak_growth(f"'ddim', 2, 64, {batch}", f"'ddim', 2, 512, {batch}") < 40


@pytest.mark.parametrize(
    ("schedule", "grid", "says"),
    [
        (
            NoiseSchedule.linear(num_timesteps=100),
            None,
            r"^the schedule ends at t = 1 with a signal of alpha\^2 = 0\.36 ",
        ),
        (
            NoiseSchedule.cosine(log_snr_min=-1.0),
            None,
            r"^the schedule ends at t = 1 with a signal of alpha\^2 = 0\.27 ",
        ),
        (COSINE, "leading", r"^the grid begins at t = 0\.801 with a signal of alpha\^2 = 0\.\d+ "),
    ],
)
def test_a_start_that_is_not_pure_noise_is_warned_of(schedule: NoiseSchedule, grid: str | None, says: str) -> None:
    with pytest.warns(UserWarning, match=says):
        Sampler(gaussian(schedule), schedule=schedule, shape=(3,), steps=5, grid=grid)


def test_betas_that_are_rescaled_end_in_pure_noise() -> None:
    """As `docs/solvers.md` says; `filterwarnings = error` makes a warning a failure."""
    schedule = NoiseSchedule.linear(0.001, 0.2, 100)
    assert schedule.alpha(1.0).square() < 1e-4
    Sampler(gaussian(schedule), schedule=schedule, shape=(3,), steps=5)
