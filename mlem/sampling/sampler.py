"""The `Sampler`, which binds a solver to a model and keeps the ledger of what it costs.

It builds on denoisers, solvers and noise, and is independent of files, metrics and training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mlem.arguments import called
from mlem.conditions import ConditionSource
from mlem.denoiser import Denoiser, of_rows
from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.ledger import Ledger
from mlem.level import Level
from mlem.multilevel.denoiser import MultilevelTrajectory
from mlem.multilevel.identity import plan_for_use
from mlem.multilevel.plan import Plan
from mlem.multilevel.planner import check_estimator
from mlem.multilevel.spec import PlanSpec
from mlem.networks import Reuse, evaluating
from mlem.noise import check_indices
from mlem.reusing import reusing
from mlem.sampling.hooks import Hooks, Revise, Start, Watch, started
from mlem.sampling.metered import MeteredModel, Model
from mlem.sampling.nonfinite import FirstFailure, suspects
from mlem.sampling.spreading import own_rows, spread_rows
from mlem.schedule import NoiseSchedule
from mlem.solvers import (
    EvaluationPoint,
    GridPoint,
    ScatteredPoints,
    Solver,
    denoiser_at,
    make_solver,
    model_input,
    quadrature_weights,
)
from mlem.trajectory import SIGNAL_LEFT, starting_noise, trajectory, warn_of_signal

__all__ = ["PRECISIONS", "NonFiniteError", "Result", "Sampler", "solver_of"]

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions of the network (autocast); times, noise and the sum over steps keep full precision."""


@dataclass
class Result:
    """x: (N, *shape), not clipped. x_T: the starting noise, if requested. ledger: what it cost."""

    x: Tensor
    ledger: Ledger
    x_T: Tensor | None = None


class NonFiniteError(FloatingPointError):
    """A sample became NaN or infinite. `result` holds the other samples, `indices` their sample indices."""

    def __init__(self, message: str, result: Result, indices: list[int]) -> None:
        super().__init__(message)
        self.result, self.indices = result, indices


class Sampler:
    """A solver bound to a model, a grid and a seed; `run(indices)` returns the samples with these indices.

    Samples are float32, or float64 if that is torch's default dtype. Arguments are those of `sample`.

    Args:
        plan: a Plan with one row per evaluation, or a specification, from which a plan is made.
        spread: under torch.distributed, every rank runs the same samples and evaluates its share of the rows of each
            call, which pays for solvers with many rows per call.

    Raises: ValueError for options out of range.
    """

    @called("Sampler")
    def __init__(
        self,
        model: Model,
        *,
        solver: str | Solver = "ddim",
        steps: int = 50,
        seed: int = 0,
        grid: str | TimeGrid | None = None,
        level: str | None = None,
        plan: Plan | PlanSpec | None = None,
        reuse: Reuse | None = None,
        schedule: NoiseSchedule | None = None,
        shape: Sequence[int] | None = None,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        spread: bool = False,
        conditions: ConditionSource | None = None,
        start: Start | None = None,
        watch: Watch | None = None,
        revise: Revise | None = None,
    ) -> None:
        _check_choices(model, seed, precision, level, plan)
        whole = model
        if reuse is not None:
            model, level = _reusing(model, level, plan, reuse), None
        if isinstance(model, Family | Level):
            own = model.denoiser.schedule if isinstance(model, Level) else model.schedule
            schedule, shape = schedule or own, shape or model.shape
        if schedule is None or shape is None:
            raise ValueError("a bare denoiser does not know its schedule and sample shape; pass schedule= and shape=")
        self.solver = solver_of(solver)
        self.schedule, self.shape, self.seed = schedule, tuple(shape), seed
        self.grid = self.solver.grid(schedule, steps, grid)
        self.points = GridPoint.of(schedule, self.grid)
        self.reuse, self._first, self._watch, self._change = reuse, start, watch, revise
        if start is None:
            _check_beginning(schedule, self.grid)
        if not self.solver.sequential and (watch is not None or revise is not None):
            raise ValueError(f"{self.solver.name} solves for many times at once: leave out watch= and revise=")
        if not self.solver.sequential and reuse is not None:
            raise ValueError(f"{self.solver.name} solves for many times at once: leave out reuse")
        self.plan = None if plan is None else self._fitting(whole, plan, spread, reuse)
        if self.plan is not None and self.plan.per_sample and reuse is not None:
            raise ValueError("reuse= keeps features of a batch, but per_sample coins run part of it; leave one out")
        self._model = self._metered(model, level)
        _refuse_other_schedule(schedule, self._model.schedule)
        self.device = self._model.device if device is None else torch.device(device)
        self._model.networks.to(self.device)
        self.precision, self.conditions, self._spread, self._rounds = precision, conditions, spread, 0
        self._input_dtype = torch.float64 if self._model.any_dtype else torch.get_default_dtype()
        if self.points[0].pure_noise and self._input_dtype != torch.float64:
            raise ValueError(
                "sampling starts from pure noise, where a noise estimate in float32 says nothing about the data; "
                "give the denoiser any_dtype = True and compute in float64, or use a grid from below t = 1"
            )
        self._quadrature: list[float] | None = None
        if self.plan is not None and self.plan.moves_state:
            self._quadrature = quadrature_weights(self.solver, schedule, self.points)[0].tolist()

    def _metered(self, model: Model, level: str | None) -> MeteredModel:
        if not isinstance(model, Family):
            return MeteredModel.of(model)
        return MeteredModel.of(model.level(level)) if self.plan is None else MeteredModel.under(model, self.plan)

    def _fitting(self, model: Model, plan: Plan | PlanSpec, spread: bool, reuse: Reuse | None) -> Plan:
        """The plan, made where it is a specification. Raises ValueError where it cannot be followed."""
        if not isinstance(model, Family):
            raise ValueError("plan= chooses between the levels of a family, but the model is not a Family; drop it")
        plan = plan_for_use(plan, model, self.solver, self.points, reuse)
        check_estimator(self.solver, self.points, plan.estimator)
        evaluations = self.solver.evaluations(self.points)
        if plan.evaluations != evaluations:
            raise ValueError(
                f"the plan has {plan.evaluations} rows, but {self.solver.name} in {self.grid.steps} steps evaluates "
                f"{evaluations} times; draw it for these steps, or pass family.plan(...), which fits any"
            )
        if spread:
            _refuse_spread(plan)
        return plan

    @property
    def levels(self) -> list[str]:
        """Names of the levels that may run."""
        return list(self._model.meters)

    def start(self, indices: Tensor) -> Tensor:
        """The start of these samples, noise x_T ~ N(0, I) unless `start` says otherwise: (B,) -> (B, *shape)."""
        return started(self._first, indices, starting_noise(self.seed, indices, self.shape))

    @property
    def _shared(self) -> bool:
        """Whether ranks share the rows of each call."""
        return self._spread and torch.distributed.is_initialized()

    def run(self, indices: Sequence[int]) -> Result:
        """The samples with these indices, as one batch.

        Args:
            indices: whole numbers in [0, 10**9); those above are reserved for calibration and the like.

        Raises:
            NonFiniteError: a sample became NaN or infinite; names sample, step, time and level.
            ValueError: indices out of range.
        """
        begin = time.perf_counter()
        self._model.collect(0, None)  # left by an aborted run
        with torch.inference_mode(), evaluating(self._model.networks):
            index = torch.as_tensor(check_indices(indices), dtype=torch.int64, device=self.device)
            x_T, self._rounds = self.start(index), 0
            x = self._solve(x_T, index, self._watch)
            # only here does the host wait for the device
            finite: list[bool] = torch.isfinite(x.flatten(1)).all(1).tolist()
            # levels that share a call run one after another
            rounds = self._rounds if self.plan is None else self._model.rows / len(index)
            levels = self._model.collect(len(index), self.plan)
            result = Result(x, Ledger(levels, time.perf_counter() - begin, len(index), rounds), x_T)
            if not all(finite):
                raise self._non_finite(result, x_T, index, finite)
        return result

    def _solve(self, x_T: Tensor, index: Tensor, watch: Watch | None) -> Tensor:
        hooks = Hooks(self.points, index, self._change, watch)
        revise = None if self._change is None else hooks.revise
        if self._model.multilevel is None:
            denoiser = self._model.denoiser_for(index, self.conditions)
            estimate = partial(self._estimate, partial(denoiser_at, denoiser))
        else:
            # under a plan every call is for the whole batch; levels get the rows that this rank evaluates
            told = index[own_rows(len(index))] if self._shared else index
            self._model.begin()
            run = self._model.multilevel.begin(told, self._quadrature, self.conditions)
            estimate, revise = partial(self._estimate, run.denoiser_at), partial(self._revise, run, revise)
        seen = None if watch is None else hooks.watch
        start = x_T.contiguous(memory_format=torch.channels_last) if x_T.dim() == 4 else x_T
        x = trajectory(estimate, self.solver, self.points, start, index, self.seed, revise=revise, watch=seen)
        return x.to(x_T.dtype)

    def _estimate(self, at: Callable[[EvaluationPoint], Denoiser], y: Tensor, place: EvaluationPoint) -> Tensor:
        self._rounds += 1
        denoiser = at(place)
        if isinstance(place, ScatteredPoints):
            denoiser = of_rows(denoiser, place.rows)
        x, t = model_input(self.schedule, y, place)
        if self._input_dtype != torch.float64:
            x, t = x.to(self._input_dtype), t.to(self._input_dtype)
        if self._shared:
            return spread_rows(lambda mine: self._denoise(of_rows(denoiser, mine), x[mine], t[mine]), len(x))
        return self._denoise(denoiser, x, t)

    def _denoise(self, denoiser: Denoiser, x: Tensor, t: Tensor) -> Tensor:
        """eps of all rows, in calls of at most `solver.chunk` rows."""
        chunk = self.solver.chunk or len(x)
        with self._autocast():
            if chunk >= len(x):
                return denoiser(x, t)
            some = [slice(i, i + chunk) for i in range(0, len(x), chunk)]
            return torch.cat([of_rows(denoiser, part)(x[part], t[part]) for part in some])

    def _revise(
        self,
        run: MultilevelTrajectory,
        after: Callable[[Tensor, GridPoint], Tensor] | None,
        y: Tensor,
        point: GridPoint,
    ) -> Tensor:
        with self._autocast():
            y = run.revise(y, point)
        if after is None:
            return y
        before, y = y, after(y, point)
        run.changed(before, y)
        return y

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _non_finite(self, result: Result, x_T: Tensor, index: Tensor, finite: list[bool]) -> NonFiniteError:
        """Locate the failure by running the batch again, watched; keyed noise makes it fail in the same place."""
        failure = FirstFailure()
        with suspects(self._model.meters) as found:
            self._solve(x_T, index, failure)
        self._model.collect(0, None)  # the second run does not count as cost of the samples
        step = self.grid.steps - 1 if failure.step is None else failure.step
        row = finite.index(False) if failure.row is None else failure.row
        keep = [row for row, good in enumerate(finite) if good]
        return NonFiniteError(
            f"sample {int(index[row])} became NaN or infinite at step {step + 1} of {self.grid.steps} "
            f"(t = {self.grid.times[step]:.4g}), level {'+'.join(found[:1] or self._model.meters)}; "
            f"{finite.count(False)} of {len(finite)} samples of this batch are lost; try precision=fp32 or another "
            "solver",
            Result(result.x[keep], result.ledger, x_T[keep]),
            index[keep].tolist(),
        )


def _check_choices(model: Model, seed: int, precision: str, level: str | None, plan: Plan | PlanSpec | None) -> None:
    """Raise ValueError for options out of range or not available for this kind of model."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not isinstance(seed, int):
        raise ValueError(f"seed must be a whole number, got {seed!r}")
    if plan is not None and level is not None:
        raise ValueError(f"level={level!r} runs one level, plan= several; pass only one of them")
    if level is not None and not isinstance(model, Family):
        raise ValueError(f"level={level!r} chooses within a family, but the model is not a Family; leave out level")


def _reusing(model: Model, level: str | None, plan: Plan | PlanSpec | None, reuse: Reuse) -> Level | Family:
    """The level that reuses features; under a plan, the family whose largest does. Raises ValueError if impossible."""
    if isinstance(model, Family) and plan is not None:
        return model.reusing(reuse)
    if isinstance(model, Family):
        model = model.level(level)
    if not isinstance(model, Level):
        raise ValueError("reuse= needs the network of a Level, but the model is a bare denoiser; leave out reuse")
    return reusing(model, reuse).level


def _check_beginning(schedule: NoiseSchedule, grid: TimeGrid) -> None:
    """Warn if x at the grid's first time is not quite pure noise; reject partial grids without a start."""
    t = grid.times[0]
    # diffusers' leading grid always begins below t = 1, and was chosen by name
    if t < 1 and grid.name != "leading" and schedule.alpha(t).item() ** 2 > SIGNAL_LEFT:
        raise ValueError(
            f"the grid begins at t = {t:.3g}, where samples are not pure noise: pass start= "
            "(mlem.sampling.noised for images), or use a grid from t = 1"
        )
    warn_of_signal(schedule, t)


def _refuse_spread(plan: Plan) -> None:
    """Raise ValueError for a plan that needs all rows of a call on one rank."""
    if plan.moves_state or plan.per_sample:
        kind = "per_sample=True" if plan.per_sample else f"estimator={plan.estimator}"
        raise ValueError(f"spread=True splits the rows of a call among ranks, but {kind} needs all; leave out spread")


def _refuse_other_schedule(given: NoiseSchedule, own: NoiseSchedule | None) -> None:
    """Raise ValueError if the model declares a different schedule."""
    if own is not None and own.fingerprint != given.fingerprint:
        raise ValueError(f"schedule= is {given.to_config()}, but the model has {own.to_config()}; leave out schedule")


def solver_of(solver: str | Solver, **options: object) -> Solver:
    """`make_solver`, for diffusers' schedulers too (`diffusers:ClassName`). Raises ValueError for unknown options."""
    if isinstance(solver, str) and solver.startswith("diffusers:"):
        from mlem.interop.diffusers import DiffusersSolver

        return DiffusersSolver(solver.removeprefix("diffusers:"), **options)
    return make_solver(solver, **options)
