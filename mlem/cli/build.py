"""From a checked config to the parts of a run."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf

from mlem.cli.config import on_devices, parse_indices, without_secrets, written
from mlem.cli.measure import measure_of
from mlem.data import BatchSource, Shards, held_out_batches, make_source, train_loader
from mlem.family import Family
from mlem.files import first_process, read_object, write_json, write_text
from mlem.level import Level
from mlem.multilevel.plan import Plan
from mlem.multilevel.spec import PlanSpec
from mlem.networks import unet
from mlem.provenance import provenance
from mlem.sampling import solver_of
from mlem.schedule import NoiseSchedule
from mlem.training.evaluation import SamplerChoice, SamplerEvaluation, refuse_duplicates
from mlem.training.loggers import JSONLinesLogger, wandb_logger


def image_shape(config: DictConfig) -> tuple[int, int, int]:
    """(C, H, W) without preparing the data."""
    return make_source(config.data.source, **config.data.options).shape


def schedule(config: DictConfig) -> NoiseSchedule:
    """The schedule that `schedule` describes."""
    options: dict[str, Any] = OmegaConf.to_container(config.schedule, resolve=True)  # type: ignore[assignment]
    if options["kind"] == "diffusers":
        options = {"kind": "diffusers", "config": read_object(options["file"])}
    return NoiseSchedule.from_config(options)


def new_level(config: DictConfig, size: str) -> Level:
    """A level with fresh weights, drawn from the seed."""
    shape = image_shape(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = unet(size, shape, config.model.dropout)
    return Level(size, network, schedule(config), shape, prediction=config.model.prediction, data=config.data.name)


def world_size_of(config: DictConfig) -> int:
    """How many ranks there will be. Raises ValueError when the batch cannot be shared by them."""
    trainer = on_devices(config, partial(pl.Trainer, logger=False, enable_checkpointing=False))
    world_size = trainer.world_size
    share = world_size * config.training.accumulate
    if config.training.batch_size % share:
        raise ValueError(
            f"training.batch_size must be a multiple of ranks x accumulate = {world_size} x "
            f"{config.training.accumulate}, got {config.training.batch_size}"
        )
    return world_size


def loggers(config: DictConfig, folder: Path, name: str, step: int | None) -> list[Any]:
    """JSON lines and W&B. Notes in the folder what runs there: code and config.

    step: the one that is resumed from, 0 for a beginning; None: what is measured is new, whatever was measured before.
    """
    plain, code = without_secrets(config), provenance()
    if first_process():
        write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
        now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        write_json(folder / "run.json", {"name": f"{plain['data']['name']}/{name}", **code, "time": now})
    wandb = wandb_logger(
        folder,
        project=config.logger.project,
        name=f"{config.data.name}/{name}",
        group=plain["root"],
        mode=config.logger.mode,
        resume_step=step,
    )
    if wandb is not None:
        wandb.log_hyperparams(plain | code)
    return [JSONLinesLogger(folder / "metrics.jsonl", step or 0), *([wandb] if wandb else [])]


class LoaderFromStep(pl.LightningDataModule):
    """Loads the batches that follow the trainer's step: order is a function of the step, so a resume is exact."""

    def __init__(self, shards: Shards, config: DictConfig) -> None:
        super().__init__()
        self._shards, self._training, self._seed = shards, config.training, config.seed
        self._train, self._held_out = shards.split(config.data.held_out)

    def train_dataloader(self) -> Any:
        trainer, options = self.trainer, self._training
        assert trainer is not None
        source = BatchSource(
            self._shards,
            self._train,
            batch_size=options.batch_size // options.accumulate,
            seed=self._seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start=trainer.global_step * options.accumulate,
        )
        return train_loader(source, options.workers)

    def val_dataloader(self) -> Any:
        trainer = self.trainer
        assert trainer is not None
        return held_out_batches(self._shards, self._held_out, 256, trainer.global_rank, trainer.world_size)

    test_dataloader = val_dataloader


TARGETS = ("budget", "mse", "delta")
_PLAN_OPTIONS = (
    *TARGETS,
    "probabilities",
    "coins",
    "estimator",
    "order",
    "levels",
    "cost",
    "batch_size",
    "seed",
    "per_sample",
)


def plan_of(config: DictConfig, model: Family | Level) -> Plan | PlanSpec | None:
    """What `plan=`, `budget=` and their like ask for; None for one level. Raises ValueError for what does not fit."""
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    options = {key: plain[key] for key in _PLAN_OPTIONS if key in plain and key not in ("batch_size", "seed")}
    own_dial = any(plain[key] is not None for key in ("mse", "delta", "plan"))
    if own_dial and plain["budget"] == plain["sampler"].get("budget"):
        options["budget"] = plain["budget"] = None  # the sampler's own budget gives way
    dials = [key for key in (*TARGETS, "plan") if plain[key] is not None]
    if not dials and plain["probabilities"] != "learned":
        shaping = [key for key in ("levels", "coins", "probabilities", "estimator", "order") if plain[key] is not None]
        shaping += [key for key, usual in (("per_sample", False), ("cost", "seconds")) if plain[key] != usual]
        if shaping:
            key, value = shaping[0], written(plain[shaping[0]])
            raise ValueError(f"{key}={value} shapes a multilevel plan: add budget=, such as budget=0.25")
        return None
    if not isinstance(model, Family):
        raise ValueError(
            f"{(dials or ['probabilities'])[0]}= shares work among levels, and model= is one; leave it out"
        )
    if config.level is not None:
        raise ValueError(f"level={config.level} runs one level, {(dials or ['probabilities'])[0]}= several; give one")
    if plain["plan"] is None:
        return PlanSpec.from_options(options | {"batch_size": plain["batch_size"], "seed": plain["seed"]}, "")
    shaping = [key for key in ("levels", "coins", "probabilities", "order") if plain[key] is not None]
    shaping += ["per_sample"] if plain["per_sample"] else []
    shaping += ["estimator"] if plain["estimator"] != plain["sampler"].get("estimator") else []
    if others := [key for key in dials if key != "plan"] + shaping:
        raise ValueError(f"plan={plain['plan']} is made already: leave out {others[0]}=")
    path = str(plain["plan"])
    return Plan.load(path) if path.endswith(".json") else model.fitted.plan_for(model, path)


def sampler_choices(config: DictConfig) -> list[SamplerChoice]:
    """The samplers that `evaluation.samplers` lists. Raises ValueError that names the entry."""
    choices = []
    for number, entry in enumerate(config.evaluation.samplers):
        name = f"evaluation.samplers[{number}]"
        known = {"solver", "steps", "grid", "plan", "options"}
        if not OmegaConf.is_dict(entry) or not {"solver", "steps"} <= set(entry) <= known:
            raise ValueError(
                f"{name} must be {{solver: name, steps: [n, ..], and, where wanted, grid: name, options: of it, "
                f"plan: options}}, got {entry}"
            )
        steps = entry.steps
        if not OmegaConf.is_list(steps) or not steps or not all(isinstance(n, int) and n >= 1 for n in steps):
            raise ValueError(f"{name}.steps must be a list of step counts >= 1, got {steps}")
        choices.append(_choice(name, entry))
    if not choices:
        raise ValueError("evaluation.samplers is empty: list one or more, such as [{solver: ddim, steps: [20]}]")
    refuse_duplicates(choices)
    return choices


def _choice(name: str, entry: Any) -> SamplerChoice:
    """One entry, whose shape is right. Raises ValueError that begins with `name`."""
    plain: dict[str, Any] = OmegaConf.to_container(entry, resolve=True)  # type: ignore[assignment]
    plan, options = plain.get("plan"), plain.get("options")
    for key, value in (("plan", plan), ("options", options)):
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name}.{key} must be options, such as {key}: {{name: value}}, got {value}")
    spec = PlanSpec.from_options(plan, f"{name}.plan: ") if plan else None
    try:
        solver_of(plain["solver"], **(options or {}))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error
    return SamplerChoice(plain["solver"], tuple(plain["steps"]), plain.get("grid"), spec, options or {})


def evaluation(config: DictConfig, shards: Shards, folder: Path) -> SamplerEvaluation:
    """The sampler evaluation that `evaluation` and `metric` describe, writing into `folder`."""
    options = config.evaluation
    return SamplerEvaluation(
        sampler_choices(config),
        parse_indices(options.indices, "evaluation.indices"),
        folder,
        batch_size=options.batch_size,
        seed=config.seed,
        reference_steps=options.reference_steps,
        every_n_epochs=max(1, options.every_n_epochs),
        measure=measure_of(config, shards),
    )
