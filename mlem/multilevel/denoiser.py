"""The multilevel noise estimate, as a denoiser: `eps = denoiser(x, t)`, the n-th call taking the n-th row of a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlem.denoiser import Denoiser, NetworkDenoiser
from mlem.family import Family
from mlem.multilevel.plan import Plan
from mlem.schedule import NoiseSchedule, expand_like
from mlem.solvers import GridPoint, model_input

PADDING = 8
"""Sub-batches are filled up to a multiple of this, so that their shapes repeat."""


class MultilevelDenoiser:
    """A weighted sum over the levels of a family. Any solver can call it, and any pipeline of diffusers.

    model: a Family, or denoisers, cheapest first (then with `schedule`). plan: for as many evaluations as a trajectory
    makes. Calls are counted; `start` begins a trajectory, and so does the call after the last row.
    Raises ValueError when the plan has other levels than the model.
    """

    any_dtype = True

    def __init__(
        self, model: Family | Sequence[Denoiser], plan: Plan, *, schedule: NoiseSchedule | None = None
    ) -> None:
        if isinstance(model, Family):
            levels = [model.level(name) for name in plan.levels] if plan.levels else list(model.levels)
            self.names = [level.name for level in levels]
            denoisers: list[Denoiser] = [level.denoiser for level in levels]
            schedule = model.schedule
        else:
            denoisers = list(model)
            self.names = list(plan.levels) or [str(number) for number in range(1, len(denoisers) + 1)]
        if schedule is None:
            raise ValueError("bare denoisers say nothing of their schedule; pass schedule=")
        columns = plan.probabilities.shape[1]
        if columns != len(denoisers):
            raise ValueError(
                f"the plan is for {columns} levels, the family has {len(denoisers)} ({', '.join(self.names)}); "
                "draw it for these levels, or name its own with levels="
            )
        self.plan, self.schedule = plan, schedule
        self._denoisers = denoisers
        self._row = 0
        self._held = _Held(plan)
        # read once, so that no step waits for a device
        self._runs = plan.runs.bool().tolist() if not plan.per_sample else []
        self._weights = plan.weights.tolist() if not plan.per_sample else []
        self._shares: list[list[_Share | None]] = []

    def metered(self, meter: Callable[[str, Any], Any]) -> MultilevelDenoiser:
        """Put `meter(name, network)` before every network (or denoiser that is none)."""
        for number, (name, denoiser) in enumerate(zip(self.names, self._denoisers, strict=True)):
            inside = isinstance(denoiser, NetworkDenoiser)
            self._denoisers[number] = (
                denoiser.through(meter(name, denoiser.network)) if inside else meter(name, denoiser)
            )
        return self

    def start(self, indices: Tensor | None = None, quadrature: Sequence[float] | None = None) -> None:
        """Begin a trajectory. indices (B,): needed where every sample has its own coins.

        quadrature: the weights of `mlem.solvers.quadrature_weights`; needed for hindsight.
        """
        self._row = 0
        self._held = _Held(self.plan, quadrature)
        if self.plan.per_sample:
            if indices is None:
                raise ValueError("this plan tosses coins for every sample: start(indices) must say which samples")
            self._shares = _shares(self.plan.sample_weights(indices), indices.device)

    def revise(self, y: Tensor, here: GridPoint) -> Tensor:
        """Called before a step at y (B, ...): measure what is due, and correct the state with hindsight."""
        row = self._row
        if not self.plan.revised[row]:
            return y
        x, t = model_input(self.schedule, y, here)
        outputs = self._outputs(row, x, t)
        return y + self._held.measure(row, outputs, self._moment(x, t))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self._row == self.plan.evaluations:
            self.start()
        if self.plan.estimator == "hindsight" and not self._held.revises:
            raise ValueError("hindsight moves the state between calls, which only sample() can do; use estimator=held")
        row, self._row = self._row, self._row + 1
        if self.plan.per_sample:
            return self._own_coins(row, x, t)
        if not self.plan.holds:
            outputs = self._outputs(row, x, t)
            return _weighted(outputs, self._weights[row], x)
        moment = self._moment(x, t)
        if self.plan.revised[row]:
            return self._denoisers[0](x, t) + self._held.corrections(row, moment)
        outputs = self._outputs(row, x, t)
        self._held.measure(row, outputs, moment)
        return _weighted(outputs, self._weights[row], x) + self._held.corrections(row, moment, fresh=False)

    def _outputs(self, row: int, x: Tensor, t: Tensor) -> list[Tensor | None]:
        """What the levels that run at this row say: eps, or None."""
        return [f(x, t) if runs else None for f, runs in zip(self._denoisers, self._runs[row], strict=True)]

    def _moment(self, x: Tensor, t: Tensor) -> _Moment:
        alpha, sigma = expand_like(self.schedule.alpha(t), x), expand_like(self.schedule.sigma(t), x)
        return _Moment(alpha, sigma / alpha)

    def _own_coins(self, row: int, x: Tensor, t: Tensor) -> Tensor:
        """The jump estimate where every sample has its own coins: each level on its share of the batch."""
        if len(self._shares) <= row:
            raise ValueError("this plan tosses coins for every sample: call start(indices) before the first step")
        total = torch.zeros_like(x)
        for denoiser, share in zip(self._denoisers, self._shares[row], strict=True):
            if share is not None:
                padded, positions, weights = share
                output = denoiser(x[padded], t[padded])[: len(positions)]
                total = total.index_add(0, positions, output * expand_like(weights, output))
        return total


def _weighted(outputs: Sequence[Tensor | None], weights: Sequence[float], x: Tensor) -> Tensor:
    """`sum_k w_k f^k`; one level of weight 1 is given back as it is."""
    total: Tensor | None = None
    for output, weight in zip(outputs, weights, strict=True):
        if output is not None and weight:
            term = output if weight == 1 else output * weight
            total = term if total is None else total + term
    return torch.zeros_like(x) if total is None else total


_Share = tuple[Tensor, Tensor, Tensor]
"""Positions in the batch with padding, without, and their weights."""


def _shares(weights: Tensor, device: torch.device) -> list[list[_Share | None]]:
    """For each row and level the part of the batch that runs: weights (B, R, K) on the CPU."""
    shares: list[list[_Share | None]] = []
    for row in weights.unbind(1):
        shares.append([])
        for level in row.unbind(1):
            positions = level.nonzero().flatten()
            if not len(positions):
                shares[-1].append(None)
                continue
            padding = min(-len(positions) % PADDING, len(weights) - len(positions))
            padded = torch.cat([positions, positions[:1].expand(padding)])
            share = (padded, positions, level[positions])
            shares[-1].append(tuple(part.to(device, non_blocking=True) for part in share))  # type: ignore[arg-type]
    return shares


class _Moment(NamedTuple):
    """alpha and kappa at a row, (B, 1, ...)."""

    alpha: Tensor
    kappa: Tensor


class _Measurement(NamedTuple):
    """A correction as it was measured: `(f^k - f^(k-1)) / alpha`, the difference of v predictions, and when."""

    time: Tensor
    value: Tensor


class _Held:
    """The memory of held corrections: what was measured, and what was said in between."""

    def __init__(self, plan: Plan, quadrature: Sequence[float] | None = None) -> None:
        levels = plan.probabilities.shape[1]
        self._plan, self._quadrature = plan, quadrature
        self._measured: list[list[_Measurement]] = [[] for _ in range(levels)]
        self._said: list[list[tuple[int, _Moment, Tensor]]] = [[] for _ in range(levels)]
        self._due = plan.counts.bool().tolist() if plan.holds and plan.counts is not None else []
        self._keep = (plan.stored | plan.revised[:, None]).tolist() if plan.holds else []

    @property
    def revises(self) -> bool:
        """Whether hindsight has what it needs."""
        return self._quadrature is not None

    def measure(self, row: int, outputs: Sequence[Tensor | None], moment: _Moment) -> Tensor | float:
        """Remember the corrections due at this row. Returns what hindsight moves the state y by."""
        move: Tensor | float = 0.0
        for level, due in enumerate(self._due[row]):
            if level == 0 or not due or not self._keep[row][level]:
                continue
            above, below = outputs[level], outputs[level - 1]
            assert above is not None
            assert below is not None
            measured = self._measured[level]
            measured.append(_Measurement(-moment.kappa.log(), (above - below) / moment.alpha))
            if self._said[level]:
                move = move + self._hindsight(level, moment)
            del measured[: -(self._plan.order + 1)]
        return move

    def _hindsight(self, level: int, now: _Moment) -> Tensor | float:
        """`sum_i c_i (interpolated_i - said_i)` over the rows since the last measurement."""
        move: Tensor | float = 0.0
        for row, then, said in self._said[level]:
            assert self._quadrature is not None
            ends = self._measured[level][-2], self._measured[level][-1]
            error = interpolated(*ends, -then.kappa.log(), self._plan.memory) - said
            # what entered there has shrunk since, about as it would with frozen data
            move = move + error * then.alpha * (now.kappa / then.kappa) * self._quadrature[row]
        self._said[level] = []
        return move

    def corrections(self, row: int, moment: _Moment, fresh: bool = True) -> Tensor | float:
        """The sum of the corrections at this row; without `fresh`, of those that are not measured at it."""
        total: Tensor | float = 0.0
        for level, due in enumerate(self._due[row]):
            if level == 0 or (due and not fresh):
                continue
            points = self._measured[level][-1:] if due else self._measured[level]
            value = extended(points, -moment.kappa.log(), self._plan.memory)
            if not due and self._plan.estimator == "hindsight":
                self._said[level].append((row, moment, value))
            total = total + value * moment.alpha
        return total


def extended(points: Sequence[_Measurement], time: Tensor, memory: float | None) -> Tensor:
    """What one measurement, or the straight line through two, says of a later `time`."""
    last = points[-1]
    if len(points) == 1:
        return last.value if memory is None else last.value * torch.exp((last.time - time) / memory)
    before = points[-2]
    span = last.time - before.time
    # two evaluations at one time (Heun) give no slope
    return last.value + (last.value - before.value) * torch.where(span > 0, (time - last.time) / span, 0.0)


def interpolated(before: _Measurement, after: _Measurement, time: Tensor, memory: float | None) -> Tensor:
    """What two measurements say of a `time` in between: a straight line, or with a memory the mean of a bridge.

    An Ornstein-Uhlenbeck process with this correlation length has, given both ends at distance b, the mean
    `(sinh((b - x) / memory) before + sinh(x / memory) after) / sinh(b / memory)` at distance x.
    """
    span, passed = after.time - before.time, time - before.time
    if memory is None:
        return before.value + (after.value - before.value) * (passed / span)
    ends = torch.sinh((span - passed) / memory), torch.sinh(passed / memory)
    return (ends[0] * before.value + ends[1] * after.value) / torch.sinh(span / memory)
