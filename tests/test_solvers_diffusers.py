"""Solvers against diffusers: the same network, betas, timesteps and starting noise, in float32.

The network predicts v: then samples stay of order 1, and an absolute tolerance means something.
"""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from mlem.brownian import BrownianPath
from mlem.grids import TimeGrid
from mlem.interop.diffusers import DiffusersSolver
from mlem.level import Level
from mlem.sampling import Sampler, sample
from mlem.schedule import NoiseSchedule
from mlem.solvers import GridPoint, make_solver, quadrature_weights
from mlem.solvers.ddpm import ancestral_noise
from mlem.trajectory import noise_estimate, trajectory
from tests.problems import DEVIATIONS, level, uneven_gaussian

# diffusers 0.42 hands tensors to numpy, which numpy 2 will not like one day
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SCHEDULE = NoiseSchedule.from_diffusers(BETAS)
COMMON = {**BETAS, "prediction_type": "v_prediction"}
BATCH = 3


@functools.cache
def small() -> Level:
    return level(schedule=SCHEDULE)


def network(x: Tensor, timestep: Any) -> Tensor:
    return small().network.eval()(x, timestep).sample


def run_diffusers(scheduler: Any, steps: int, x_T: Tensor, **extra: Any) -> Tensor:
    """The plain loop of a diffusers pipeline."""
    scheduler.set_timesteps(steps)
    # every scheduler means unit noise; those in y with trailing timesteps would scale it by kappa, not 1 / alpha
    own = x_T if float(scheduler.init_noise_sigma) == 1 else x_T / GridPoint.of(SCHEDULE, trailing(steps))[0].alpha
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            x = scheduler.scale_model_input(own, timestep)
            own = scheduler.step(network(x, timestep), timestep, own, **extra).prev_sample
    return own


def trailing(steps: int) -> TimeGrid:
    return TimeGrid.make("trailing", SCHEDULE, steps)


def ours(solver: str, steps: int, grid: str | None = "trailing", **options: Any) -> tuple[Tensor, Tensor]:
    """Samples and the noise that they began with."""
    result = sample(
        small(), indices=range(BATCH), solver=solver, steps=steps, grid=grid, return_noise=True, seed=1, **options
    )
    assert result.x_T is not None
    assert 0.1 < result.x.std() < 10
    return result.x, result.x_T


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("spacing", "steps"), [("trailing", 10), ("trailing", 50), ("leading", 10), ("leading", 50), ("leading", 1000)]
)
def test_ddim(spacing: str, steps: int) -> None:
    """At 1,000 steps both spacings visit every timestep."""
    x, x_T = ours("ddim", steps, spacing)
    scheduler = DDIMScheduler(**COMMON, timestep_spacing=spacing, set_alpha_to_one=True, clip_sample=False)
    assert_same(x, run_diffusers(scheduler, steps, x_T))


@pytest.mark.parametrize("steps", [10, 50])
def test_heun(steps: int) -> None:
    x, x_T = ours("heun", steps)
    assert_same(x, run_diffusers(HeunDiscreteScheduler(**COMMON, timestep_spacing="trailing"), steps, x_T))


def multistep(algorithm: str) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        **COMMON,
        timestep_spacing="trailing",
        algorithm_type=algorithm,
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
    )


@pytest.mark.parametrize("steps", [2, 10, 20, 50])
def test_dpm_solver_pp(steps: int) -> None:
    x, x_T = ours("dpm_solver_pp", steps)
    assert_same(x, run_diffusers(multistep("dpmsolver++"), steps, x_T))


@pytest.mark.parametrize("steps", [2, 3, 10, 50])
@pytest.mark.parametrize(("name", "order"), [("unipc", 2), ("unipc_3", 3)])
def test_unipc(name: str, order: int, steps: int) -> None:
    x, x_T = ours(name, steps)
    scheduler = UniPCMultistepScheduler(**COMMON, timestep_spacing="trailing", solver_order=order)
    assert_same(x, run_diffusers(scheduler, steps, x_T))


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_sde_dpm_solver_pp_on_our_noise(steps: int) -> None:
    x, x_T = ours("dpm_solver_pp_sde", steps)
    scheduler, own = multistep("sde-dpmsolver++"), x_T
    scheduler.set_timesteps(steps)
    path = BrownianPath(SCHEDULE, 1, torch.arange(BATCH), (1, 8, 8), torch.float32)
    points = GridPoint.of(SCHEDULE, trailing(steps))
    with torch.no_grad():
        for timestep, here, there in zip(scheduler.timesteps, points, points[1:], strict=False):
            scale = there.kappa * (1 - (there.kappa / here.kappa) ** 2) ** 0.5
            z = ancestral_noise(path, here, there) / (scale or 1.0)
            own = scheduler.step(network(own, timestep), timestep, own, variance_noise=z).prev_sample
    assert_same(x, own)


class NoNoise(BrownianPath):
    """A path that stays at 0."""

    def at(self, t: float) -> Tensor:
        return torch.zeros(())


@pytest.mark.parametrize("steps", [10, 50, 1000])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 0.9, 1.0])
def test_one_ddpm_step(steps: int, place: float) -> None:
    """The mean and the (fixed small) variance of `p(x' | x)`, from two draws of diffusers with known noise."""
    points = GridPoint.of(SCHEDULE, trailing(steps))
    i = round(place * (steps - 1))
    here, there = points[i], points[i + 1]
    scheduler = DDPMScheduler(**COMMON, timestep_spacing="trailing", variance_type="fixed_small", clip_sample=False)
    scheduler.set_timesteps(steps)
    timestep = scheduler.timesteps[i]
    z = [torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    with torch.no_grad():
        v = network(z[2], timestep)
        draws = [
            scheduler.step(v, timestep, z[2], generator=torch.Generator().manual_seed(seed)).prev_sample
            for seed in range(2)
        ]
    deviation = ((draws[0] - draws[1]) / (z[0] - z[1])).median().item()

    def eps(y: Tensor, point: GridPoint) -> Tensor:
        return small().denoiser(y * point.alpha, torch.full((4,), point.t))

    with torch.no_grad():
        path = NoNoise(SCHEDULE, 0, torch.arange(4), (1, 8, 8), torch.float32)
        mean = make_solver("ddpm").step(eps, z[2] / here.alpha, None, here, there, path)[0] * there.alpha
    assert_same(mean, draws[0] - deviation * z[0])
    ours = there.alpha * there.kappa * (1 - (there.kappa / here.kappa) ** 2) ** 0.5
    assert deviation == pytest.approx(ours, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("steps", [10, 50])
def test_the_adapter_runs_ddim_as_we_do(steps: int) -> None:
    assert_same(ours("diffusers:DDIMScheduler", steps, None)[0], ours("ddim", steps)[0])


def test_the_adapter_runs_dpm_solver_pp_as_we_do() -> None:
    assert_same(ours("diffusers:DPMSolverMultistepScheduler", 20, None)[0], ours("dpm_solver_pp", 20)[0])


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "UniPCMultistepScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
    ],
)
def test_adapter_samples_do_not_know_their_batch(name: str) -> None:
    options = {"solver": f"diffusers:{name}", "steps": 7, "indices": range(5), "seed": 2}
    whole, alone = (sample(small(), batch_size=size, **options).x for size in (5, 1))
    assert torch.isfinite(whole).all()
    assert_same(whole, alone)
    assert not torch.allclose(whole, sample(small(), **options | {"seed": 3}).x, atol=0.1)


def test_adapter_samples_have_noise_of_their_own() -> None:
    sampler = Sampler(small(), solver="diffusers:DDPMScheduler", steps=3)
    points = GridPoint.of(SCHEDULE, sampler.grid)
    seeds = [
        generator.initial_seed()
        for seed in (0, 1)
        for generator in sampler.solver.init(points, torch.arange(5), seed)[2]
    ]
    assert len(set(seeds)) == 10


@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_what_each_estimate_adds_is_known_of_deterministic_schedulers(name: str) -> None:
    """So that plans can be searched for them: any estimates, added with these weights, are the result."""
    solver = DiffusersSolver(name)
    points = GridPoint.of(SCHEDULE, solver.grid(SCHEDULE, 6))
    weights, asked = quadrature_weights(solver, SCHEDULE, points)
    assert solver.coupled
    assert asked == points[:-1]
    eps = iter(torch.randn(6, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    kept = []
    path = BrownianPath(SCHEDULE, 0, torch.arange(2), (1, 4, 4), torch.float64)
    start = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    end = solver.integrate(lambda y, at: kept.append(next(eps)) or kept[-1], start, points, path, torch.arange(2), 0)
    torch.testing.assert_close(end, torch.einsum("r,r...->...", weights, torch.stack(kept)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_schedulers_with_noise_of_their_own_have_no_reference_and_no_plan(name: str) -> None:
    solver = DiffusersSolver(name)
    points = GridPoint.of(SCHEDULE, solver.grid(SCHEDULE, 6))
    assert not solver.coupled
    with pytest.raises(ValueError, match=f"^diffusers:{name} is not linear in its noise estimates: no plan"):
        quadrature_weights(solver, SCHEDULE, points)


def test_adapter_options_reach_the_scheduler() -> None:
    plain, karras = (
        DiffusersSolver("EulerDiscreteScheduler"),
        DiffusersSolver("EulerDiscreteScheduler", use_karras_sigmas=True),
    )
    assert plain.grid(SCHEDULE, 10) != karras.grid(SCHEDULE, 10)


def test_one_adapter_serves_two_samplers() -> None:
    solver = DiffusersSolver("DDIMScheduler")
    before = dict(vars(solver))
    first = Sampler(small(), solver=solver, steps=10)
    assert first.solver is solver
    Sampler(small(), solver=solver, steps=3)
    assert_same(first.run(range(2)).x, sample(small(), solver=solver, steps=10, indices=range(2)).x)
    assert vars(solver) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoSuchScheduler", r"^diffusers has no scheduler 'NoSuchScheduler'; use the class name, as in .*$"),
        ("UNet2DModel", r"^diffusers has no scheduler 'UNet2DModel'; "),
        ("__import__('os')", r"^diffusers has no scheduler "),
        ("LCMScheduler", r"^LCMScheduler cannot be compared: it is made for networks distilled for it"),
        ("RePaintScheduler", r"^RePaintScheduler cannot be compared: its step needs original_image, mask"),
        ("DDIMInverseScheduler", r"^DDIMInverseScheduler cannot be compared: it goes from images to noise"),
        ("EDMEulerScheduler", r"^EDMEulerScheduler takes no betas: only variance-preserving schedulers"),
        ("FlowMatchEulerDiscreteScheduler", r"takes no betas"),
    ],
)
def test_unknown_schedulers_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(small(), solver=f"diffusers:{name}", indices=[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "karras"}, r"^a diffusers scheduler has its own grid; leave out grid \(got 'karras'\)$"),
        ({"steps": 0}, r"^steps must be a whole number >= 1, got 0$"),
        ({"steps": 1001}, r"^steps must be in \[1, 1000\] on the trailing grid, got 1001$"),
        ({"solver": "diffusers:HeunDiscreteScheduler"}, r"^HeunDiscreteScheduler evaluates the network twice at one"),
    ],
)
def test_adapter_refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(small(), **{"solver": "diffusers:DDIMScheduler", "indices": [0]} | options)


def schedulers() -> list[str]:
    """Every scheduler class of diffusers that can be imported."""
    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and name != "SchedulerMixin"]
    found = {name: getattr(diffusers, name) for name in names}
    return [name for name, one in found.items() if isinstance(one, type) and issubclass(one, SchedulerMixin)]


def variance(solver: DiffusersSolver, schedule: NoiseSchedule, steps: int) -> Tensor:
    """Of the samples of an uneven Gaussian, in units of its own: (4,). x_T of -1 and 1 make few samples enough."""
    points = GridPoint.of(schedule, solver.grid(schedule, steps))
    count = 2 if solver.coupled else 800
    x_T = torch.randint(0, 2, (count, 1, 2, 2), generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    estimate = noise_estimate(uneven_gaussian(schedule), schedule)
    x = trajectory(estimate, solver, points, x_T, torch.arange(count), 0)
    return x.flatten(1).square().mean(0) / DEVIATIONS.square()


@pytest.mark.parametrize("name", schedulers())
def test_every_scheduler_is_right_on_a_gaussian_or_refused_by_name(name: str) -> None:
    try:
        solver = DiffusersSolver(name)
    except ValueError as error:
        said = str(error)
    else:
        assert (variance(solver, NoiseSchedule.cosine(), 100) - 1).abs().max() < 1 / 3
        return
    assert said.startswith(name)
    assert "\n" not in said


def test_the_well_known_schedulers_are_not_refused() -> None:
    names = ("DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "EulerDiscrete")
    for name in (*names, "EulerAncestralDiscrete", "KDPM2Discrete", "LMSDiscrete", "SASolver", "UniPCMultistep"):
        assert DiffusersSolver(f"{name}Scheduler").grid(SCHEDULE, 10).steps >= 10


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_sigmas_that_round_to_one_timestep_are_told_apart(name: str, kind: str) -> None:
    """Karras' smallest sigmas lie within one timestep: the network is asked at the sigma, not at the timestep."""
    schedule = NoiseSchedule.from_config({"kind": kind})
    solver = DiffusersSolver(name, use_karras_sigmas=True)
    points = GridPoint.of(schedule, solver.grid(schedule, 40))
    scheduler = solver.init(points, torch.arange(1), 0)[0]
    kappas = torch.tensor([point.kappa for point in points[:-1]])
    torch.testing.assert_close(kappas, scheduler.sigmas[:-1], rtol=2e-3, atol=0)
    assert (variance(solver, schedule, 40) - 1).abs().max() < 0.2


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "prediction_type",
            "v_prediction",
            "would contradict the noise estimate that mlem passes; leave it out: ",
        ),
        ("num_train_timesteps", 100, "would contradict the schedule of the model"),
        ("beta_start", 0.001, "would contradict the schedule of the model"),
        ("beta_schedule", "squaredcos_cap_v2", "would contradict the schedule of the model"),
        ("trained_betas", [0.1], "would contradict the schedule of the model"),
        ("rescale_betas_zero_snr", True, "would contradict the schedule of the model"),
        ("use_flow_sigmas", True, "would contradict the schedule of the model"),
        ("flow_shift", 3.0, "would contradict the schedule of the model"),
        ("sigma_max", 10.0, "would contradict the schedule of the model"),
        ("eta", 1.0, "^UniPCMultistepScheduler has no option 'eta'; its options are solver_order, "),
        ("use_karras", True, r"has no option 'use_karras'; .*did you mean use_karras_sigmas\?"),
        ("solver_type", "bh7", "^UniPCMultistepScheduler: bh7 is not implemented"),
    ],
)
def test_options_that_are_unknown_or_contradict_mlem_are_refused(option: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        DiffusersSolver("UniPCMultistepScheduler", **{option: value})
    assert "\n" not in str(caught.value)


def test_a_variance_that_no_network_gives_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^variance_type of DDPMScheduler is 'learned', but no variance is estimated"):
        DiffusersSolver("DDPMScheduler", variance_type="learned")


def test_too_few_steps_of_a_scheduler_get_the_least_number(monkeypatch: pytest.MonkeyPatch) -> None:
    solver, make = DiffusersSolver("DDIMScheduler"), DDIMScheduler.set_timesteps

    def fails_below_3(self: DDIMScheduler, steps: int) -> None:
        make(self, steps if steps >= 3 else [][steps])

    monkeypatch.setattr(DDIMScheduler, "set_timesteps", fails_below_3)
    with pytest.raises(ValueError, match=r"^DDIMScheduler cannot make 1 steps; it needs at least 3$"):
        solver.grid(SCHEDULE, 1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("schedule", [NoiseSchedule.edm(), NoiseSchedule.flow(3.0)], ids=["edm", "flow"])
def test_schedulers_sample_other_paths_too(schedule: NoiseSchedule) -> None:
    """By the betas of the same noise-to-signal ratios; of a flow they begin at 4096, as in diffusers itself."""
    data, options = uneven_gaussian(schedule), {"indices": range(8), "schedule": schedule, "shape": (1, 2, 2)}
    ours = sample(data, solver="ddim", steps=20, grid="trailing", **options).x
    theirs = sample(data, solver="diffusers:DDIMScheduler", steps=20, **options).x
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
