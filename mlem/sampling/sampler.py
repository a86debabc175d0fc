"""Sampling: `sample()`, and the `Sampler` that binds a solver to a model and keeps the ledger of what it costs.

Denoisers, solvers and noise are known here; files, metrics and training are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mlem.arguments import called, check_whole
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
from mlem.networks import evaluating
from mlem.noise import check_indices
from mlem.sampling.bars import with_bar
from mlem.sampling.metered import MeteredModel, Model
from mlem.sampling.nonfinite import FirstFailure, suspects
from mlem.sampling.spreading import spread_rows
from mlem.schedule import NoiseSchedule
from mlem.solvers import (
    EvaluationPoint,
    GridPoint,
    ScatteredPoints,
    Solver,
    make_solver,
    model_input,
    quadrature_weights,
)
from mlem.trajectory import Watch, starting_noise, trajectory, warn_of_signal

__all__ = ["PRECISIONS", "NonFiniteError", "Result", "Sampler", "blocks", "sample", "solver_of"]

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of what the network may be computed in (autocast); times, noise and the sum over steps stay full."""


@dataclass
class Result:
    """x: (N, *shape), not clipped. x_T: the noise it began with, when asked for. ledger: what it cost."""

    x: Tensor
    ledger: Ledger
    x_T: Tensor | None = None


class NonFiniteError(FloatingPointError):
    """A sample became NaN or infinite. `result` holds the other samples, `indices` says which these are."""

    def __init__(self, message: str, result: Result, indices: list[int]) -> None:
        super().__init__(message)
        self.result, self.indices = result, indices


class Sampler:
    """A solver bound to a model, a grid and a seed; `run(indices)` gives the samples with these indices.

    Samples are float32, or float64 where that is torch's default dtype. Arguments are those of `sample`.

    Args:
        plan: a Plan with a row for each evaluation, or a specification, from which one is made.
        spread: under torch.distributed, every rank runs the same samples and evaluates its share of the rows of each
            call, which pays for solvers that ask for many at once.

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
        schedule: NoiseSchedule | None = None,
        shape: Sequence[int] | None = None,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        spread: bool = False,
        conditions: ConditionSource | None = None,
    ) -> None:
        _check_choices(model, seed, precision, level, plan)
        if isinstance(model, Family | Level):
            schedule, shape = schedule or model.schedule, shape or model.shape
        if schedule is None or shape is None:
            raise ValueError("a bare denoiser says nothing of its schedule and sample shape; pass schedule= and shape=")
        self.solver = solver_of(solver)
        self.schedule, self.shape, self.seed = schedule, tuple(shape), seed
        self.grid = self.solver.grid(schedule, steps, grid)
        self.points = GridPoint.of(schedule, self.grid)
        warn_of_signal(schedule, self.grid.times[0])
        self.plan = None if plan is None else self._fitting(model, plan, spread)
        self._model = self._metered(model, level)
        _refuse_other_schedule(schedule, self._model.schedule)
        self.device = self._model.device if device is None else torch.device(device)
        self._model.networks.to(self.device)
        self.precision, self.conditions, self._spread, self._rounds = precision, conditions, spread, 0
        self._input_dtype = torch.float64 if self._model.any_dtype else torch.get_default_dtype()
        self._quadrature: list[float] | None = None
        if self.plan is not None and self.plan.moves_state:
            self._quadrature = quadrature_weights(self.solver, schedule, self.points)[0].tolist()

    def _metered(self, model: Model, level: str | None) -> MeteredModel:
        if not isinstance(model, Family):
            return MeteredModel.of(model)
        return MeteredModel.of(model.level(level)) if self.plan is None else MeteredModel.under(model, self.plan)

    def _fitting(self, model: Model, plan: Plan | PlanSpec, spread: bool) -> Plan:
        """The plan, made where it is a specification. Raises ValueError where it cannot be followed."""
        if not isinstance(model, Family):
            raise ValueError("plan= chooses between the levels of a family, but the model is not a Family; drop it")
        plan = plan_for_use(plan, model, self.solver, self.points)
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
        """The starting noise x_T ~ N(0, I) of these samples: indices (B,) int64 -> (B, *shape)."""
        return starting_noise(self.seed, indices, self.shape)

    def run(self, indices: Sequence[int]) -> Result:
        """The samples with these indices, as one batch.

        Args:
            indices: whole numbers in [0, 10**9); those above are reserved for calibration and its like.

        Raises:
            NonFiniteError: a sample became NaN or infinite; it names sample, step, time and level.
            ValueError: indices out of range.
        """
        begin = time.perf_counter()
        with torch.inference_mode(), evaluating(self._model.networks):
            index = torch.as_tensor(check_indices(indices), dtype=torch.int64, device=self.device)
            x_T, self._rounds = self.start(index), 0
            x = self._solve(x_T, index)
            # the one place where the host waits for the device
            finite: list[bool] = torch.isfinite(x.flatten(1)).all(1).tolist()
            # levels that share a call run one after another
            rounds = self._rounds if self.plan is None else self._model.rows / len(index)
            levels = self._model.collect(len(index), self.plan)
            result = Result(x, Ledger(levels, time.perf_counter() - begin, len(index), rounds), x_T)
            if not all(finite):
                raise self._non_finite(result, x_T, index, finite)
        return result

    def _solve(self, x_T: Tensor, index: Tensor, watch: Watch | None = None) -> Tensor:
        revise = None
        if self._model.multilevel is None:
            denoiser = self._model.denoiser_for(index, self.conditions)
            estimate = partial(self._estimate, lambda _: denoiser)
        else:
            run = self._model.multilevel.begin(index, self._quadrature, self.conditions)
            estimate, revise = partial(self._estimate, run.denoiser_at), partial(self._revise, run)
        start = x_T.contiguous(memory_format=torch.channels_last) if x_T.dim() == 4 else x_T
        x = trajectory(estimate, self.solver, self.points, start, index, self.seed, revise=revise, watch=watch)
        return x.to(x_T.dtype)

    def _estimate(
        self, denoiser_at: Callable[[EvaluationPoint], Denoiser], y: Tensor, place: EvaluationPoint
    ) -> Tensor:
        self._rounds += 1
        denoiser = denoiser_at(place)
        if isinstance(place, ScatteredPoints):
            denoiser = of_rows(denoiser, place.rows)
        x, t = (part.to(self._input_dtype) for part in model_input(self.schedule, y, place))
        if self._spread and torch.distributed.is_initialized():
            return spread_rows(lambda mine: self._denoise(of_rows(denoiser, mine), x[mine], t[mine]), len(x))
        return self._denoise(denoiser, x, t)

    def _denoise(self, denoiser: Denoiser, x: Tensor, t: Tensor) -> Tensor:
        """eps of all rows, in calls of `solver.chunk` rows at most."""
        chunk = self.solver.chunk or len(x)
        with self._autocast():
            if chunk >= len(x):
                return denoiser(x, t)
            some = [slice(i, i + chunk) for i in range(0, len(x), chunk)]
            return torch.cat([of_rows(denoiser, part)(x[part], t[part]) for part in some])

    def _revise(self, run: MultilevelTrajectory, y: Tensor, point: GridPoint) -> Tensor:
        with self._autocast():
            return run.revise(y, point)

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _non_finite(self, result: Result, x_T: Tensor, index: Tensor, finite: list[bool]) -> NonFiniteError:
        """What went wrong: the batch is run again, watched (chance is keyed, so that it fails in the same place)."""
        failure = FirstFailure()
        with suspects(self._model.meters) as found:
            self._solve(x_T, index, failure)
        self._model.collect(0, None)  # the second run is no part of what the samples cost
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
    """Raise ValueError for options that are out of range, or that this kind of model does not have."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not isinstance(seed, int):
        raise ValueError(f"seed must be a whole number, got {seed!r}")
    if plan is not None and level is not None:
        raise ValueError(f"level={level!r} runs one level, plan= several; give one of them")
    if level is not None and not isinstance(model, Family):
        raise ValueError(f"level={level!r} chooses within a family, but the model is not a Family; leave level out")


def _refuse_spread(plan: Plan) -> None:
    """Raise ValueError for a plan that needs all rows of a call on one rank."""
    if plan.moves_state or plan.per_sample:
        kind = "coins of each sample's own" if plan.per_sample else f"estimator={plan.estimator}"
        raise ValueError(f"spread=True deals the rows of a call to the ranks, and {kind} needs all; leave spread out")


def _refuse_other_schedule(given: NoiseSchedule, own: NoiseSchedule | None) -> None:
    """Raise ValueError where the model declares another schedule."""
    if own is not None and own.fingerprint != given.fingerprint:
        raise ValueError(f"schedule= is {given.to_config()}, but the model has {own.to_config()}; leave schedule out")


def solver_of(solver: str | Solver, **options: object) -> Solver:
    """`make_solver`, for diffusers' schedulers too (`diffusers:ClassName`). Raises ValueError for unknown options."""
    if isinstance(solver, str) and solver.startswith("diffusers:"):
        from mlem.interop.diffusers import DiffusersSolver

        return DiffusersSolver(solver.removeprefix("diffusers:"), **options)
    return make_solver(solver, **options)


def blocks(indices: Sequence[int], batch_size: int) -> list[list[int]]:
    """`indices` cut into batches.

    Raises: ValueError for no, repeated, reserved, negative or fractional indices, and for no batch.
    """
    check_whole("batch_size", batch_size)
    listed = check_indices(indices)
    if not listed or len(set(listed)) < len(listed):
        raise ValueError(f"indices must be different whole numbers >= 0, at least one; got {len(listed)} of them")
    return [listed[i : i + batch_size] for i in range(0, len(listed), batch_size)]


@called("sample")
def sample(
    model: Model,
    *,
    indices: Sequence[int],
    solver: str | Solver = "ddim",
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 64,
    grid: str | TimeGrid | None = None,
    level: str | None = None,
    plan: Plan | PlanSpec | None = None,
    schedule: NoiseSchedule | None = None,
    shape: Sequence[int] | None = None,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    spread: bool = False,
    conditions: ConditionSource | None = None,
    return_noise: bool = False,
    progress: bool = False,
) -> Result:
    """Sample the images with these indices.

    Args:
        model: a Family (its largest level, or `level`, or several under `plan`), a Level, or any denoiser together
            with `schedule` and `shape`.
        indices: sample indices, each in [0, 10**9); index and seed fix an image, whatever the batch size.
        solver: a name, such as "ddim" or "dpm_solver_pp", or a Solver.
        steps: of the time grid.
        seed: fixes all chance, together with the index.
        batch_size: images at once.
        grid: name of a time grid, or a TimeGrid, which has steps of its own; by default the solver's choice.
        level: name of a level of the family.
        plan: which levels run when: a Plan, or a specification, `family.plan(...)`.
        schedule, shape: of a bare denoiser, and of one sample.
        device: where to run; by default where the network is.
        precision: "fp32", "bf16" or "fp16" (autocast of the network).
        spread: under torch.distributed, ranks share the rows of every call.
        conditions: what networks are told of samples beside x and t: a function of indices (B,) that gives name ->
            tensor with B rows, such as `lambda indices: {"class_labels": indices % 10}`; see `mlem.conditions`. By
            default classes take turns.
        return_noise: also give `x_T`.
        progress: show a bar.

    Returns: the samples, not clipped, and a ledger of what they cost.

    Raises:
        ValueError: options out of range.
        NonFiniteError: samples became NaN or infinite; the others are all done, and are in the error's `result`.
    """
    sampler = Sampler(
        model,
        solver=solver,
        steps=steps,
        seed=seed,
        grid=grid,
        level=level,
        plan=plan,
        schedule=schedule,
        shape=shape,
        device=device,
        precision=precision,
        spread=spread,
        conditions=conditions,
    )
    results: list[Result] = []
    kept: list[int] = []
    error: NonFiniteError | None = None
    for block in with_bar(blocks(indices, batch_size), progress):
        try:
            result, good = sampler.run(block), block
        except NonFiniteError as caught:
            error = error or caught
            result, good = caught.result, caught.indices
        results.append(result if return_noise else Result(result.x, result.ledger))
        kept += good
    whole = _joined(results)
    if error is not None:
        error.result, error.indices = whole, kept
        raise error
    return whole


def _joined(results: Sequence[Result]) -> Result:
    """The results of several batches as one."""
    ledger = Ledger()
    for result in results:
        ledger.add(result.ledger)
    noises = [result.x_T for result in results if result.x_T is not None]
    return Result(torch.cat([result.x for result in results]), ledger, torch.cat(noises) if noises else None)
