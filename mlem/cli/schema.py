"""Every option of the two commands: its name, default, allowed values and meaning.

A class is a group of options; its fields are the options. Defaults, checks, `--help` and typed values all derive from
this file. Fields without a default get their values from the choices in `configs/`.
The options of plans are the fields of `PlanSpec`. Nothing here imports torch or Hydra.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from mlem.arguments import MOST_STEPS
from mlem.cli.fields import group, option
from mlem.cli.values import (
    BOOL,
    DEVICES,
    FRACTION,
    INDICES,
    LIST,
    NUMBER,
    OPTIONS,
    SEED,
    SHARE,
    SIZES,
    TEXT,
    TWO_NUMBERS,
    Kind,
    list_of_whole,
    number,
    one_of,
    text,
    whole,
)
from mlem.cli.verbs import Benchmark, Scaling, Verb

__all__ = [
    "Benchmark",
    "Calibration",
    "Data",
    "Learning",
    "Metric",
    "Network",
    "Networks",
    "Sample",
    "Scaling",
    "Train",
    "Trainer",
    "Training",
]

GRIDS = "uniform, log_snr, karras, flow, ou_uniform, ou_halving, trailing, leading; null: the solver's own choice"
PREDICTIONS = ("v", "eps", "x0", "edm", "flow")
PLAN_ONLY = ("benchmark", "scaling")
"""Choices of `eval` that make no samples and reject the options of samples."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data set."""

    name: str = option(TEXT)
    source: str = option(TEXT)
    folder: str = option(TEXT)
    held_out: int = option(whole(0), "images kept for validation")
    options: dict[str, Any] = option(OPTIONS, "options of the source, such as data.options.size=64")


@dataclass(frozen=True, kw_only=True)
class _Architecture:
    """The networks of levels."""

    name: str = option(TEXT)
    prediction: str = option(one_of(*PREDICTIONS), f"what networks predict: {', '.join(PREDICTIONS)}")
    dropout: float = option(FRACTION, "dropout probability in training")
    architecture: str = option(one_of("unet", "dit"), "unet or dit", "unet")
    conditional: bool = option(BOOL, "class-conditional networks: pass them the class of each image", False)
    attention: bool = option(BOOL, "UNets as in Ho et al. (2020), with attention; for images of 32x32 or more", False)


@dataclass(frozen=True, kw_only=True)
class Network(_Architecture):
    """One level."""

    several: ClassVar = False  # whether the result is a family
    size: str = option(TEXT)

    @property
    def sizes(self) -> list[str]:
        """Sizes of the levels to train."""
        return [self.size]


@dataclass(frozen=True, kw_only=True)
class Networks(_Architecture):
    """Several levels, trained in turn."""

    several: ClassVar = True
    levels: list[str] = option(SIZES)
    level_steps: list[int] | None = option(
        list_of_whole(1).or_null(),
        "optimizer steps of each level, such as [20000,5000]; null: training.steps of all",
        None,
    )
    distillation_steps: int = option(
        whole(0), "last optimizer steps of each smaller level, which then learns the outputs of the largest", 0
    )

    @property
    def sizes(self) -> list[str]:
        """Sizes of the levels to train."""
        return self.levels


@dataclass(frozen=True, kw_only=True)
class Learning:
    """The coefficients of a trained family."""

    names: ClassVar = ("coefficients",)

    name: str = option(TEXT)
    solver: str = option(TEXT, "solver for which the coefficients are learned")
    steps: int = option(whole(1, MOST_STEPS), "steps of the solver")
    grid: str | None = option(text(null=True), GRIDS)
    coins: str = option(
        one_of("bernoulli", "systematic"), "coins used for learning; gradients with systematic coins are noisy"
    )
    budget: float = option(SHARE, "starting point: share of the largest level's cost (FLOPs), in (0, 1]")
    knots: int = option(
        whole(0, 20), "knots of each law, piecewise linear in log-SNR; 0: alpha_k u(t) + beta_k, as published"
    )
    weight: float | None = option(
        number(above=0).or_null(),
        "weight of the cost: MSE traded for the cost of one plain sample; null: keeps about the budget",
        name="lambda",
    )
    updates: int = option(whole(1), "optimizer steps; dry_run=true estimates their time")
    batch_size: int = option(whole(1), "images per step, over all ranks")
    draws: int = option(whole(2), "draws of the coins per step; with tangents=reverse, per image")
    images: int = option(whole(1), "images to learn from, used in turn")
    learning_rate: float = option(number(above=0), "learning rate of Adam, decaying linearly to 0")
    tangents: str = option(
        one_of("reverse", "exact", "random"),
        "reverse: first order, minutes; exact, random: unbiased, along all coefficients or one per draw",
    )
    held_out: int = option(
        whole(2), "images for the final evaluation, and as many others to accept or drop the updates"
    )
    checkpoint_every: int = option(whole(1), "optimizer steps between checkpoints, and between lines of progress")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The noise schedule; its options depend on its kind."""

    kind: str = option(TEXT)
    offset: float | None = option(NUMBER, "cosine schedule: offset", None)
    log_snr_min: float | None = option(NUMBER, "cosine schedule: log-SNR at t = 1", None)
    beta_start: float | None = option(NUMBER, "linear schedule: first beta", None)
    beta_end: float | None = option(NUMBER, "linear schedule: last beta", None)
    num_timesteps: int | None = option(whole(2), "linear schedule: number of timesteps", None)
    sigma_min: float | None = option(NUMBER, "edm schedule: noise-to-signal ratio of the first timestep", None)
    sigma_max: float | None = option(NUMBER, "edm schedule: noise-to-signal ratio of the last", None)
    shift: float | None = option(NUMBER, "flow schedule: above 1, more time at high noise", None)
    file: str | None = option(TEXT, "diffusers schedule: path of a scheduler_config.json", None)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Devices and precision."""

    accelerator: str = option(TEXT, "auto, cpu, gpu or another of Lightning's")
    devices: int | str | list[int] = option(DEVICES, "how many, which ones, or auto")
    strategy: str = option(TEXT, "auto, ddp or another of Lightning's")
    num_nodes: int = option(whole(1), "machines; above 1: docs/cluster.md")
    precision: str = option(one_of("fp32", "bf16", "fp16"), "fp32, bf16 or fp16")
    compile: bool = option(BOOL, "compile the networks")

    def place(self) -> dict[str, Any]:
        """Arguments of Lightning's Trainer and Fabric about the machines."""
        return {name: getattr(self, name) for name in ("accelerator", "devices", "strategy", "num_nodes")}


@dataclass(frozen=True, kw_only=True)
class Logger:
    """Where metrics go, besides metrics.jsonl."""

    mode: str = option(
        one_of("auto", "online", "offline", "disabled"), "mode of W&B; auto: online with a key, else offline"
    )
    project: str = option(TEXT, "of W&B")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The score of samples against real images."""

    features: str | None = option(
        text(null=True), "random256, inception or dinov2; null: no metrics", unused=("scaling",)
    )
    kid: bool = option(BOOL, "also KID, from the same features")
    precision_recall: bool = option(BOOL, "also precision and recall, from the same features")
    blocks: int = option(whole(1), "above 1: also mean and spread over this many disjoint blocks of samples")
    reference: int | None = option(
        whole(2).or_null(), "number of real images to compare with, from the first; null: all"
    )
    cache: str = option(TEXT, "folder of the reference statistics")
    weights: str | None = option(
        text(null=True), "Inception: path of the file, null: the torch hub cache; DINOv2: path of the folder"
    )
    sha256: str | None = option(
        text(null=True),
        "SHA-256 of the weights, 8 digits or more; null: the original Inception, any DINOv2",
    )


@dataclass(frozen=True, kw_only=True)
class SamplerChoice:
    """The solver. shared: options of plans set by the choice."""

    name: str = option(TEXT, unused=PLAN_ONLY)
    solver: str = option(TEXT, unused=PLAN_ONLY)
    steps: int = option(whole(1, MOST_STEPS), "short: steps=")
    grid: str | None = option(text(null=True), "short: grid=")
    over: str = option(
        one_of("samples", "ranks"), "what is split over ranks: samples, or the rows of every call (ranks)", "samples"
    )
    options: dict[str, Any] = option(
        OPTIONS, "options of the solver, such as sampler.options.clock=ou", {}, unused=PLAN_ONLY
    )
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance of class-conditional levels, or of any level by a weaker one."""

    scale: float | None = option(NUMBER.or_null(), "s in uncond + s (cond - uncond); null: no guidance", None)
    weak: str | None = option(
        text(null=True), "autoguidance: name of the cheapest level; null: guide by no class", None
    )
    interval: list[float] | None = option(
        TWO_NUMBERS.or_null(),
        "noise-to-signal ratios between which it acts, as [0.2,5]; null: everywhere",
        None,
    )


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training of a level."""

    steps: int = option(whole(1), "optimizer steps", 1000)
    batch_size: int = option(whole(1), "images per step, over all ranks", 128)
    accumulate: int = option(whole(1), "batches per step, each of batch_size / accumulate images", 1)
    learning_rate: float = option(number(above=0), "learning rate of Adam, after the warm-up", 2.0e-3)
    warmup_steps: int = option(whole(0), "steps in which the learning rate rises", 50)
    weight_decay: float = option(number(least=0), "of AdamW", 0.01)
    gradient_clip: float = option(number(least=0), "largest norm of the gradient; 0: off", 1.0)
    average_decay: float = option(FRACTION, "decay of the averaged weights", 0.995)
    beta2: float = option(FRACTION, "Adam's decay of averaged squared gradients", 0.99)
    final_rate: float = option(SHARE, "share of the learning rate left at the end; 1: constant", 0.1)
    label_dropout: float = option(FRACTION, "with model.conditional: share of images with the class withheld", 0.1)
    flip: bool = option(BOOL, "mirror every image with probability 1/2, left to right", False)
    epoch_steps: int = option(whole(1), "optimizer steps between validations", 200)
    checkpoint_every: int = option(
        whole(1), "optimizer steps between checkpoints; also one before each validation", 200
    )
    workers: int = option(whole(0), "processes that read data ahead", 0)


_USUAL_SAMPLERS = [
    {"solver": "ddpm", "steps": [20]},
    {"solver": "ddim", "steps": [20]},
    {"solver": "dpm_solver_pp", "steps": [10, 20]},
]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured during and after training."""

    every_n_epochs: int = option(whole(0), "during training; 0: only at the end", 5)
    indices: str = option(INDICES, "indices of the samples", "0-63")
    batch_size: int = option(whole(1), "images per batch", 64)
    reference_steps: int = option(whole(1, MOST_STEPS), "steps of the reference", 200)
    samplers: list[Any] = option(
        LIST, "solver and step counts; optionally grid, options; plan, running, forecast or reuse", _USUAL_SAMPLERS
    )


_IMAGES = Kind("a whole number >= 2, or 0 for none", lambda value: whole(0).holds(value) and value != 1)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The calibration of a family after training: costs of its levels and differences between them."""

    images: int = option(_IMAGES, "trajectories; 0: no calibration", 16)
    times: int = option(whole(3), "noise levels along them", 24)
    batch_sizes: list[int] = option(list_of_whole(1), "batch sizes at which levels are timed", [64])
    reference_steps: int = option(whole(1, MOST_STEPS), "steps of the reference for discretisation errors", 500)


_RESUME = "auto, force (even if settings differ), or the path of a checkpoint"


@dataclass(frozen=True, kw_only=True)
class Train:
    """A run of `train.py`. told: the config as plain data, for files, with environment variables left as names."""

    data: Data = group(Data)
    model: Network | Networks | Learning = group(Network, Networks, Learning)
    schedule: dict[str, Any] = group(Schedule)
    trainer: Trainer = group(Trainer)
    logger: Logger = group(Logger)
    metric: Metric = group(Metric)
    seed: int = option(whole(0, SEED), "seed of all noise and of the initial weights", 0)
    root: str = option(TEXT, "where runs are written: <root>/<model>, <root>/family", "runs/${data.name}")
    family: str | None = option(
        text(null=True),
        "of model=coefficients: folder of a family; null: that of root, or the newest of this data set",
        None,
    )
    training: Training = group(Training)
    evaluation: Evaluation = group(Evaluation)
    calibration: Calibration = group(
        Calibration, words="calibration of a family after training: costs of levels and their differences"
    )
    callbacks: list[Any] = option(
        LIST, "further Lightning callbacks, as [{_target_: lightning.pytorch.callbacks.LearningRateMonitor}]", []
    )
    allow: list[str] = option(
        LIST, "further modules, besides lightning, torch, torchmetrics, diffusers and mlem, for a _target_", []
    )
    resume: str = option(TEXT, _RESUME, "auto")
    dry_run: bool = option(BOOL, "only print the config, parameters, FLOPs and the estimated time", False)
    debug: bool = option(BOOL, "show tracebacks", False)
    told: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A run of `sample.py`. shared: the options of plans."""

    data: Data = group(Data)
    model: Network | Networks | Learning | None = group(Network, Networks, Learning, default=None)
    sampler: SamplerChoice = group(SamplerChoice)
    trainer: Trainer = group(Trainer)
    metric: Metric = group(Metric)
    eval: Verb = group(Verb, Benchmark, Scaling)
    root: str = option(
        TEXT, "where samples are written: <root>/samples; of family=pretrained:NAME: runs/NAME", "runs/${data.name}"
    )
    family: str | None = option(
        text(null=True),
        "folder of a family, or pretrained:NAME; null: that of root, the newest of its data, or the level of model=",
        None,
    )
    level: str | None = option(text(null=True), "the level of the family to run; null: the largest", None)
    guidance: Guidance = group(Guidance)
    labels: str | None = option(
        INDICES.or_null(), "classes of the samples, in turn, such as 3 or 0-9; null: every class", None, PLAN_ONLY
    )
    conditions: str | None = option(
        text(null=True),
        "safetensors file of conditions: NAME or LEVEL/NAME, rows used by samples in turn",
        None,
        PLAN_ONLY,
    )
    shared: dict[str, Any] = field(default_factory=dict, metadata={"plans": True})
    seconds: float | None = option(
        number(above=0).or_null(), "target of sampler=auto: wall-clock seconds per image; or use mse=", None, PLAN_ONLY
    )
    plan: str | None = option(text(null=True), "best (memorised with the family), or a plan's JSON file", None)
    steps: int = option(whole(1, MOST_STEPS), "steps of the solver", "${sampler.steps}", PLAN_ONLY)
    grid: str | None = option(text(null=True), GRIDS, "${sampler.grid}", PLAN_ONLY)
    seeds: str = option(INDICES, "indices of the samples: ranges and commas", "0-63", ("scaling",))
    seed: int = option(whole(0, SEED), "seed of all noise: index and seed fix an image", 0)
    batch_size: int = option(whole(1), "images per batch", 64, ("scaling",))
    out: str | None = option(
        text(null=True), "null: <root>/samples/<sampler>_<steps>; with eval=folder: where metrics.json goes", None
    )
    format: str = option(
        one_of("png", "shards", "npz"),
        "also pack the PNGs: shards (WebDataset) or npz (ADM's layout), in the order of seeds=",
        "png",
        PLAN_ONLY,
    )
    folder: str | None = option(text(null=True), "with eval=folder: the images", None)
    debug: bool = option(BOOL, "show tracebacks", False)
