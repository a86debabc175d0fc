"""What `unchanged.py` looks at. Each check works in a folder of its own, a copy of what `record` made.

A check gives items by name: tensors, numbers, text, or lists and mappings of them. Where an item fails, it is a text
that says why, so that one refusal does not hide the rest.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from unchanged_files import ROOT, Page, attempt, load, pixels, remove, run

sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

from mlem import Coefficients, Family, NoiseSchedule, Plan, TimeGrid, sample

Items = dict[str, Any]
RUN, FAMILY, LEARNED = Path("runs/tiny"), Path("runs/tiny/family"), Path("runs/exact/coefficients")
INDICES, BATCHES = (0, 1, 2, 5, 13), (64, 3)
SOLVERS = {"ddpm": 6, "ddim": 6, "euler_maruyama": 6, "heun": 4, "dpm_solver_pp": 5, "dpm_solver_pp_sde": 5}
SOLVERS |= {"randomized_midpoint": 4, "randomized_midpoint_sde": 4, "parallel_midpoint": 2, "predictor_corrector": 3}
"""Names and step counts."""
SCHEDULERS = ("UniPCMultistepScheduler", "DDIMScheduler", "DDPMScheduler")
GRIDS = ("uniform", "log_snr", "karras", "ou_uniform", "ou_halving", "trailing", "leading")
COINS = ("systematic", "bernoulli", "nested", "poisson")
READ = (f"root={RUN}", f"family={FAMILY}", "trainer=cpu")
"""Options of a command that reads the family."""


def _training(work: Path) -> Items:
    """Weights, averages, optimizer and losses of 50 steps of three levels, and what the evaluation found."""
    remove(work, "runs", "data")
    options = ["model=family", "model.levels=[xs,s,m]", "data.held_out=64", "training.steps=50"]
    options += ["training.batch_size=16", "training.epoch_steps=25", "training.checkpoint_every=25"]
    options += ["training.warmup_steps=5", "evaluation.every_n_epochs=1", "evaluation.indices=0-15"]
    options += ["evaluation.batch_size=8", "evaluation.reference_steps=12", "metric.reference=200"]
    options += ["evaluation.samplers=[{solver:ddpm,steps:[4]},{solver:dpm_solver_pp,steps:[3],grid:karras}]"]
    found = _trained(work, *options)
    found |= {f"weights of {path.parent.name}": load_file(path) for path in sorted(work.glob(f"{FAMILY}/*/*.safe*"))}
    return found | {"evaluation.json": load(work / RUN / "evaluation.json")}


def _other_training(work: Path) -> Items:
    """A few steps of another kind: eps prediction, dropout, accumulated gradients, linear schedule, RGB images."""
    remove(work, "runs", "data")
    options = ["data=dead_leaves", "data.options.size=16", "data.options.count=200", "data.held_out=16"]
    options += ["model=unet_xs", "model.prediction=eps", "model.dropout=0.1", "schedule=linear", "metric=none"]
    options += ["training.accumulate=2", "training.steps=6", "training.batch_size=8", "training.epoch_steps=3"]
    options += ["evaluation.every_n_epochs=0", "evaluation.indices=0-3", "evaluation.reference_steps=4"]
    return _trained(work, *options, "evaluation.samplers=[{solver:ddim,steps:[3]}]")


def _trained(work: Path, *options: str) -> Items:
    run(work, "train.py", *options, f"root={RUN}", "trainer=cpu", "logger=jsonl", "calibration.images=0")
    folder = work / RUN / "unet_xs"
    checkpoint = torch.load(sorted(folder.rglob("*.ckpt"))[-1], weights_only=True)
    return {"metrics.jsonl": load(folder / "metrics.jsonl"), "checkpoint": checkpoint}


def _calibration(work: Path) -> Items:
    """What the levels cost in FLOPs, how far they are apart, and the pilots."""
    remove(work, FAMILY / "calibration.json")
    options = ("--images", "2", "--times", "4", "--reference-steps", "20")
    run(work, "-m", "mlem.multilevel", "calibrate", FAMILY, *options)
    return {"calibration.json": load(work / FAMILY / "calibration.json")}


def _coefficients(work: Path) -> Items:
    """Five updates with each kind of tangents; what was learned last stays with the family."""
    remove(work, "runs/random", "runs/exact", FAMILY / "coefficients.json")
    options = ["model=coefficients", "model.steps=6", "model.budget=0.5", "model.updates=5", "model.batch_size=2"]
    options += ["model.draws=2", "model.images=4", "model.held_out=4", "evaluation.reference_steps=8", *READ[1:]]
    both = ["-m", "root=runs/${model.tangents}", "model.tangents=random,exact", "logger=jsonl"]
    run(work, "train.py", *both, *options)
    folders = (work / "runs/random/coefficients", work / LEARNED)
    names = ("coefficients.json", "metrics.jsonl")
    return {f"{folder.parent.name} {name}": load(folder / name) for folder in folders for name in names}


def _memorised(work: Path) -> Items:
    """The tables of two plans, with the errors that were predicted and found."""
    remove(work, FAMILY / "plans")
    jump, held = "--estimator jump --coins poisson", "--estimator held --coins bernoulli --solver ddim"
    for name, options in (("best", jump), ("held", held)):
        options += f" --name {name} --draws 2 --images 2 --steps 8 --reference-steps 12 --budget 0.6"
        run(work, "-m", "mlem.multilevel", "memorise", FAMILY, *options.split())
    return {f"plan {path.stem}": load(path) for path in sorted((work / FAMILY / "plans").glob("*.json"))}


def _error_against_time(work: Path) -> Items:
    """The rows of the paper's figure, without the seconds, and the references."""
    folder = work / RUN / "error_vs_time"
    remove(work, folder)
    drawn = "solver:ddpm,steps:[8],deltas:[-1,0,1],trials:2,plan:{estimator:jump,coins:bernoulli,cost:flops"
    laws = ("probabilities:theory,budget:0.5", "probabilities:calibrated,budget:0.5", "probabilities:learned")
    entries = ["{name:EM,solver:ddpm,steps:[4,8]}", "{name:ddim,solver:ddim,steps:[4],levels:[xs,m],grid:log_snr}"]
    entries += [f"{{name:law{number},{drawn},{law}}}}}" for number, law in enumerate(laws)]
    entries += ["{name:hindsight,solver:ddpm,steps:[8,16],plan:{budget:0.6,cost:flops}}"]
    options = ["seeds=0-5", "batch_size=4", "eval.reference_steps=16", "eval.draws=50", "eval.shown=2"]
    options += [f"eval.samplers=[{','.join(entries)}]"]
    run(work, "sample.py", "experiment=error_vs_time", *READ, *options)
    found = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return found | {name: load(folder / name) for name in ("runs.csv", "summary.json")}


def _scaling_law(work: Path) -> Items:
    """Gamma of the family with its intervals."""
    run(work, "sample.py", "experiment=scaling_law", *READ, "data.held_out=64", "eval.replicates=100")
    return {path.name: load(path) for path in sorted((work / RUN / "scaling_law").glob("*.json"))}


def _arithmetic(work: Path) -> Items:
    """Schedules there and back, time grids, drawn plans and learned probabilities."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    made = {"cosine": NoiseSchedule.cosine(), "linear": NoiseSchedule.linear()}
    made["from_diffusers"] = NoiseSchedule.from_diffusers(betas)
    t, found = torch.linspace(0.001, 1, 77, dtype=torch.float64), {}
    for name, schedule in made.items():
        for quantity in ("alpha", "sigma", "kappa", "log_snr", "ou_time"):
            value = attempt(lambda s=schedule, q=quantity: getattr(s, q)(t))
            back = attempt(lambda s=schedule, q=quantity, v=value: getattr(s, f"time_from_{q}")(v))
            found |= {f"{name} {quantity}": value, f"{name} time from {quantity}": back}
        for grid in GRIDS:
            times = [attempt(lambda *how: TimeGrid.make(*how).times, grid, schedule, steps) for steps in (1, 2, 7, 20)]
            found[f"{name} grid {grid}"] = times
    for delta in (0.0, 1.5):
        learned = Coefficients(torch.tensor([0, 1.1, 0.7]), torch.tensor([40, 0.4, -0.7]))
        found[f"probabilities, delta {delta}"] = attempt(learned.probabilities, made["cosine"], t, delta)
    for name, plan in _plans().items():
        found |= {f"{name} table": attempt(lambda p=plan: p().to_dict())}
        found |= {f"{name} weights": attempt(lambda p=plan: p().weights)}
    return found


def _plans() -> dict[str, Callable[[], Plan]]:
    """Plans made by hand, of eight evaluations of three levels."""
    falling = torch.linspace(0.9, 0.2, 8, dtype=torch.float64)
    p = torch.stack([torch.ones_like(falling), falling, 0.5 * falling], 1)
    measured = torch.arange(8)[:, None] % torch.tensor([1, 2, 5]) == 0
    # of a plan whose corrections fade: the option has had two names
    fading: dict[str, Any] = {
        name: 3.0 for name in inspect.signature(Plan.given).parameters if name in ("memory", "correlation_length")
    }
    found: dict[str, Callable[[], Plan]] = {"plan given, memory 3": lambda: Plan.given(measured, **fading)}
    for estimator in ("jump", "held", "hindsight"):
        for coins in COINS:
            found[f"plan {coins} {estimator}"] = lambda c=coins, e=estimator: Plan.draw(p, c, 3, estimator=e)
    for estimator in ("held", "hindsight"):
        for order in (0, 1):
            name = f"plan given, {estimator} of order {order}"
            found[name] = lambda e=estimator, o=order: Plan.given(measured, estimator=e, order=o)
    return found


class _Gaussian:
    """The exact noise estimate where images are N(0, 1/4)."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (one.view(-1, 1, 1, 1).to(x) for one in (self.schedule.alpha(t), self.schedule.sigma(t)))
        return sigma * x / (0.25 * alpha**2 + sigma**2)


class _Recorder:
    """Samples a family, and notes the calls of its networks in order."""

    def __init__(self, folder: Path) -> None:
        self.family = Family.load(folder)
        self._calls: list[tuple[int, int]] = []
        for number, level in enumerate(self.family.levels):
            level.network.register_forward_pre_hook(self._note(number))

    def _note(self, number: int) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda _, inputs: self._calls.append((number, len(inputs[0])))

    def __call__(self, name: str, model: Any = None, **options: Any) -> Items:
        """Samples in each batch size, and what they cost."""
        found = {}
        for size in BATCHES:
            self._calls.clear()
            result = attempt(self._sampled, model or self.family, batch_size=size, **options)
            for part in ("samples", "cost"):
                found[f"{name}, batches of {size}, {part}"] = result[part] if isinstance(result, dict) else result
        return found

    def _sampled(self, model: Any, **options: Any) -> Items:
        if isinstance(plan := options.get("plan"), str):
            raise ValueError(plan)
        result = sample(model, indices=INDICES, **options)
        return {"samples": result.x, "cost": {"ledger": asdict(result.ledger), "calls": [*self._calls]}}


def _solvers(work: Path) -> Items:
    """Every solver: the largest level on several grids, and a closed form."""
    recorder, found = _Recorder(work / FAMILY), {}
    own = _Gaussian(NoiseSchedule.linear())
    for solver, steps in SOLVERS.items():
        for grid in (None, "log_snr", "karras", "trailing"):
            found |= recorder(f"{solver}, {grid or 'own grid'}", solver=solver, steps=steps, grid=grid)
        options: dict[str, Any] = {"schedule": own.schedule, "shape": (1, 4, 4), "seed": 2, "grid": "ou_halving"}
        found |= recorder(f"{solver}, closed form", own, solver=solver, steps=steps, **options)
    for name in SCHEDULERS:
        found |= recorder(f"diffusers:{name}", solver=f"diffusers:{name}", steps=5)
    for grid in GRIDS:
        found |= recorder(f"ddpm, level xs, seed 7, {grid}", solver="ddpm", steps=7, grid=grid, level="xs", seed=7)
    return found


def _shared(work: Path) -> Items:
    """Every kind of plan."""
    recorder, found = _Recorder(work / FAMILY), {}
    for solver, steps, options in _recipes():
        name = " ".join([solver, *(f"{key}={value}" for key, value in options.items())])
        plan = attempt(recorder.family.plan, cost="flops", **options)
        found |= recorder(name, solver=solver, steps=steps, plan=plan)
    for name, plan in _plans().items():
        solver = "dpm_solver_pp" if "given" in name else "ddpm"
        found |= recorder(f"{solver}, {name}", solver=solver, steps=8, plan=attempt(plan))
    return found


def _recipes() -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Solver, steps and options of `family.plan`."""
    for solver, steps in (("ddpm", 8), ("ddim", 8), ("dpm_solver_pp", 6), ("heun", 4)):
        for coins in COINS:
            for own in ({}, {"per_sample": True}):
                yield solver, steps, {"budget": 0.6, "estimator": "jump", "coins": coins, **own}
        for estimator in ("held", "hindsight") if solver != "heun" else ("held",):
            for order in (None, 0, 1):
                yield solver, steps, {"budget": 0.6, "estimator": estimator, "order": order}
    yield "ddpm", 8, {"estimator": "hindsight", "mse": 0.06}
    yield "dpm_solver_pp", 8, {"estimator": "held", "mse": 0.02, "levels": ("xs", "m")}
    yield "ddpm", 8, {"estimator": "jump", "mse": 0.06, "levels": ("xs", "m")}
    for estimator in ("jump", "held", "hindsight"):
        yield "ddpm", 8, {"estimator": estimator, "budget": 0.5, "probabilities": "theory", "gamma": 3.0}
        yield "ddim", 8, {"estimator": estimator, "budget": 0.5, "probabilities": "learned"}
        yield "ddim", 8, {"estimator": estimator, "delta": 0.7, "probabilities": "learned", "coins": "nested"}
        yield "ddpm", 8, {"estimator": estimator, "probabilities": (1.0, 0.5, 0.2), "seed": 3}
        yield "dpm_solver_pp", 8, {"estimator": estimator, "budget": 0.5, "coins": "bernoulli", "seed": 3}


def _commands(work: Path) -> Items:
    """What `sample.py` writes: scores, every sampler, memorised plans, and options of solvers."""
    scored = ["sampler=mlem", "steps=8", "budget=0.6", "seeds=0-23", "metric=fid_random256", "metric.kid=true"]
    scored += ["metric.precision_recall=true", "metric.blocks=2", "metric.cache=real", "out=out/scored"]
    run(work, "sample.py", *READ, *scored)
    few = ["sample.py", "-m", *READ, "seeds=0-2", "batch_size=2"]
    names = ["em" if name == "euler_maruyama" else name for name in SOLVERS]
    run(work, *few, f"sampler={','.join(names)},diffusers", "steps=5", "out=out/${sampler.name}")
    for solver, plan in (("ddpm", "best"), ("ddim", "held")):
        options = [f"sampler={solver}", "steps=8", "grid=log_snr", f"plan={plan}", f"out=out/{solver}_{plan}"]
        run(work, *few, *options)
    midpoints = ["sampler=randomized_midpoint,randomized_midpoint_sde", "sampler.options.midpoints=shared"]
    run(work, *few, *midpoints, "steps=4", "out=out/${sampler.name}_shared")
    kinds = {"predictor": "randomized_midpoint,parallel_midpoint", "corrector": "underdamped,midpoint,parallel"}
    options = [f"sampler.options.{name}={values}" for name, values in kinds.items()]
    options += ["sampler.options.clock=ou", "sampler.options.lipschitz=estimate", "sampler.options.step=0.5"]
    out = "out=out/${sampler.options.predictor}_${sampler.options.corrector}"
    run(work, *few, "sampler=predictor_corrector", "steps=3", *options, out)
    found = {f"real images {path.stem}": load_file(path) for path in sorted((work / "real").glob("*.safetensors"))}
    for folder in sorted(path for path in (work / "out").iterdir() if path.is_dir()):
        found[f"{folder.name} images"] = {path.name: pixels(path) for path in sorted(folder.rglob("*.png"))}
        found |= {f"{folder.name} {path.name}": load(path) for path in sorted(folder.glob("*.json"))}
    return found


def _report(work: Path) -> Items:
    """The pages of the family, of a level and of learning: words, entries of tables, pixels."""
    found = {}
    for folder in (RUN, RUN / "unet_xs", LEARNED.parent):
        remove(work, folder / "report.html")
        run(work, "-m", "mlem.report", folder)
        page = Page(work / folder / "report.html")
        found |= {f"{folder} words": page.words, f"{folder} tables": page.cells, f"{folder} pictures": page.pictures}
    return found


CHECKS: dict[str, Callable[[Path], Items]] = {
    "training": _training,
    "other training": _other_training,
    "calibration": _calibration,
    "coefficients": _coefficients,
    "memorised plans": _memorised,
    "error against time": _error_against_time,
    "scaling law": _scaling_law,
    "arithmetic": _arithmetic,
    "samples of solvers": _solvers,
    "samples of plans": _shared,
    "sample.py": _commands,
    "report": _report,
}
KEPT = ("training", "calibration", "coefficients", "memorised plans", "error against time")
"""Checks whose files those after them read."""
