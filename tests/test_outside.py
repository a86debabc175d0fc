"""What is outside the networks, counted instead of timed: operators of torch, and seconds of a clock of our own."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mlem.family import Family
from mlem.ledger import Meter
from mlem.level import Level
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.plan import Plan
from mlem.sampling import Sampler
from mlem.schedule import NoiseSchedule
from mlem.solvers import SOLVERS

STEPS, BATCH = 32, 64
OPERATORS = {"ddpm": 58, "dpm_solver_pp": 46}
"""Of torch, for a step."""


class Still(nn.Module):
    """A network whose answers take `seconds` of a clock that stands still otherwise."""

    def __init__(self, width: int, clock: list[float], seconds: float) -> None:
        super().__init__()
        self.convolution, self.clock, self.seconds = nn.Conv2d(1, width, 1), clock, seconds

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.clock[0] += self.seconds
        return self.convolution(x).mean(1, keepdim=True)


def family(clock: list[float]) -> Family:
    """Levels of 0.01, 0.04 and 0.16 seconds."""
    torch.manual_seed(0)
    networks = [Still(4**k, clock, 0.01 * 4**k) for k in range(3)]
    return Family([Level(f"{k}", one, NoiseSchedule.cosine(), (1, 8, 8)) for k, one in enumerate(networks)])


class Outside(TorchDispatchMode):
    """Counts the operators of torch that run outside networks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count, self._inside, call = 0, False, Meter.__call__

        def metered(meter: Meter, *args: Any, **conditions: Any) -> Any:
            self._inside = True
            output = call(meter, *args, **conditions)
            self._inside = False
            return output

        monkeypatch.setattr(Meter, "__call__", metered)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not self._inside
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("solver", OPERATORS)
def test_a_step_outside_the_networks_is_few_operators(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hindsight, on three levels."""
    plan = Plan.given(torch.arange(STEPS)[:, None] % torch.tensor([1, 6, 12]) == 0)
    sampler = Sampler(family([0.0]), solver=solver, steps=STEPS, plan=plan)
    sampler.run(range(BATCH))  # what follows from the plan and the grid alone is found once
    with Outside(monkeypatch) as outside:
        sampler.run(range(BATCH))
    assert outside.count <= OPERATORS[solver] * STEPS


@pytest.mark.parametrize("solver", ["ddpm", "dpm_solver_pp"])
def test_a_run_takes_the_seconds_that_its_budget_promised(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.04 seconds of every step are spent outside, and count."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    for name in ("ddim", "ddpm", "dpm_solver_pp"):

        def slow(self: Any, *args: Any, step: Any = SOLVERS[name].step) -> Any:
            clock[0] += 0.04
            return step(self, *args)

        monkeypatch.setattr(SOLVERS[name], "step", slow)
    levels = family(clock)
    levels.fitted = Fitted(calibrate(levels, images=2, times=6, batch_sizes=[8]))
    plans = (None, levels.plan(budget=0.5, batch_size=8))
    samplers = [Sampler(levels, solver=solver, steps=STEPS, plan=plan) for plan in plans]
    alone, together = [sampler.run(range(8)).ledger.wall_seconds for sampler in samplers]
    assert together == pytest.approx(0.5 * alone, rel=0.1)
