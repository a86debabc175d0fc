"""What a sampler runs: a model as one denoiser, with a meter around each of its networks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mlem.conditions import ConditionSource, conditions_of
from mlem.denoiser import AnyDtype, Conditional, Denoiser, HoldsNetwork, NetworkDenoiser, Scheduled
from mlem.family import Family
from mlem.ledger import LevelLedger, Meter, Network
from mlem.level import Level
from mlem.multilevel.denoiser import MultilevelDenoiser
from mlem.multilevel.plan import Plan
from mlem.schedule import NoiseSchedule

__all__ = ["MeteredModel", "Model"]

Model = Family | Level | Denoiser
"""What can be sampled."""


@dataclass
class MeteredModel:
    """A model with meters.

    denoiser: the model; multilevel: the same if it runs a plan. schedule: as declared by the model. any_dtype: whether
    it takes float64. meters: by level name, or "model" for a bare denoiser. level: the level, if there is just one.
    networks: the metered torch modules.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule | None
    any_dtype: bool
    meters: dict[str, Meter]
    multilevel: MultilevelDenoiser | None = None
    level: Level | None = None
    networks: nn.ModuleList = field(init=False)

    def __post_init__(self) -> None:
        metered = [meter.network for meter in self.meters.values()]
        # a module counts as a whole: a guided one holds two networks
        inside = [
            one if isinstance(one, nn.Module) or not isinstance(one, HoldsNetwork) else one.network for one in metered
        ]
        self.networks = nn.ModuleList(one for one in inside if isinstance(one, nn.Module))

    @staticmethod
    def of(model: Level | Denoiser) -> MeteredModel:
        """A level, or a bare denoiser."""
        name, denoiser, flops, level = "model", model, 0, None
        if isinstance(model, Level):
            name, denoiser, flops, level = model.name, model.denoiser, model.flops, model
        assert not isinstance(denoiser, Level)
        schedule = denoiser.schedule if isinstance(denoiser, Scheduled) else None
        any_dtype = isinstance(denoiser, AnyDtype) and denoiser.any_dtype
        if isinstance(denoiser, NetworkDenoiser):
            meter = Meter(denoiser.network, flops)
            return MeteredModel(denoiser.through(meter), schedule, any_dtype, {name: meter}, level=level)
        meter = Meter(denoiser, flops)
        return MeteredModel(meter, schedule, any_dtype, {name: meter})

    @staticmethod
    def under(family: Family, plan: Plan) -> MeteredModel:
        """The levels of a family under a plan."""
        meters: dict[str, Meter] = {}

        def meter(name: str, network: Network) -> Meter:
            meters[name] = Meter(network, family.level(name).flops)
            return meters[name]

        multilevel = MultilevelDenoiser(family, plan).metered(meter)
        return MeteredModel(multilevel, multilevel.schedule, multilevel.any_dtype, meters, multilevel)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter; the CPU for a model without any."""
        parameter = next(self.networks.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def begin(self) -> None:
        """Begin a trajectory: nothing of the previous one is reused."""
        for meter in self.meters.values():
            meter.begin()

    def denoiser_for(self, indices: Tensor, conditions: ConditionSource | None) -> Denoiser:
        """The denoiser for a trajectory of the samples with these indices (B,), with their conditions.

        Raises: ValueError for conditions that do not fit, or that the denoiser does not take.
        """
        self.begin()
        if self.level is not None:
            own = conditions_of([self.level], conditions, indices)[0]
        elif conditions is None:
            return self.denoiser
        else:
            own = conditions(indices)
        if isinstance(self.denoiser, Conditional):
            return self.denoiser.given(own) if own else self.denoiser
        if own:
            raise ValueError(f"conditions= gives {', '.join(own)}, but this denoiser takes nothing besides x and t")
        return self.denoiser

    def collect(self, images: int, plan: Plan | None) -> dict[str, LevelLedger]:
        """The cost of each level since the last call, with the plan's mean cost over its coins."""
        rows = [meter.images for meter in self.meters.values()]
        levels = {name: meter.collect() for name, meter in self.meters.items()}
        if plan is not None:
            calls: list[float] = plan.expected_calls.tolist()
            for cost, count, expected in zip(levels.values(), rows, calls, strict=True):
                # guidance, where it acts, calls a network twice
                cost.expected_calls = expected * images * (cost.calls / count if count else 1)
        return levels

    @property
    def rows(self) -> int:
        """Rows evaluated by levels since the last `collect`."""
        return sum(meter.images for meter in self.meters.values())
