"""Sampling: `sample()`, the one loop that runs every solver, and the ledger of what it cost.

The loop knows denoisers, solvers and noise; it knows nothing of files, metrics or training.
"""

from __future__ import annotations

import copy
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mlem.denoiser import Denoiser, NetworkDenoiser
from mlem.family import Family, Level
from mlem.network import evaluating
from mlem.noise import BrownianPath, NoiseStream
from mlem.schedule import NoiseSchedule, TimeGrid
from mlem.solvers import Point, Solver, make_solver

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of what the network may be computed in (autocast); times, noise and the sum over steps stay full."""


@dataclass
class LevelLedger:
    """What one level cost: calls and expected_calls are network evaluations, one for each image and call."""

    calls: int = 0
    expected_calls: float = 0.0
    seconds: float = 0.0
    flops: float = 0.0


@dataclass
class Ledger:
    """What a run cost, over all of its images. `seconds` of a level are spent in its network; wall_seconds in all."""

    levels: dict[str, LevelLedger] = field(default_factory=dict)
    wall_seconds: float = 0.0
    images: int = 0

    @property
    def evaluations(self) -> float:
        """Network calls for one sample, all levels together."""
        return sum(level.calls for level in self.levels.values()) / max(self.images, 1)

    @property
    def network_seconds(self) -> float:
        """Seconds in networks, all levels together."""
        return sum(level.seconds for level in self.levels.values())

    def add(self, other: Ledger) -> None:
        """Add the cost of another run."""
        self.wall_seconds += other.wall_seconds
        self.images += other.images
        for name, cost in other.levels.items():
            own = self.levels.setdefault(name, LevelLedger())
            for key, value in vars(cost).items():
                setattr(own, key, getattr(own, key) + value)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        totals = {"evaluations": self.evaluations, "network_seconds": self.network_seconds}
        own = {"images": self.images, "wall_seconds": self.wall_seconds}
        return own | totals | {"levels": {name: dict(vars(cost)) for name, cost in self.levels.items()}}

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> Ledger:
        """The ledger that `to_dict` described."""
        levels = {name: LevelLedger(**cost) for name, cost in plain["levels"].items()}
        return Ledger(levels, plain["wall_seconds"], plain["images"])


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


class _Meter:
    """Stands before a network (or a whole denoiser that is none): counts its calls and the seconds spent in it.

    The host never waits for a device.
    """

    def __init__(self, name: str, network: Callable[..., Any], flops: float) -> None:
        self.name, self._network, self._flops = name, network, flops
        self._images, self._seconds = 0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, x: Tensor, t: Tensor) -> Any:
        self._images += len(x)
        if x.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            output = self._network(x, t)
            end.record()
            self._events.append((start, end))
            return output
        begin = time.perf_counter()
        output = self._network(x, t)
        self._seconds += time.perf_counter() - begin
        return output

    def collect(self) -> LevelLedger:
        """The cost since the last time; on a GPU this waits for it."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        cost = LevelLedger(self._images, self._images, self._seconds, self._images * self._flops)
        self._images, self._seconds, self._events = 0, 0.0, []
        return cost


class Sampler:
    """A solver bound to a model, a grid and a seed. `run(indices)` gives the samples with these indices.

    model: a Family (its largest level, or `level`), a Level, or any denoiser together with `schedule` and `shape`.
    solver: a name or a Solver. grid: name of a time grid, or a TimeGrid (which says the steps itself); by default the
    solver's own choice. device: where to run; by default where the network is. precision: "fp32", "bf16" or "fp16"
    (autocast of the network).
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
        schedule: NoiseSchedule | None = None,
        shape: Sequence[int] | None = None,
        device: str | torch.device | None = None,
        precision: str = "fp32",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number, got {seed!r}")
        if isinstance(model, Family):
            model = model.level(level)
        elif level is not None:
            raise ValueError(f"level={level!r} chooses within a family, but the model is not a Family; leave level out")
        name, denoiser, cost = "model", model, 0.0
        if isinstance(model, Level):
            name, denoiser, cost = model.name, model.denoiser, model.flops
            schedule, shape = schedule or model.schedule, shape or model.shape
        if schedule is None or shape is None:
            raise ValueError("a bare denoiser says nothing of its schedule and sample shape; pass schedule= and shape=")
        own = getattr(denoiser, "schedule", None)
        if isinstance(own, NoiseSchedule) and own.fingerprint != schedule.fingerprint:
            raise ValueError(
                f"schedule= is {schedule.to_config()}, but the model has {own.to_config()}; leave schedule out"
            )
        network = denoiser if isinstance(denoiser, nn.Module) else getattr(denoiser, "network", None)
        self._network = network if isinstance(network, nn.Module) else None
        self.device = torch.device(device) if device is not None else _device_of(self._network)
        if self._network is not None:
            self._network.to(self.device)
        # a copy: a solver may remember the grid that it made
        self.solver, self.schedule, self.shape = copy.copy(_make_solver(solver)), schedule, tuple(shape)
        self.grid = self.solver.grid(schedule, steps, grid)
        self.seed, self.precision = seed, precision
        self._points = Point.of(schedule, self.grid)
        self._input_dtype = torch.float64 if getattr(denoiser, "any_dtype", False) else torch.get_default_dtype()
        if isinstance(denoiser, NetworkDenoiser):
            self._meter = _Meter(name, denoiser.network, cost)
            self._denoiser: Denoiser = denoiser.through(self._meter)
        else:
            self._meter = self._denoiser = _Meter(name, denoiser, cost)  # type: ignore[arg-type]

    def start(self, indices: Tensor) -> Tensor:
        """The starting noise x_T ~ N(0, I) of these samples: indices (B,) int64 -> (B, *shape)."""
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        return NoiseStream(self.seed, "start").normal(indices, [0], self.shape, dtype)[0]

    def run(self, indices: Sequence[int]) -> Result:
        """The samples with these indices, as one batch.

        Raises NonFiniteError that names sample, step, time and level.
        """
        begin = time.perf_counter()
        with torch.inference_mode(), evaluating(self._network):
            index = torch.as_tensor(list(indices), dtype=torch.int64, device=self.device)
            x_T = self.start(index)
            x = self._solve(x_T, index, None)
            # the one place where the host waits for the device
            finite = torch.isfinite(x.flatten(1)).all(1).tolist()
            ledger = Ledger({self._meter.name: self._meter.collect()}, time.perf_counter() - begin, len(index))
            if not all(finite):
                self._report_non_finite(x, x_T, index, finite, ledger)
        return Result(x, ledger, x_T)

    def _solve(self, x_T: Tensor, index: Tensor, watch: Callable[[int, Tensor], None] | None) -> Tensor:
        """The loop. watch: sees the number of each step and y after it."""
        path = BrownianPath(self.schedule, self.seed, index, self.shape, x_T.dtype)
        # the state is float64: at large kappa, y and kappa eps are both large and nearly cancel
        y = x_T.double() / self._points[0].alpha
        if y.dim() == 4:
            y = y.contiguous(memory_format=torch.channels_last)
        state = self.solver.init(self._points, index, self.seed)
        for i, (here, there) in enumerate(zip(self._points, self._points[1:], strict=False)):
            y, state = self.solver.step(self._estimate, y, state, here, there, path)
            if watch is not None:
                watch(i, y)
        return (y * self._points[-1].alpha).to(x_T.dtype)

    def _estimate(self, y: Tensor, point: Point) -> Tensor:
        t = torch.full((len(y),), point.t, dtype=self._input_dtype, device=y.device)
        with self._autocast():
            return self._denoiser((y * point.alpha).to(self._input_dtype), t)

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

        self._solve(x_T, index, watch)
        self._meter.collect()  # the second run is no part of what the samples cost
        step, sample = found[0] if found else (self.grid.steps - 1, int(index[finite.index(False)]))
        error = NonFiniteError(
            f"sample {sample} became NaN or infinite at step {step + 1} of {self.grid.steps} "
            f"(t = {self.grid.times[step]:.4g}), level {self._meter.name}; {finite.count(False)} of {len(finite)} "
            "samples of this batch are lost; try precision=fp32 or another solver"
        )
        keep = [row for row, good in enumerate(finite) if good]
        error.result = Result(x[keep], ledger, x_T[keep])
        error.indices = index[keep].tolist()
        raise error


def _device_of(network: nn.Module | None) -> torch.device:
    parameter = None if network is None else next(network.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _make_solver(solver: str | Solver) -> Solver:
    if isinstance(solver, str) and solver.startswith("diffusers:"):
        from mlem.interop.diffusers import DiffusersSolver

        return DiffusersSolver(solver.removeprefix("diffusers:"))
    return make_solver(solver)


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

    model and **options: see `Sampler`: solver, steps, seed, grid, level, schedule, shape, device, precision.
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
