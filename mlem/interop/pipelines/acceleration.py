"""`mlem.accelerate`: a diffusers pipeline accelerated by smaller networks."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mlem import networks
from mlem.arguments import called
from mlem.conditions import described
from mlem.family import Family
from mlem.files import cache_folder
from mlem.interop.pipelines.captured import Call, CapturedNetwork, plain_network
from mlem.interop.pipelines.placing import LARGE, PLACES, MultilevelNetwork, Small, named_networks, place_of
from mlem.interop.pipelines.running import Run, moved
from mlem.interop.pipelines.stepping import Stepping, Steppings
from mlem.level import Level
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.identity import found_plan, plan_for_use
from mlem.multilevel.kept import KeptPlans
from mlem.multilevel.plan import Plan
from mlem.multilevel.spec import PlanSpec
from mlem.waiting import Waiting

__all__ = ["Acceleration", "accelerate", "restore"]


@called("accelerate")
def accelerate(
    pipe: Any,
    *,
    small: Small | Sequence[Small],
    budget: float | None = None,
    plan: Plan | PlanSpec | None = None,
    inputs: Mapping[str, Any] | None = None,
    images: int = 4,
    times: int = 12,
    cache: str | os.PathLike[str] | None = None,
    offload: bool = False,
) -> Acceleration:
    """Let smaller networks make most evaluations of a diffusers pipeline: nearly the same images, faster.

    Only its `unet` or `transformer` is replaced, until `restore(pipe)` or the end of a `with` block. A plan is made for
    the steps of each call. At the first, the networks are calibrated with the conditions of that call, on trajectories
    from other noise.

    Args:
        pipe: a pipeline in memory, on its device.
        small: one network, or several, cheapest first: diffusers modules, levels, or folders of either; for the same
            latents, with the same noise schedule and prediction.
        budget: share of the seconds of the large network alone in as many steps.
        plan: instead of budget: a specification from `family.plan`, or a plan with one row per step.
        inputs: pipeline arguments to calibrate with now, such as {"prompt": [..]}; None: those of the first call.
        images, times: of the calibration; see `mlem.multilevel.calibrate`.
        cache: folder of saved calibrations; by default ~/.cache/mlem.
        offload: keep the large network's weights in CPU memory while it is not called.

    Raises:
        ValueError: the pipeline or a network does not fit; names both.
    """
    return Acceleration(
        pipe,
        [small] if isinstance(small, nn.Module | Level | str | os.PathLike) else [*small],
        _asked(budget, plan),
        images=images,
        times=times,
        cache=cache,
        offload=offload,
    ).begun(inputs)


def restore(pipe: Any) -> None:
    """Give a pipeline its own network back. Raises ValueError if it is not accelerated."""
    for name in PLACES:
        network = vars(pipe).get(name)
        if isinstance(network, MultilevelNetwork):
            network.acceleration[0].restore()
            return
    raise ValueError(f"this {type(pipe).__name__} is not accelerated")


def _asked(budget: float | None, plan: Plan | PlanSpec | None) -> Plan | PlanSpec | None:
    if (budget is None) == (plan is None):
        raise ValueError("pass one of budget= and plan=, such as budget=0.4")
    return plan if budget is None else PlanSpec(budget=budget)


class Acceleration:
    """An accelerated pipeline; see `accelerate`. As a context manager it yields the pipeline and restores it.

    Attributes:
        pipe: the pipeline.
        plan: of the last call; None before the first step of the first call.
    """

    def __init__(
        self,
        pipe: Any,
        small: Sequence[Small],
        asked: Plan | PlanSpec | None,
        *,
        images: int,
        times: int,
        cache: str | os.PathLike[str] | None,
        offload: bool,
    ) -> None:
        self.pipe, self._place = pipe, place_of(pipe)
        self._large: nn.Module = getattr(pipe, self._place)
        self._home = next(self._large.parameters()).device
        small_ones, self._levels = named_networks(small, self._large)
        self._networks = small_ones | {LARGE: self._large}
        self._asked, self._images, self._times, self._offload = asked, images, times, offload
        self._cache = cache_folder() if cache is None else Path(cache)
        self._run: Run | None = None
        self._families: dict[str, Family] = {}
        config = getattr(plain_network(self._large), "config", {})
        self._steppings = Steppings(float(config.get("timestep_scale", 1.0)))
        self.plan: Plan | None = None
        self.network = MultilevelNetwork([*self._networks.values()], self)
        """The network that replaces the pipeline's own."""
        vars(pipe)[self._place] = self.network

    def begun(self, inputs: Mapping[str, Any] | None) -> Acceleration:
        """Return self, calibrated if there are inputs."""
        if inputs is not None:
            try:
                self.pipe(**inputs)
            except BaseException:
                self.restore()
                raise
        return self

    @property
    def family(self) -> Family:
        """The networks as levels, with conditions and guidance of the last call: `sample(acceleration.family, ..)`."""
        if self._run is None or self._run.row == 0:
            raise ValueError("the pipeline's conditions are known after its first call: run it once")
        return self._family(self._run)

    @property
    def times(self) -> tuple[float, ...]:
        """The times of the last call under the family's schedule: `TimeGrid("diffusers", acceleration.times)`."""
        return () if self._run is None else self._run.stepping.points.grid.times

    @property
    def calls(self) -> dict[str, int]:
        """Rows evaluated by each network in the last call, by name; guided samples count as two."""
        return dict.fromkeys(self._networks, 0) if self._run is None else dict(self._run.calls)

    def __enter__(self) -> Any:
        return self.pipe

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the pipeline its own network back."""
        if self._run is not None:
            self._run.end()
        if self._offload:
            moved(self._large, self._home)
        vars(self.pipe)[self._place] = self._large

    def evaluate(self, call: Call) -> Tensor:
        """The output in place of the large network's; called by the network that replaces it."""
        scheduler = self.pipe.scheduler
        if self._run is None or self._run.over or self._run.timesteps is not scheduler.timesteps:
            if self._run is not None:
                self._run.end()  # an aborted one
            plan = self._asked if isinstance(self._asked, Plan) else None
            stepping = self._steppings.of(scheduler, call.moment)
            for level in self._levels:
                stepping.refuse_other(level)
            self._run = Run(self._networks, scheduler, stepping, plan, self._plan_for, self._offload)
            self.plan = plan
        return self._run.evaluate(call).to(call.x.dtype)

    def _plan_for(self, run: Run) -> Plan:
        assert isinstance(self._asked, PlanSpec)
        family, rows = self._family(run), _samples(run)
        spec = replace(self._asked, batch_size=rows)
        if spec.estimator == "hindsight" and not run.stepping.solver.revisable:
            spec = replace(spec, estimator="held")
        if spec.searched:
            self._calibrated(family, rows, run.first[0].x.device)
        try:
            plan = _begun(spec, family, run.stepping)
        except ValueError as error:
            raise ValueError(f"{_in_seconds(family, rows)}{error}") from error
        if plan.levels and plan.levels[-1] != LARGE:
            raise ValueError(f"{_in_seconds(family, rows)}no plan with the pipeline's own network fits this budget")
        self.plan = plan
        return plan

    def _family(self, run: Run) -> Family:
        """The levels of a run, which share fitted results with similar runs."""
        shape = tuple(run.first[0].x.shape[1:])
        device = run.first[0].x.device.type
        key = json.dumps([run.stepping.identity, run.guidance, shape, device], sort_keys=True)
        if key not in self._families:
            levels = [self._level(name, run, shape) for name in self._networks]
            family = Family(levels)
            folder = self._cache / family.weights_hash / hashlib.sha256(key.encode()).hexdigest()[:16]
            self._families[key] = Family(levels, Fitted.load(folder), KeptPlans(folder), folder)
        for level in self._families[key].levels:
            assert isinstance(level.network, CapturedNetwork)
            level.network.tell(run.first)
            level.conditions = described({"row": level.network.samples})
        return self._families[key]

    def _level(self, name: str, run: Run, shape: Sequence[int]) -> Level:
        network, conditions = self._networks[name], {"row": _samples(run)}
        counted = CapturedNetwork(plain_network(network), run.guidance, run.first)
        try:
            flops = networks.flops(counted, shape, conditions)
        except (RuntimeError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{name} does not take what this pipeline passes to its network: {said}") from error
        return Level(
            name,
            CapturedNetwork(network, run.guidance, run.first),
            run.stepping.schedule,
            shape,
            run.stepping.prediction,
            flops=flops or None,
            conditions=conditions,
        )

    def _calibrated(self, family: Family, rows: int, device: torch.device) -> None:
        """Calibrate the family unless already done."""
        if family.fitted.calibration is not None:
            return
        if self._offload:
            moved(self._large, device)
        with Waiting("calibrating the networks of a pipeline", 3) as waiting:
            found = calibrate(
                family,
                images=self._images,
                times=self._times,
                batch_sizes=(rows,),
                device=device,
                progress=lambda text: waiting.advance(),
            )
        family.fitted = replace(family.fitted, calibration=found)
        assert family.folder is not None
        try:
            family.folder.mkdir(parents=True, exist_ok=True)
            family.save_fitted(family.folder)
        except OSError as error:
            warnings.warn(f"the calibration is not saved: {error}; cache= names another folder", stacklevel=2)


def _samples(run: Run) -> int:
    """Number of samples that the pipeline makes at once."""
    return sum(len(call.x) for call in run.first) // run.guidance.sides


def _in_seconds(family: Family, rows: int) -> str:
    """Seconds of the levels, to start an error with; empty if unknown."""
    found = family.fitted.calibration
    if found is None:
        return ""
    seconds = dict(zip(found.names, found.seconds[min(found.seconds, key=lambda size: abs(size - rows))], strict=True))
    each = ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in seconds.items())
    return f"a sample takes {each} in the networks: "


def _begun(spec: PlanSpec, family: Family, stepping: Stepping) -> Plan:
    """The plan, adjusted for its first row, where the large network has already run."""
    plan = plan_for_use(spec, family, stepping.solver, stepping.points)
    begun = plan.begun()
    if begun is plan or spec.budget is None:
        return begun
    try:
        less = replace(spec, budget=spec.budget - 1 / stepping.points.steps)
        found = found_plan(less, family, stepping.solver, stepping.points)
    except ValueError:  # the budget is too small for any plan
        return begun
    return found.begun() if LARGE in found.levels else begun
