"""One call of an accelerated pipeline: its evaluations under a plan, between the pipeline's loop and its scheduler.

Sums are over the networks' own outputs: if only the large one runs, the pipeline gets its output bit for bit. For every
prediction, a difference of outputs is a difference of v times a factor of the noise level, which is all that held
corrections need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlem.interop.diffusers import PREFIX
from mlem.interop.pipelines.captured import Call, Guidance
from mlem.interop.pipelines.stepping import Stepping
from mlem.multilevel.estimators import ESTIMATORS
from mlem.multilevel.evaluators import Evaluator
from mlem.multilevel.plan import Plan

__all__ = ["Run", "moved"]

PlanMaker = Callable[["Run"], Plan]
"""The plan of a run after its first step, when its guidance and conditions are known."""


class Run:
    """From the first call of the network to the last step of the scheduler.

    Meanwhile the scheduler's `step` is wrapped: it shows which evaluation comes next, and if a plan moves the state, it
    moves the sample that `step` returns. The wrapper is removed when the run is over.

    Args:
        networks: by name, cheapest first, the pipeline's own last.
        scheduler: of the pipeline, after `set_timesteps`.
        stepping: the scheduler's steps.
        plan: if already made; otherwise `make` makes one after the first step, at which the large network runs.
        make: makes a plan.
        offload: keep the large network in CPU memory while it is not called.

    Attributes:
        calls: rows evaluated so far by each network.
        first: the calls of the first step, once it is over.
        guidance: likewise.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        scheduler: Any,
        stepping: Stepping,
        plan: Plan | None,
        make: PlanMaker,
        offload: bool = False,
    ) -> None:
        self._offload = offload
        self._names, self._networks = [*networks], [*networks.values()]
        self._scheduler, self._make = scheduler, make
        self.timesteps: Tensor = scheduler.timesteps
        self.stepping = stepping
        self.row, self.calls = 0, dict.fromkeys(networks, 0)
        self.first: list[Call] = []
        self._told: list[Call] = []
        self._outputs: list[Tensor] = []
        self.guidance = Guidance()
        self.plan: Plan | None = None
        self._evaluators: list[Evaluator] = []
        self._now: Call | None = None
        self._due: list[Tensor] = []
        """The inputs of the next calls, if the state was moved and nothing else changes it."""
        self._known: dict[int, Tensor] = {}
        if plan is not None:
            self._follow(plan)
        self._watch()

    @property
    def rows(self) -> int:
        """Evaluations of the run."""
        return len(self.stepping.moments)

    @property
    def over(self) -> bool:
        """Whether all steps are done."""
        return self.row == self.rows

    def evaluate(self, call: Call) -> Tensor:
        """The output in place of the large network's, (N, ...)."""
        side = len(self._told)
        if self.first and (side >= len(self.first) or len(call.x) != len(self.first[side].x)):
            raise ValueError(
                f"the pipeline now evaluates {len(call.x)} rows, but began with {len(self.first[0].x)}: guidance that "
                "ends midway cannot be accelerated"
            )
        self._told.append(call)
        if self.plan is None:
            output = self._answer(len(self._networks) - 1, call)
        else:
            while len(self._evaluators) <= side:
                self._evaluators.append(self._new_evaluator(self.plan))
            output = self._evaluated(side, call)
        self._outputs.append(output)
        return output

    def _follow(self, plan: Plan) -> None:
        """Adopt a plan. Raises ValueError if it does not fit."""
        if plan.evaluations != self.rows:
            raise ValueError(
                f"the plan has {plan.evaluations} rows, but this call makes {self.rows} steps; pass budget=, which "
                "makes a plan for every call, or a plan with as many rows"
            )
        names = plan.levels or tuple(self._names)
        if len(names) != plan.probabilities.shape[1] or not set(names) <= set(self._names):
            raise ValueError(
                f"the plan is for {plan.probabilities.shape[1]} levels ({', '.join(plan.levels) or 'unnamed'}), but "
                f"the networks here are {', '.join(self._names)}"
            )
        made_for = str(plan.about.get("solver", ""))
        if made_for.startswith(PREFIX) and made_for != self.stepping.solver.name:
            raise ValueError(f"the plan was made for {made_for}, but is used with {self.stepping.solver.name}")
        if plan.per_sample or bool((plan.correction_weights[:, 0] != 1).any()):
            raise ValueError("a pipeline needs a plan shared by all samples, whose first level always runs")
        if plan.moves_state and not self.stepping.solver.revisable:
            raise ValueError(
                f"hindsight moves samples, but {type(self._scheduler).__name__} keeps its own; use estimator=held"
            )
        self.plan = plan

    def _new_evaluator(self, plan: Plan) -> Evaluator:
        weights = self.stepping.quadrature if plan.moves_state else None
        estimator = ESTIMATORS[plan.estimator]
        levels = [functools.partial(self._level, number) for number in self._numbers(plan)]
        return estimator.evaluator(levels, self.stepping.schedule, plan.program, weights)

    def _numbers(self, plan: Plan) -> list[int]:
        """Numbers of the networks that are the plan's levels."""
        return [self._names.index(name) for name in plan.levels or self._names]

    def _level(self, number: int, x: Tensor, t: Tensor) -> Tensor:
        """The output of a network in the current call."""
        assert self._now is not None
        if number in self._known:
            return self._known[number]
        return self._answer(number, self._now._replace(x=x))

    def _answer(self, number: int, call: Call) -> Tensor:
        self.calls[self._names[number]] += len(call.x)
        network = self._networks[number]
        if self._offload and number == len(self._networks) - 1:
            moved(network, call.x.device)
        output = call.answer(network)
        return output if output.dtype in (torch.float32, torch.float64) else output.float()

    def _evaluated(self, side: int, call: Call) -> Tensor:
        self._now = call
        if side < len(self._due) and not torch.equal(self._due[side], call.x):
            self._evaluators[side].forget()  # a callback, or inpainting
        return self._evaluators[side].evaluate(self.row, call.x, torch.empty(0), self.stepping.moments[self.row])

    def _catch_up(self, plan: Plan) -> None:
        """Repeat the first evaluation under the plan, with the known outputs of the large network."""
        self._follow(plan)
        for side, (call, output) in enumerate(zip(self._told, self._outputs, strict=True)):
            self._evaluators.append(self._new_evaluator(plan))
            self._known = {len(self._networks) - 1: output}
            again = self._evaluated(side, call)
            self._known = {}
            if not torch.equal(again, output):
                raise ValueError("a plan of a pipeline must run the large network at the first step; use another seed")

    def _watch(self) -> None:
        """Wrap the scheduler's step."""
        own, self._step_before = self._scheduler.step, vars(self._scheduler).get("step")

        @functools.wraps(own)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = own(model_output, timestep, sample, *args, **kwargs)
            if not self._outputs:  # another pipeline with this scheduler, after an aborted call
                self.end()
                return result
            try:
                return self._after(model_output, result)
            except BaseException:
                self.end()
                raise

        self._scheduler.step = step
        self._watching = True

    def end(self) -> None:
        """Remove the wrapper."""
        if not self._watching:
            return
        self._watching = False
        if self._step_before is None:
            vars(self._scheduler).pop("step", None)
        else:
            self._scheduler.step = self._step_before
        if self._offload:
            moved(self._networks[-1], torch.device("cpu"))

    def _after(self, answer: Tensor, result: Any) -> Any:
        """The result of a step, with the sample moved as the plan requires."""
        if self.row == 0:
            self.guidance, self.first = Guidance.found(self._outputs, answer), self._told
            if self.plan is None:
                self._catch_up(self._make(self))
        told, self._told, self._outputs, self._due = self._told, [], [], []
        self.row += 1
        if self.over:
            self.end()
            return result
        assert self.plan is not None
        if self._offload and not bool(self.plan.runs[self.row, -1]):
            moved(self._networks[-1], torch.device("cpu"))
        if not self.plan.moves_state or not bool(self.plan.revised[self.row]):
            return result
        sample = result[0] if isinstance(result, tuple) else result.prev_sample
        sample = sample + self._move(sample, told).to(sample.dtype)
        self._due = [self._input(sample, call) for call in told]
        if isinstance(result, tuple):
            return sample, *result[1:]
        result.prev_sample = sample
        return result

    @property
    def _timestep(self) -> Tensor:
        """Of the scheduler, at the next evaluation."""
        return self.timesteps[len(self.timesteps) - self.rows + self.row]

    def _input(self, sample: Tensor, call: Call) -> Tensor:
        """What a call like this gets for a sample (B, ...) at the next evaluation."""
        x = torch.cat([sample] * (len(call.x) // len(sample)))
        if hasattr(self._scheduler, "scale_model_input"):
            x = self._scheduler.scale_model_input(x, self._timestep)
        return x.to(call.x.dtype)

    def _move(self, sample: Tensor, told: Sequence[Call]) -> Tensor:
        """The move of a sample (B, ...) before the next evaluation."""
        moves: list[Tensor] = []
        for evaluator, call in zip(self._evaluators, told, strict=True):
            x, time = self._input(sample, call), torch.as_tensor(call.time)
            now = (self._timestep * self.stepping.time_scale).to(time).expand_as(time)
            self._now = call.with_input(x, now)
            move = evaluator.revise(self.row, self._now.x, torch.empty(0), self.stepping.moments[self.row])
            moves.append(torch.zeros_like(x) if move is None else move[:, : x.shape[1]])
        return self.guidance.combined(moves) * self.stepping.scale(self.stepping.points[self.row])


def moved(network: nn.Module, device: torch.device) -> None:
    """Put a network on a device, unless it is there."""
    if next(network.parameters()).device.type != device.type:
        network.to(device)
