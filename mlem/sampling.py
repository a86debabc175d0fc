"""Sampling: `sample()` and the `Sampler`, which binds a solver to a model and keeps the ledger of what it costs.

They know denoisers, solvers and noise; they know nothing of files, metrics or training.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlem.brownian import BrownianPath
from mlem.denoiser import Denoiser, NetworkDenoiser
from mlem.family import Family
from mlem.grids import TimeGrid
from mlem.ledger import Ledger, LevelLedger, Meter
from mlem.level import Level
from mlem.multilevel.denoiser import MultilevelDenoiser
from mlem.multilevel.plan import Plan
from mlem.multilevel.planner import check_estimator, make_plan
from mlem.multilevel.spec import PlanSpec
from mlem.networks import evaluating
from mlem.noise import NoiseStream
from mlem.schedule import NoiseSchedule
from mlem.solvers import EvaluationPoint, GridPoint, Solver, make_solver, model_input, quadrature_weights

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of what the network may be computed in (autocast); times, noise and the sum over steps stay full."""


@dataclass
class Result:
    """x: (N, *shape), not clipped. x_T: the noise it began with, when asked for. ledger: what it cost."""

    x: Tensor
    ledger: Ledger
    x_T: Tensor | None = None


class NonFiniteError(FloatingPointError):
    """A sample became NaN or infinite. `result` holds the other samples, `indices` (of it) says which."""

    result: Result
    indices: list[int]


class Sampler:
    """A solver bound to a model, a grid and a seed. `run(indices)` gives the samples with these indices.

    model: a Family (its largest level, or `level`, or several under `plan`), a Level, or any denoiser together with
    `schedule` and `shape`. solver: a name or a Solver. grid: name of a time grid, or a TimeGrid (which says the steps
    itself); by default the solver's own choice. plan: which levels run when: a Plan with a row for each evaluation, or
    a PlanSpec (`family.plan(...)`), from which one is made. device: where to run; by default where the network is.
    precision: "fp32", "bf16" or "fp16" (autocast of the network). spread: under torch.distributed, every rank runs the
    same samples and evaluates its share of the rows of each call, which pays for solvers that ask for many at once.
    The dtype of samples is float32, or float64 when that is the default dtype.
    Raises ValueError for options out of range.
    """

    def __init__(
        self,
        model: Family | Level | Denoiser,
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
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number, got {seed!r}")
        if plan is not None and not isinstance(model, Family):
            raise ValueError(
                "plan= chooses between the levels of a family, but the model is not a Family; leave it out"
            )
        self.solver = solver_of(solver)
        if isinstance(model, Family):
            schedule, shape = schedule or model.schedule, shape or model.shape
            if plan is None:
                model = model.level(level)
            elif level is not None:
                raise ValueError(f"level={level!r} runs one level, plan= several; give one of them")
        elif level is not None:
            raise ValueError(f"level={level!r} chooses within a family, but the model is not a Family; leave level out")
        elif isinstance(model, Level):
            schedule, shape = schedule or model.schedule, shape or model.shape
        if schedule is None or shape is None:
            raise ValueError("a bare denoiser says nothing of its schedule and sample shape; pass schedule= and shape=")
        self.schedule, self.shape = schedule, tuple(shape)
        self.grid = self.solver.grid(schedule, steps, grid)
        self.points = GridPoint.of(schedule, self.grid)
        self.plan = self._check_plan(model, plan)
        if spread and self.plan is not None:
            _refuse_spread(self.plan)
        self._meters: dict[str, Meter] = {}
        self._denoiser = self._metered(model)
        self._refuse_other_schedule()
        inside = [getattr(part.network, "network", part.network) for part in self._meters.values()]
        self._networks = nn.ModuleList(part for part in inside if isinstance(part, nn.Module))
        self.device = torch.device(device) if device is not None else _device_of(self._networks)
        self._networks.to(self.device)
        self.seed, self.precision, self._spread = seed, precision, spread
        self._rounds = 0
        self._quadrature: list[float] | None = None
        if self.plan is not None and self.plan.estimator == "hindsight":
            self._quadrature = quadrature_weights(self.solver, schedule, self.points)[0].tolist()
        self._input_dtype = torch.float64 if getattr(self._denoiser, "any_dtype", False) else torch.get_default_dtype()

    def _check_plan(self, model: Family | Level | Denoiser, plan: Plan | PlanSpec | None) -> Plan | None:
        if plan is None:
            return None
        assert isinstance(model, Family)
        if isinstance(plan, PlanSpec):
            plan = make_plan(plan, model, self.solver, self.grid)
        check_estimator(self.solver, self.points, plan.estimator)
        evaluations = self.solver.evaluations(self.points)
        if plan.evaluations != evaluations:
            raise ValueError(
                f"the plan has {plan.evaluations} rows, but {self.solver.name} in {self.grid.steps} steps evaluates "
                f"{evaluations} times; draw it for these steps, or pass family.plan(...), which fits any"
            )
        return plan

    def _metered(self, model: Family | Level | Denoiser) -> Any:
        """The model as a denoiser, with a meter before each of its networks."""

        def meter(name: str, network: Any) -> Meter:
            self._meters[name] = Meter(network, costs.get(name, 0))
            return self._meters[name]

        costs: dict[str, int] = {}
        if isinstance(model, Family):
            assert self.plan is not None
            denoiser = MultilevelDenoiser(model, self.plan)
            costs = {name: model.level(name).flops for name in denoiser.names}
            return denoiser.metered(meter)
        name, whole = "model", model
        if isinstance(model, Level):
            name, whole, costs = model.name, model.denoiser, {model.name: model.flops}
        if isinstance(whole, NetworkDenoiser):
            return whole.through(meter(name, whole.network))
        own = getattr(whole, "schedule", None)
        metered: Any = meter(name, whole)
        metered.schedule, metered.any_dtype = own, getattr(whole, "any_dtype", False)
        return metered

    def _refuse_other_schedule(self) -> None:
        own = getattr(self._denoiser, "schedule", None)
        if isinstance(own, NoiseSchedule) and own.fingerprint != self.schedule.fingerprint:
            raise ValueError(
                f"schedule= is {self.schedule.to_config()}, but the model has {own.to_config()}; leave schedule out"
            )

    @property
    def levels(self) -> list[str]:
        """Names of the levels that may run."""
        return list(self._meters)

    def start(self, indices: Tensor) -> Tensor:
        """The starting noise x_T ~ N(0, I) of these samples: indices (B,) int64 -> (B, *shape)."""
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        return NoiseStream(self.seed, "start").normal(indices, [0], self.shape, dtype)[0]

    def run(self, indices: Sequence[int]) -> Result:
        """The samples with these indices, as one batch.

        Raises NonFiniteError that names sample, step, time and level.
        """
        begin = time.perf_counter()
        with torch.inference_mode(), evaluating(self._networks):
            index = torch.as_tensor(list(indices), dtype=torch.int64, device=self.device)
            x_T, self._rounds = self.start(index), 0
            x = self._solve(x_T, index, None)
            # the one place where the host waits for the device
            finite = torch.isfinite(x.flatten(1)).all(1).tolist()
            levels = self._collect(len(index))
            # levels that share a call run one after another
            rounds = self._rounds if self.plan is None else sum(cost.calls for cost in levels.values()) / len(index)
            ledger = Ledger(levels, time.perf_counter() - begin, len(index), rounds)
            if not all(finite):
                self._report_non_finite(x, x_T, index, finite, ledger)
        return Result(x, ledger, x_T)

    def _collect(self, images: int) -> dict[str, LevelLedger]:
        """What each level cost since the last time, beside what it should cost on average over the coins."""
        levels = {name: meter.collect() for name, meter in self._meters.items()}
        if self.plan is not None:
            for cost, expected in zip(levels.values(), self.plan.expected_calls.tolist(), strict=True):
                cost.expected_calls = expected * images
        return levels

    def _solve(self, x_T: Tensor, index: Tensor, watch: Callable[[int, Tensor], None] | None) -> Tensor:
        path = BrownianPath(self.schedule, self.seed, index, self.shape, x_T.dtype)
        # the state is float64: at large kappa, y and kappa eps are both large and nearly cancel
        y = x_T.double() / self.points[0].alpha
        if y.dim() == 4:
            y = y.contiguous(memory_format=torch.channels_last)
        revise = None
        if self.plan is not None:
            self._denoiser.start(index, self._quadrature)
            revise = self._revise if self._quadrature is not None else None
        y = self.solver.integrate(self._estimate, y, self.points, path, index, self.seed, revise=revise, watch=watch)
        return (y * self.points[-1].alpha).to(x_T.dtype)

    def _estimate(self, y: Tensor, place: EvaluationPoint) -> Tensor:
        self._rounds += 1
        x, t = (part.to(self._input_dtype) for part in model_input(self.schedule, y, place))
        if self._spread and torch.distributed.is_initialized():
            return self._share(x, t)
        return self._chunks(x, t)

    def _chunks(self, x: Tensor, t: Tensor) -> Tensor:
        chunk = self.solver.chunk or len(x)
        with self._autocast():
            parts = [self._denoiser(*part) for part in zip(x.split(chunk), t.split(chunk), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _share(self, x: Tensor, t: Tensor) -> Tensor:
        """This rank's rows, and those that the others found: every rank holds all of them afterwards, the same bits."""
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        size = -(-len(x) // world_size)
        mine = slice(min(rank * size, len(x) - 1), (rank + 1) * size)  # a rank without rows repeats the last
        own = self._chunks(x[mine], t[mine])
        own = torch.cat([own, own[-1:].expand(size - len(own), *own.shape[1:])]).contiguous()
        found = [torch.empty_like(own) for _ in range(world_size)]
        torch.distributed.all_gather(found, own)
        return torch.cat(found)[: len(x)]

    def _revise(self, y: Tensor, point: GridPoint) -> Tensor:
        with self._autocast():
            return self._denoiser.revise(y, point)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _report_non_finite(self, x: Tensor, x_T: Tensor, index: Tensor, finite: list[bool], ledger: Ledger) -> None:
        """Run the batch again, now looking after every step (chance is keyed, so it fails in the same place)."""
        found: list[tuple[int, int]] = []

        def watch(step: int, y: Tensor) -> None:
            if not found:
                bad = ~torch.isfinite(y.flatten(1)).all(1)
                found.extend((step, int(index[row])) for row in bad.nonzero().flatten().tolist())

        with _suspected(self._meters) as suspects:
            self._solve(x_T, index, watch)
        self._collect(0)  # the second run is no part of what the samples cost
        step, sample = found[0] if found else (self.grid.steps - 1, int(index[finite.index(False)]))
        level = "+".join(suspects[:1] or self._meters)
        error = NonFiniteError(
            f"sample {sample} became NaN or infinite at step {step + 1} of {self.grid.steps} "
            f"(t = {self.grid.times[step]:.4g}), level {level}; {finite.count(False)} of {len(finite)} samples of this "
            f"batch are lost; try precision=fp32 or another solver"
        )
        keep = [row for row, good in enumerate(finite) if good]
        error.result = Result(x[keep], ledger, x_T[keep])
        error.indices = index[keep].tolist()
        raise error


@contextmanager
def _suspected(meters: Mapping[str, Meter]) -> Iterator[list[str]]:
    """Names of the networks that make what is not finite of what is, in the order in which they do."""
    found: list[str] = []

    def watched(name: str, network: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, t: Tensor) -> Any:
            output = network(x, t)
            if torch.isfinite(x).all() and not torch.isfinite(getattr(output, "sample", output)).all():
                found.append(name)
            return output

        return call

    networks = {name: meter.network for name, meter in meters.items()}
    try:
        for name, meter in meters.items():
            meter.network = watched(name, networks[name])
        yield found
    finally:
        for name, meter in meters.items():
            meter.network = networks[name]


def _refuse_spread(plan: Plan) -> None:
    """Raise ValueError for a plan that needs all rows of a call on one rank."""
    if plan.estimator == "hindsight" or plan.per_sample:
        kind = "coins of each sample's own" if plan.per_sample else "estimator=hindsight"
        raise ValueError(f"spread=True deals the rows of a call to the ranks, and {kind} needs all; leave spread out")


def _device_of(network: nn.Module) -> torch.device:
    parameter = next(network.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def solver_of(solver: str | Solver, **options: Any) -> Solver:
    """`make_solver`, for diffusers' schedulers too (`diffusers:ClassName`). Raises ValueError for unknown options."""
    if isinstance(solver, str) and solver.startswith("diffusers:"):
        from mlem.interop.diffusers import DiffusersSolver

        return DiffusersSolver(solver.removeprefix("diffusers:"), **options)
    return make_solver(solver, **options)


def blocks(indices: Sequence[int], batch_size: int) -> list[list[int]]:
    """`indices` cut into batches. Raises ValueError for no, repeated, negative or fractional indices, or no batch."""
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number >= 1, got {batch_size!r}")
    try:
        listed = [operator.index(index) for index in indices]
    except TypeError as error:
        raise ValueError(f"indices must be whole numbers >= 0: {error}") from error
    if not listed or min(listed) < 0 or len(set(listed)) < len(listed):
        raise ValueError(f"indices must be different whole numbers >= 0, at least one; got {len(listed)} of them")
    return [listed[i : i + batch_size] for i in range(0, len(listed), batch_size)]


def sample(
    model: Family | Level | Denoiser,
    *,
    indices: Sequence[int],
    batch_size: int = 64,
    return_noise: bool = False,
    progress: bool = False,
    **options: Any,
) -> Result:
    """Sample the images with these indices: index i and the seed fix an image, whatever the batch size.

    model and **options: see `Sampler`: solver, steps, seed, grid, level, plan, schedule, shape, device, precision.
    return_noise: also give `x_T`. progress: show a bar.
    Raises ValueError for options out of range, NonFiniteError for samples that became NaN or infinite (after all
    others are done; they are in the error's `result`).
    """
    sampler = Sampler(model, **options)
    results, ledger, error, kept = [], Ledger(), None, []
    for block in _with_progress(blocks(indices, batch_size), progress):
        try:
            result, good = sampler.run(block), block
        except NonFiniteError as caught:
            error = error or caught
            result, good = caught.result, caught.indices
        ledger.add(result.ledger)
        results.append((result.x, result.x_T if return_noise else None))
        kept += good
    x_T = torch.cat([noise for _, noise in results]) if return_noise else None  # type: ignore[misc]
    whole = Result(torch.cat([x for x, _ in results]), ledger, x_T)
    if error is not None:
        error.result, error.indices = whole, kept
        raise error
    return whole


def _with_progress(batches: list[list[int]], progress: bool) -> Iterator[list[int]]:
    if not progress:
        yield from batches
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("sampling", total=sum(map(len, batches)))
        for batch in batches:
            yield batch
            bar.advance(task, len(batch))
