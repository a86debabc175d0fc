"""Conventions of networks, against references written by hand and against the schedulers of diffusers."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from mlem.denoiser import NetworkDenoiser
from mlem.family import Family
from mlem.level import Level
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.plan import Plan
from mlem.predictions import EDM, PREDICTIONS, Eps, Flow, Prediction, V, make_prediction
from mlem.sampling import sample
from mlem.schedule import NoiseSchedule
from mlem.scheduler_configs import prediction_of, to_diffusers
from mlem.solvers import GridPoint, make_solver
from mlem.trajectory import noise_estimate, trajectory
from tests.problems import gaussian, level

SHAPE = (2, 4, 4)
FLOW, EDM_NOISE, COSINE = NoiseSchedule.flow(), NoiseSchedule.edm(), NoiseSchedule.cosine()
ZERO_SNR = NoiseSchedule.from_diffusers(
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True}
)


class Net(nn.Module):
    """A small random network that listens to its time, in units of `scale`."""

    def __init__(self, scale: float = 1.0, channels: int = SHAPE[0]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(SHAPE[0], 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)
        self.scale = scale

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + (time.float() / self.scale).view(-1, 1, 1, 1)))


def normals(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sampled(network: nn.Module, prediction: Any, schedule: NoiseSchedule, solver: str, grid: str, steps: int) -> Tensor:
    """The loop of mlem, from `normals`."""
    made, denoiser = make_solver(solver), NetworkDenoiser(network, schedule, prediction)
    points = GridPoint.of(schedule, made.grid(schedule, steps, grid))
    return trajectory(noise_estimate(denoiser, schedule), made, points, normals(), torch.arange(3), 0)


def scheduler_of(schedule: NoiseSchedule, prediction: Any) -> Any:
    """What a level's scheduler_config.json makes."""
    config = to_diffusers(schedule, make_prediction(prediction))
    return getattr(diffusers, config["_class_name"]).from_config(config)


@torch.no_grad()
def by_diffusers(network: nn.Module, scheduler: Any, steps: int) -> Tensor:
    """As a pipeline of diffusers does it, from `normals`."""
    scheduler.set_timesteps(steps)
    x = normals() * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else normals()
    for timestep in scheduler.timesteps:
        own = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(own, timestep.expand(len(x))), timestep, x).prev_sample
    return x


def assert_close(found: Tensor, due: Tensor) -> None:
    """To 1e-5 of the largest number."""
    assert (found.float() - due.float()).abs().max() < 1e-5 * due.abs().max()


@pytest.mark.parametrize("steps", [2, 18])
def test_heun_is_algorithm_1_of_edm(steps: int) -> None:
    """Karras et al., arXiv:2206.00364, written from the paper in float64, with F of table 1 and no churn."""
    network, d = Net(), 0.5

    def D(y: Tensor, sigma: float) -> Tensor:
        c_skip, c_out = d**2 / (sigma**2 + d**2), sigma * d / (sigma**2 + d**2) ** 0.5
        time = torch.full((len(y),), torch.tensor(sigma).log().item() / 4)
        return c_skip * y + c_out * network((y / (sigma**2 + d**2) ** 0.5).float(), time).double()

    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    t = [(ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** 7 for i in range(steps)] + [0.0]
    with torch.no_grad():
        x = normals().double() * (1 + t[0] ** 2) ** 0.5
        for here, there in itertools.pairwise(t):
            slope = (x - D(x, here)) / here
            euler = x + (there - here) * slope
            if there > 0:
                euler = x + (there - here) * (slope + (euler - D(euler, there)) / there) / 2
            x = euler
    assert_close(sampled(network, "edm", EDM_NOISE, "heun", "karras", steps), x)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 20, 50])
def test_ddim_on_the_flow_grid_is_the_flow_scheduler(steps: int, shift: float) -> None:
    """From r = 1, where there is no signal."""
    network, schedule = Net(1000.0), NoiseSchedule.flow(shift)
    due = by_diffusers(network, diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), steps)
    assert_close(sampled(network, "flow", schedule, "ddim", "flow", steps), due)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_zero_terminal_snr_is_that_of_diffusers(prediction: str) -> None:
    network, scheduler = Net(1000.0), scheduler_of(ZERO_SNR, prediction)
    assert scheduler.alphas_cumprod[-1] == 0
    assert_close(sampled(network, prediction, ZERO_SNR, "ddim", "trailing", 5), by_diffusers(network, scheduler, 5))


@pytest.mark.parametrize(
    ("schedule", "prediction", "grid"),
    [
        (COSINE, "v", "trailing"),
        (COSINE, "eps", "trailing"),
        (NoiseSchedule.linear(1e-3, 0.2, 100), "eps", "trailing"),
        (EDM_NOISE, EDM(sigma_data=1.0), "karras"),
        (NoiseSchedule.flow(3.0), "flow", "flow"),
        (FLOW, "v", "trailing"),
    ],
    ids=lambda value: str(value) if isinstance(value, str | Prediction) else "",
)
def test_diffusers_samples_what_the_config_says(schedule: NoiseSchedule, prediction: Any, grid: str) -> None:
    network = Net(1.0 if grid == "karras" else 1000.0)
    scheduler = scheduler_of(schedule, prediction)
    assert NoiseSchedule.from_diffusers(scheduler.config).num_timesteps == schedule.num_timesteps
    assert prediction_of(scheduler.config) == make_prediction(prediction)
    assert_close(sampled(network, prediction, schedule, "ddim", grid, 5), by_diffusers(network, scheduler, 5))


@pytest.mark.parametrize(
    ("schedule", "prediction"), [(COSINE, "flow"), (FLOW, "sit"), (EDM_NOISE, "edm_denoised"), (COSINE, V(timesteps=9))]
)
def test_what_diffusers_cannot_say_is_refused(schedule: NoiseSchedule, prediction: Any) -> None:
    with pytest.raises(ValueError, match=r"^no scheduler of diffusers samples prediction .* on a schedule of kind "):
        to_diffusers(schedule, make_prediction(prediction))


def test_clip_is_the_clipped_mean_of_ddpm(monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps of DDPM without their noise."""
    network, linear = Net(1000.0), NoiseSchedule.from_diffusers({"beta_schedule": "linear"})
    quiet = {"at": lambda self, t: torch.zeros(()), "__init__": lambda self, *args: None}
    monkeypatch.setattr("mlem.trajectory.BrownianPath", type("Quiet", (), quiet))
    module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(module, lambda shape, **options: torch.zeros(shape))
    scheduler = scheduler_of(linear, Eps(clip=0.5))
    assert isinstance(scheduler, diffusers.DDPMScheduler)
    due = by_diffusers(network, scheduler, 20)
    assert_close(sampled(network, Eps(clip=0.5), linear, "ddpm", "trailing", 20), due)
    assert not torch.allclose(sampled(network, "eps", linear, "ddpm", "trailing", 20).float(), due, atol=0.01)


class Exact(nn.Module):
    """The closed form of `gaussian` as a network of some convention, told of a noise level by that alone."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.name = name

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time, own = time.double()[:, None], FLOW
        if self.name in ("v", "eps", "x0"):
            own = COSINE
            kappa = own.kappa((time + 1) / 1000)
            y = x * (1 + kappa**2).sqrt()
        else:
            r = (time / 1000 if self.name == "flow" else 1 - time).clamp(max=1 - 1e-8)
            kappa = {"edm": (4 * time).exp(), "edm_denoised": time}.get(self.name, r / (1 - r))
            y = {"edm": x * (kappa**2 + 0.25).sqrt(), "edm_denoised": x}.get(self.name, x / (1 - r))
        alpha = (1 + kappa**2).rsqrt()
        eps = gaussian(own)(y * alpha, own.time_from_kappa(kappa[:, 0]))
        data = y - kappa * eps
        raw = (data - y * 0.25 / (kappa**2 + 0.25)) * (kappa**2 + 0.25).sqrt() / (0.5 * kappa)
        answers = {"v": alpha * eps - alpha * kappa * data, "eps": eps, "x0": data, "edm": raw, "edm_denoised": data}
        return answers.get(self.name, eps - data if self.name == "flow" else data - eps)


@pytest.mark.parametrize("under", [COSINE, EDM_NOISE, NoiseSchedule.flow(3.0)], ids=["cosine", "edm", "flow"])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_network_of_any_convention_gives_the_closed_form(name: str, under: NoiseSchedule) -> None:
    """Also where the family has another schedule than the network's own; its time is rounded to float32."""
    kappa = torch.tensor([0.05, 0.7, 3.0, 60.0], dtype=torch.float64)
    x, t = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double(), under.time_from_kappa(kappa)
    found = NetworkDenoiser(Exact(name), under, name, COSINE)(x, t)
    torch.testing.assert_close(found, gaussian(under)(x, t), rtol=2e-4, atol=2e-4)


def test_a_level_is_asked_at_its_own_end_beyond_it() -> None:
    """A flow begins with no signal, which a network of the cosine schedule never saw: its x_0 there is taken."""
    x, t = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double(), torch.ones(5, dtype=torch.float64)
    asked: list[Tensor] = []
    network = Exact("v")
    network.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[1]))
    eps = NetworkDenoiser(network, FLOW, "v", COSINE)(x, t)
    assert asked[0].tolist() == [999.0] * 5
    alpha, sigma = (scale.item() for scale in FLOW.scales(1.0))
    own_alpha, own_sigma = (scale.item() for scale in COSINE.scales(1.0))
    due = (x - own_sigma * gaussian(COSINE)(x, t)) / own_alpha
    torch.testing.assert_close((x - sigma * eps) / alpha, due, rtol=1e-4, atol=1e-4)


def test_learned_variances_are_dropped() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return torch.cat([2 * x, torch.full_like(x, torch.nan)], 1)

    x, t = normals(), torch.full((3,), 0.5)
    assert torch.equal(NetworkDenoiser(Double(), COSINE, "eps")(x, t), 2 * x)


def test_timesteps_are_those_of_the_schedule_or_of_the_network() -> None:
    seen: list[float] = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        seen.append(time.item())
        return x

    schedule, t = NoiseSchedule.linear(num_timesteps=500), torch.tensor([0.5])
    for prediction in ("v", V(timesteps=1000), Flow(timesteps=10), "sit"):
        NetworkDenoiser(network, schedule, prediction)(torch.zeros(1, 3), t)
    kappa = schedule.kappa(t).item()
    assert seen == pytest.approx([249, 499, 10 * kappa / (1 + kappa), 1 / (1 + kappa)], rel=1e-6)


def mixed_family() -> Family:
    """The same law as a v network of the cosine schedule and as a flow: what differs is how they are asked."""
    small = Level("small", Exact("v"), COSINE, (3,), "v", flops=1)
    return Family([small, Level("large", Exact("flow"), FLOW, (3,), "flow", flops=10)])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm_solver_pp"])
def test_levels_of_one_family_may_have_other_conventions(solver: str) -> None:
    """Sampled on the largest one's schedule; both are exact, so that any plan gives the same samples."""
    family = mixed_family()
    assert family.schedule is FLOW
    options: dict[str, Any] = {"solver": solver, "steps": 12, "indices": range(8)}
    top = sample(family, **options).x
    for probabilities in ([1.0, 1.0], [1.0, 0.4]):
        plan = Plan.draw(torch.tensor(probabilities, dtype=torch.float64).repeat(12, 1), seed=1)
        found = sample(family, plan=plan, **options).x
        if probabilities == [1.0, 1.0]:
            assert torch.equal(found, top)
        torch.testing.assert_close(found, top, rtol=0, atol=0.02)
    torch.testing.assert_close(sample(family.level("small"), **options).x, top, rtol=0, atol=0.02)


def test_a_noise_estimate_in_float32_is_refused_at_pure_noise() -> None:
    with pytest.raises(ValueError, match=r"^sampling starts from pure noise, where a noise estimate in float32"):
        sample(lambda x, t: x, schedule=FLOW, shape=(3,), steps=4, indices=range(2))


def test_a_mixed_family_is_calibrated() -> None:
    family = mixed_family()
    calibration = calibrate(family, images=2, times=4, batch_sizes=(2,))
    fitted = Family(family.levels, Fitted(calibration))
    plan = fitted.plan(budget=0.5, cost="flops", levels=("small", "large"))
    top, found = (sample(fitted, solver="ddpm", steps=10, indices=range(4), plan=one).x for one in (None, plan))
    torch.testing.assert_close(found, top, rtol=0, atol=0.02)


def test_a_mixed_family_is_saved_and_loaded(tmp_path: Path) -> None:
    old = Family([level("xs", prediction="eps"), level("s", prediction="flow", schedule=NoiseSchedule.flow(3.0))])
    old.save(tmp_path)
    new = Family.load(tmp_path)
    assert [str(one.prediction) for one in new.levels] == ["eps", "flow"]
    assert [one.schedule.fingerprint for one in new.levels] == [one.schedule.fingerprint for one in old.levels]
    assert new.weights_hash == old.weights_hash
    other = Family([level("xs", prediction="eps", schedule=NoiseSchedule.linear()), old.levels[1]])
    assert other.weights_hash != old.weights_hash
    for name in ("xs", "s"):
        one, two = (sample(family, level=name, steps=3, indices=range(2)).x for family in (old, new))
        assert torch.equal(one, two)


def test_equal_schedules_are_asked_as_ever() -> None:
    """Two objects of one schedule are no detour."""
    family = Family([level("xs", schedule=NoiseSchedule.cosine()), level("s", schedule=NoiseSchedule.cosine())])
    assert all(one.denoiser.own is one.denoiser.schedule is one.schedule for one in family.levels)


CONVENTIONS: list[tuple[Any, NoiseSchedule, str]] = [
    ("v_prediction", NoiseSchedule.linear(num_timesteps=500), "v"),
    ("epsilon", COSINE, "eps"),
    (V(clip=1.0), ZERO_SNR, "v(clip=1)"),
    ("edm", EDM_NOISE, "edm"),
    (EDM(sigma_data=1.0), EDM_NOISE, "edm(sigma_data=1)"),
    ("edm_denoised", EDM_NOISE, "edm_denoised"),
    ("flow_prediction", NoiseSchedule.flow(3.0), "flow"),
    ("sit", FLOW, "sit"),
]


@pytest.mark.parametrize(("prediction", "schedule", "printed"), CONVENTIONS, ids=[one[2] for one in CONVENTIONS])
def test_conventions_are_saved_and_loaded(
    prediction: Any, schedule: NoiseSchedule, printed: str, tmp_path: Path
) -> None:
    old = level(prediction=prediction, schedule=schedule)
    assert str(old.prediction) == printed
    assert f"prediction={printed!r}" in repr(old)
    Family([old]).save(tmp_path)
    new = Family.load(tmp_path)
    assert new.weights_hash == Family([old]).weights_hash
    (again,) = new.levels
    assert (again.prediction, again.schedule.fingerprint) == (old.prediction, schedule.fingerprint)
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        assert torch.equal(again.denoiser(x, t), old.denoiser(x, t))


def test_a_level_of_old_is_asked_at_1000_timesteps(tmp_path: Path) -> None:
    """Whatever its schedule had: networks were asked so, and files said nothing of it."""
    level(schedule=NoiseSchedule.linear(num_timesteps=500)).save(tmp_path)
    about = json.loads((tmp_path / "mlem.json").read_text())
    assert about.pop("timesteps") == 500
    about.pop("checksum", None)
    (tmp_path / "mlem.json").write_text(json.dumps(about))
    assert Level.load(tmp_path).prediction == V(timesteps=1000)


def test_options_are_part_of_the_identity() -> None:
    made = [level(prediction=one) for one in ("v", V(clip=1.0), V(timesteps=500), "edm", EDM(sigma_data=1.0))]
    assert len({Family([one]).weights_hash for one in made}) == len(made)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: level(prediction="eps", schedule=FLOW), "prediction eps says nothing about the data"),
        (lambda: level(prediction="eps", schedule=ZERO_SNR), "prediction eps says nothing about the data without sig"),
        (lambda: EDM(sigma_data=0), "sigma_data of prediction edm must be a positive number, got 0"),
        (lambda: V(clip=-1), "clip of prediction v must be a positive number, got -1"),
        (lambda: make_prediction({"kind": "edm", "sigma": 1}), "prediction edm has no option 'sigma'; its options are"),
        (lambda: make_prediction(7), "prediction must be one of v, eps, x0, edm, edm_denoised, flow, sit, got 7"),
        (
            lambda: prediction_of({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}),
            "prediction_type of EDMEulerScheduler is 'v_prediction', but EDM networks return F",
        ),
        (
            lambda: prediction_of({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}),
            "prediction_type of UniPCMultistepScheduler is None, which contradicts use_flow_sigmas=True",
        ),
        (
            lambda: prediction_of({"_class_name": "DDIMScheduler", "prediction_type": "flow_prediction"}),
            "prediction_type of DDIMScheduler is 'flow_prediction', which contradicts use_flow_sigmas=False",
        ),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        make()
    assert "\n" not in str(caught.value)
