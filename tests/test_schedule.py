"""Schedules and time grids: round trips, agreement with diffusers, and what is refused."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from mlem.grids import GRIDS, TimeGrid
from mlem.schedule import NUM_TIMESTEPS, PURE_NOISE, NoiseSchedule
from tests.problems import DIFFUSERS_CONFIGS, SCHEDULES

COORDINATES = ("ou_time", "alpha", "sigma", "kappa", "log_snr")
TIMES = torch.linspace(0, 1, 20 * NUM_TIMESTEPS + 1, dtype=torch.float64)
TIMESTEPS = torch.arange(1, NUM_TIMESTEPS + 1, dtype=torch.float64) / NUM_TIMESTEPS
COSINE = NoiseSchedule.cosine()


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return SCHEDULES[request.param]()


@pytest.mark.parametrize("name", COORDINATES)
def test_round_trip(schedule: NoiseSchedule, name: str) -> None:
    # sigma rounds to 1 near pure noise, and says no more there
    times = TIMES[schedule.kappa(TIMES) < 1e4] if name == "sigma" else TIMES
    back = getattr(schedule, f"time_from_{name}")(getattr(schedule, name)(times))
    torch.testing.assert_close(back, times, rtol=0, atol=1e-10)


@settings(deadline=None, derandomize=True)
@given(t=st.floats(0, 1))
def test_round_trip_of_any_time(t: float) -> None:
    for name in COORDINATES:
        back = getattr(COSINE, f"time_from_{name}")(getattr(COSINE, name)(t)).item()
        assert abs(back - t) <= 1e-10


def test_coordinates_agree(schedule: NoiseSchedule) -> None:
    t = TIMES[1:]
    s, alpha, sigma, kappa = schedule.ou_time(t), schedule.alpha(t), schedule.sigma(t), schedule.kappa(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-14)
    torch.testing.assert_close(s, -alpha.log(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(kappa, sigma / alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.log_snr(t), 2 * (alpha.log() - sigma.log()), rtol=1e-12, atol=1e-12)
    assert (kappa.diff() > 0).all()


def test_time_zero_is_clean(schedule: NoiseSchedule) -> None:
    assert schedule.alpha(0.0).item() == 1
    assert schedule.sigma(0.0).item() == schedule.kappa(0.0).item() == schedule.ou_time(0.0).item() == 0
    assert schedule.log_snr(0.0).item() == math.inf


def test_cosine_is_the_published_formula() -> None:
    """alpha_bar = f(t) / f(0), f = cos^2((t' + s) / (1 + s) pi / 2), with t' stretched to end at log-SNR -12."""
    schedule = NoiseSchedule.cosine(0.008, -12.0)
    assert schedule.log_snr(1.0).item() == pytest.approx(-12, abs=1e-10)
    t = np.linspace(0, 1, 101)
    start = 0.008 / 1.008 * np.pi / 2
    end = np.arccos(np.cos(start) / np.sqrt(1 + np.exp(12)))
    published = np.cos(start + t * (end - start)) / np.cos(start)
    np.testing.assert_allclose(schedule.alpha(torch.tensor(t)).numpy(), published, rtol=1e-12)


@pytest.mark.parametrize("name", DIFFUSERS_CONFIGS)
def test_from_diffusers_has_its_alphas_cumprod(name: str) -> None:
    config = {key: value for key, value in DIFFUSERS_CONFIGS[name].items() if key != "_class_name"}
    theirs = DDPMScheduler(**config).alphas_cumprod.double().clamp(min=1 / (1 + PURE_NOISE**2))
    ours = NoiseSchedule.from_diffusers(DIFFUSERS_CONFIGS[name]).alpha(TIMESTEPS) ** 2
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


def test_linear_is_that_of_diffusers() -> None:
    theirs = DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02).alphas_cumprod.double()
    # diffusers multiplies a thousand numbers in float32
    torch.testing.assert_close(NoiseSchedule.linear().alpha(TIMESTEPS) ** 2, theirs, rtol=1e-4, atol=0)


def test_a_saved_scheduler_config_is_read() -> None:
    saved = json.loads(DDIMScheduler(beta_schedule="squaredcos_cap_v2").to_json_string())
    short = NoiseSchedule.from_diffusers({"beta_schedule": "squaredcos_cap_v2"})
    torch.testing.assert_close(NoiseSchedule.from_diffusers(saved).alpha(TIMES), short.alpha(TIMES), rtol=0, atol=0)


@pytest.mark.parametrize("name", COORDINATES)
def test_float32_is_rounded_float64(schedule: NoiseSchedule, name: str) -> None:
    t = TIMES[1::97].float()
    got = getattr(schedule, name)(t)
    assert got.dtype == torch.float32
    assert torch.equal(got, getattr(schedule, name)(t.double()).float())
    back = getattr(schedule, f"time_from_{name}")
    assert torch.equal(back(got), back(got.double()).float())


@pytest.mark.parametrize("shape", [(), (1,), (0,), (5,), (2, 3), (2, 1, 4, 3)])
def test_any_shape(schedule: NoiseSchedule, shape: tuple[int, ...]) -> None:
    t = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name in COORDINATES:
        there = getattr(schedule, name)(t)
        assert there.shape == shape
        assert getattr(schedule, f"time_from_{name}")(there).shape == shape


@pytest.mark.parametrize(
    ("method", "value"),
    [
        *[(name, value) for name in COORDINATES for value in (-1e-6, 1.000001, math.nan, math.inf)],
        ("time_from_alpha", 1.1),
        ("time_from_alpha", -0.1),
        ("time_from_sigma", 1.1),
        ("time_from_sigma", -0.1),
        ("time_from_kappa", -0.1),
        ("time_from_ou_time", -0.1),
        ("time_from_log_snr", math.nan),
    ],
)
def test_out_of_range_is_refused(schedule: NoiseSchedule, method: str, value: float) -> None:
    for argument in (value, torch.tensor([0.5, value])):
        with pytest.raises(ValueError, match=r"^[\w ]+ must be in \[0, \w+\], got [-\w.]+$"):
            getattr(schedule, method)(argument)


def test_config_round_trip(schedule: NoiseSchedule) -> None:
    again = NoiseSchedule.from_config(json.loads(json.dumps(schedule.to_config())))
    assert again.to_config() == schedule.to_config()
    assert again.fingerprint == schedule.fingerprint
    assert torch.equal(again.kappa(TIMES), schedule.kappa(TIMES))


def test_fingerprints_tell_schedules_apart() -> None:
    made = [maker() for maker in SCHEDULES.values()] + [NoiseSchedule.cosine(0.01), NoiseSchedule.linear(2e-4)]
    assert len({schedule.fingerprint for schedule in made}) == len(made)


@pytest.mark.parametrize(
    ("config", "due"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_max": 50.0}, NoiseSchedule.edm(0.002, 50.0)),
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_min": 0.01}, NoiseSchedule.edm(0.01)),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, NoiseSchedule.flow(3.0)),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, NoiseSchedule.flow()),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 5.0},
            NoiseSchedule.flow(5.0),
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}, NoiseSchedule.flow()),
    ],
    ids=lambda given: given.get("_class_name") if isinstance(given, dict) else "",
)
def test_edm_and_flow_configs_are_read(config: dict[str, object], due: NoiseSchedule) -> None:
    assert NoiseSchedule.from_diffusers(config).to_config() == due.to_config()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "CosineDPMSolverMultistepScheduler", "sigma_min": 0.3}, "has no betas and is not an EDM"),
        ({"_class_name": "CMStochasticIterativeScheduler", "sigma_min": 0.002}, "has no betas and is not an EDM"),
        ({"_class_name": "FlowMapEulerDiscreteScheduler"}, "has no betas and is not an EDM"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "use_dynamic_shifting of FlowMatchEulerDiscreteScheduler depends on the image size",
        ),
    ],
)
def test_other_schedulers_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_diffusers(config)


def test_other_numbers_of_timesteps() -> None:
    """Timestep n of N is at (n + 1) / N, and the grids of timesteps have as many."""
    config = {"num_train_timesteps": 4000, "beta_schedule": "linear", "beta_start": 2.5e-5, "beta_end": 0.005}
    schedule, theirs = NoiseSchedule.from_diffusers(config), DDIMScheduler(**config, timestep_spacing="trailing")
    t = torch.arange(1, 4001, dtype=torch.float64) / 4000
    torch.testing.assert_close(schedule.alpha(t) ** 2, theirs.alphas_cumprod.double(), rtol=1e-10, atol=0)
    theirs.set_timesteps(7)
    ours = [round(4000 * t) - 1 for t in TimeGrid.make("trailing", schedule, 7).times[:-1]]
    assert ours == theirs.timesteps.tolist()
    assert TimeGrid.make("log_snr", schedule, 7).times[-2] == pytest.approx(1 / 4000, rel=1e-9)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_flow_grid_is_that_of_diffusers(shift: float, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.flow(shift)
    kappa = schedule.kappa(torch.tensor(TimeGrid.make("flow", schedule, steps).times, dtype=torch.float64))
    torch.testing.assert_close((kappa / (1 + kappa)).float(), scheduler.sigmas, rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps", [2, 18])
def test_the_karras_grid_of_edm_is_the_published_one(steps: int) -> None:
    """Eq. 5 of Karras et al., arXiv:2206.00364, with sigma_min 0.002, sigma_max 80 and rho 7."""
    schedule = NoiseSchedule.edm()
    kappa = schedule.kappa(torch.tensor(TimeGrid.make("karras", schedule, steps).times, dtype=torch.float64))
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    due = [(ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** 7 for i in range(steps)] + [0.0]
    torch.testing.assert_close(kappa, torch.tensor(due, dtype=torch.float64), rtol=1e-10, atol=0)


def test_pure_noise_is_infinity_to_float32() -> None:
    flow = NoiseSchedule.flow()
    assert flow.ends_in_noise
    assert not COSINE.ends_in_noise
    alpha, sigma = flow.scales(1.0)
    assert sigma.float() == 1
    assert (1000 * sigma / (alpha + sigma)).float() == 1000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseSchedule.cosine(offset=0), "offset must be positive, got 0"),
        (lambda: NoiseSchedule.cosine(log_snr_min=1), "log_snr_min must be in [-30, 0), got 1"),
        (lambda: NoiseSchedule.linear(beta_start=0.1, beta_end=0.01), "got 0.1 and 0.01"),
        (lambda: NoiseSchedule.from_diffusers({"trained_betas": [0.1, 0.0] * 500}), "betas <= 0"),
        (lambda: NoiseSchedule.edm(1.0, 0.5), "0 < sigma_min < sigma_max < 2^27, got 1.0 and 0.5"),
        (lambda: NoiseSchedule.flow(0.0), "shift of a flow must be in (0, 1000), got 0.0"),
        (
            lambda: NoiseSchedule.from_config({"kind": "sine"}),
            "cosine, linear, edm, flow, diffusers, got 'sine'",
        ),
        (lambda: NoiseSchedule.from_config({}), "got None"),
        (lambda: NoiseSchedule.from_config({"kind": []}), "one of cosine, linear, edm, flow, diffusers, got []"),
        (lambda: NoiseSchedule.from_config(["cosine"]), "an object with a kind, such as cosine, got ['cosine']"),
        (
            lambda: NoiseSchedule.from_config({"kind": "cosine", "ofset": 1}),
            "schedule cosine has no option 'ofset'; its options are offset, log_snr_min",
        ),
        (lambda: NoiseSchedule.from_config({"kind": "cosine", "offset": "a"}), "schedule cosine cannot be built ("),
        (lambda: NoiseSchedule.from_config({"kind": "linear", "num_timesteps": -1}), "schedule linear cannot be built"),
        (lambda: NoiseSchedule.from_config({"kind": "diffusers", "config": []}), "schedule diffusers cannot be built"),
        (
            lambda: NoiseSchedule.from_config({"kind": "diffusers", "config": {"beta_schedule": "sine"}}),
            "sine is not implemented",
        ),
    ],
)
def test_bad_schedules_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", GRIDS)
def test_grids_chain_exactly(schedule: NoiseSchedule, name: str) -> None:
    for steps in [*range(1, 61), 1000]:
        grid = TimeGrid.make(name, schedule, steps)
        assert grid.steps == steps == len(grid.times) - 1
        assert all(a > b for a, b in zip(grid.times, grid.times[1:], strict=False))
        assert grid.times[-1] == 0
        first = ((steps - 1) * (1000 // steps) + 1) / 1000 if name == "leading" else 1
        assert grid.times[0] == first


@pytest.mark.parametrize("steps", [2, 3, 10, 57])
@pytest.mark.parametrize(
    ("name", "coordinate", "power"), [("log_snr", "log_snr", 1), ("karras", "kappa", 1 / 7), ("uniform", None, 1)]
)
def test_grids_are_even_in_their_coordinate(
    schedule: NoiseSchedule, name: str, coordinate: str | None, power: float, steps: int
) -> None:
    times = torch.tensor(TimeGrid.make(name, schedule, steps).times, dtype=torch.float64)
    if coordinate is None:
        values = times
    else:
        assert times[-2].item() == pytest.approx(1 / NUM_TIMESTEPS, rel=1e-9)
        # from pure noise the first step goes further
        values = getattr(schedule, coordinate)(times[int(schedule.ends_in_noise) : -1]) ** power
    expected = torch.linspace(values[0].item(), values[-1].item(), len(values), dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["trailing", "leading"])
def test_discrete_grids_are_those_of_diffusers(name: str) -> None:
    schedule = NoiseSchedule.linear()
    for steps in [1, 2, 3, 7, 10, 24, 30, 50, 64, 99, 300, 999, 1000]:
        scheduler = DDIMScheduler(timestep_spacing=name)
        scheduler.set_timesteps(steps)
        ours = [round(1000 * t) - 1 for t in TimeGrid.make(name, schedule, steps).times[:-1]]
        assert ours == scheduler.timesteps.tolist()


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "10", None])
def test_bad_step_counts_are_refused(name: str, steps: object) -> None:
    with pytest.raises(ValueError, match=rf"^steps must be a whole number >= 1, got {re.escape(repr(steps))}$"):
        TimeGrid.make(name, COSINE, steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["trailing", "leading"])
def test_more_steps_than_timesteps_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^steps must be in \[1, 1000\] on the {name} grid, got 1001$"):
        TimeGrid.make(name, COSINE, 1001)


def test_unknown_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^grid must be one of uniform, .*, got 'even'$"):
        TimeGrid.make("even", COSINE, 10)


@pytest.mark.parametrize("times", [(), (1.0,), (0.5, 0.5), (0.2, 0.4), (1.1, 0.0), (0.5, -0.1), (1.0, math.nan)])
def test_bad_times_are_refused(times: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"^grid 'custom': times must fall strictly within \[0, 1\]"):
        TimeGrid("custom", times)
