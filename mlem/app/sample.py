"""`python sample.py`: sample from a trained family or level, to PNGs, on any number of ranks."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mlem.app.build import plan_of
from mlem.app.cli import USAGE
from mlem.app.config import parse_indices
from mlem.app.find import family_folder
from mlem.family import Family, Level
from mlem.files import first_process, sha256
from mlem.multilevel.calibrate import Calibration
from mlem.multilevel.predict import Predictor
from mlem.outputs import claim, finish, write_samples
from mlem.sampling import Ledger, Sampler


def run(config: DictConfig) -> None:
    """Make the samples that `config` asks for, those that are not there yet; it was checked already."""
    indices = parse_indices(config.seeds, "seeds")
    folder, model = find_model(config)
    from lightning.fabric import Fabric
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    devices = {name: config.trainer[name] for name in ("accelerator", "devices", "strategy")}
    try:
        fabric = Fabric(**devices)
    except MisconfigurationException as error:
        raise ValueError(f"trainer: {error}") from error
    plan = plan_of(config, model)
    if isinstance(model, Family) and plan is None:
        model = model.level(config.level)
    if config.trainer.compile:
        for level in model.levels if isinstance(model, Family) else [model]:
            level.network.compile()
    sampler = Sampler(
        model,
        solver=config.sampler.solver,
        steps=config.steps,
        grid=config.grid,
        seed=config.seed,
        level=config.level if isinstance(model, Family) else None,
        plan=plan,
        device=fabric.device,
        precision=config.trainer.precision,
    )
    out = Path(config.out or f"{config.root}/samples/{config.sampler.name}_{config.steps}")
    # all that may be refused is refused before there are other ranks, which would wait for this one
    if first_process():
        claim(out, _settings(config, model, folder, sampler))
    fabric.launch()
    fabric.barrier()
    with _progress(len(indices), fabric.world_size, fabric.is_global_zero) as advance:
        ledger, failure = write_samples(
            sampler,
            indices,
            out,
            batch_size=config.batch_size,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            advance=advance,
        )
    gathered, failed = _gather(fabric, ledger, failure)
    if fabric.is_global_zero:
        _report(finish(out, indices, gathered), gathered, model, sampler, out)
    fabric.barrier()
    if failed is not None and fabric.is_global_zero:
        raise FloatingPointError(failed)
    if failed is not None:
        raise SystemExit(USAGE)  # rank 0 says why


def find_model(config: DictConfig) -> tuple[Path, Family | Level]:
    """The folder and the family or level that `family=`, `model=` or `data=` names. Raises FileNotFoundError."""
    model = OmegaConf.select(config, "model.name")
    for other in ("family", "level") if model is not None else ():
        if config[other] is not None:
            raise ValueError(f"model={model} is one level by itself: leave out {other}={config[other]}")
    if model is not None:
        if "size" not in config.model:
            raise ValueError(f"model={model} is no level by itself: leave it out, and family= or data= name a family")
        folder = Path(config.root) / model / "level"
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist; make it with: python train.py model={model}")
        return folder, Level.load(folder)
    folder = family_folder(config)
    return folder, Family.load(folder)


def _settings(config: DictConfig, model: Family | Level, folder: Path, sampler: Sampler) -> dict[str, Any]:
    """What decides the bytes of an image."""
    if isinstance(model, Family):
        assert sampler.plan is not None
        table = json.dumps(sampler.plan.to_dict() | {"about": {}}, sort_keys=True)
        own = {"plan": hashlib.sha256(table.encode()).hexdigest()[:16], "weights": model.weights_hash}
    else:
        weights = next(path for path in (folder / f"level_{model.name}", folder) if (path / "mlem.json").exists())
        own = {"level": model.name, "weights": sha256(weights / "diffusion_pytorch_model.safetensors")}
    return own | {
        "solver": config.sampler.solver,
        "steps": config.steps,
        "grid": sampler.grid.name,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "precision": config.trainer.precision,
    }


class _progress:
    """A bar of images done, in rank 0; called with the number of images."""

    def __init__(self, total: int, world_size: int, shown: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), disable=not shown)
        self._task = self._bar.add_task("sampling", total=total, speed="")
        self._world_size = world_size

    def __enter__(self) -> _progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, images: int) -> None:
        # ranks go at the same pace: rank 0 speaks for all
        task = self._bar.tasks[0]
        done = min(images * self._world_size, int(task.total or 0) - int(task.completed))
        seconds = max(task.elapsed or 0.0, 1e-9)
        self._bar.update(self._task, advance=done, speed=f"{(task.completed + done) / seconds:.1f} images/s")


def _gather(fabric: Any, ledger: Ledger, failure: Exception | None) -> tuple[Ledger, str | None]:
    """The cost on all ranks together, and the first failure."""
    mine = (ledger.to_dict(), None if failure is None else str(failure))
    everyone: list[Any] = [mine]
    if fabric.world_size > 1:
        import torch.distributed as distributed

        everyone = [None] * fabric.world_size
        distributed.all_gather_object(everyone, mine)
    total = Ledger()
    for one, _ in everyone:
        total.add(Ledger.from_dict(one))
    return total, next((text for _, text in everyone if text is not None), None)


def _report(total: dict[str, Any], now: Ledger, model: Family | Level, sampler: Sampler, out: Path) -> None:
    if not now.images:
        print(f"nothing to do: every sample is in {out}")
        return
    milliseconds = 1e3 * now.wall_seconds / now.images
    levels = "+".join(now.levels)
    print(
        f"{now.images} images computed, level {levels}, {now.evaluations:g} network calls each, "
        f"{milliseconds:.2f} ms/image ({100 * now.network_seconds / now.wall_seconds:.1f} percent of it in the network)"
    )
    if isinstance(model, Family):
        _report_plan(now, model, sampler)
    print(f"pictures: {out}, side by side: {out / 'grid.png'}")
    print(f"cost of the {total['images']} images computed so far: {out / 'ledger.json'}")


def _report_plan(now: Ledger, family: Family, sampler: Sampler) -> None:
    """Calls of each level, and what the largest level alone could do for that cost."""
    plan, top = sampler.plan, family.level()
    assert plan is not None
    for name, cost in now.levels.items():
        print(
            f"  level {name}: {cost.calls / now.images:g} calls an image "
            f"(expected {cost.expected_calls / now.images:.4g}), {1e3 * cost.seconds / now.images:.2f} ms/image in it"
        )
    flops = sum(cost.flops for cost in now.levels.values()) / now.images / top.flops
    print(
        f"  in all {flops:.4g} evaluations of level {top.name} by FLOPs, where it alone would make {plan.evaluations}"
    )
    predicted = plan.about.get("predicted_mse")
    own = {"solver": sampler.solver.name, "steps": sampler.grid.steps, "grid": sampler.grid.name}
    known = family.fitted.get("calibration", {}).get("about", {}).get("weights") == family.weights_hash
    # a memorised plan may run where it was not made for, or with a family that was calibrated no more
    if predicted is not None and known and own.items() <= plan.about.items():
        predictor = Predictor(Calibration.of(family), family.schedule, sampler.solver, sampler.grid)
        alone = predictor.discretisation_at(max(1, round(flops)))
        print(
            f"  predicted mean squared error {predicted:.2g}; {sampler.solver.name} with level {top.name} alone in "
            f"{max(1, round(flops))} steps, at the same cost: {alone:.2g}"
        )
