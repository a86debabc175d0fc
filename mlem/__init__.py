"""mlem: train a family of diffusion networks of increasing size, and sample it fast."""

import os
from typing import TYPE_CHECKING

from mlem.invocation import one_line_for_interrupts as _one_line_for_interrupts

__version__ = "0.2.0"

# OpenMP threads that wait for others sleep soon. By default they spin, on a busy machine through whole time slices.
# The runtimes, GNU's and Intel's, read this when they are loaded: so it stands here, before any import of torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("KMP_BLOCKTIME", "1")

_one_line_for_interrupts()

if TYPE_CHECKING:
    from mlem.family import Family as Family
    from mlem.grids import TimeGrid as TimeGrid
    from mlem.interop.pipelines import accelerate as accelerate
    from mlem.interop.pipelines import restore as restore
    from mlem.interop.schedulers import RandomizedMidpointScheduler as RandomizedMidpointScheduler
    from mlem.level import Level as Level
    from mlem.multilevel.coefficients import Coefficients as Coefficients
    from mlem.multilevel.denoiser import MultilevelDenoiser as MultilevelDenoiser
    from mlem.multilevel.plan import Plan as Plan
    from mlem.multilevel.spec import PlanSpec as PlanSpec
    from mlem.networks import Reuse as Reuse
    from mlem.sampling import NonFiniteError as NonFiniteError
    from mlem.sampling import Result as Result
    from mlem.sampling import Sampler as Sampler
    from mlem.sampling import sample as sample
    from mlem.schedule import NoiseSchedule as NoiseSchedule

_HOMES = {
    "Coefficients": "multilevel.coefficients",
    "Family": "family",
    "Level": "level",
    "MultilevelDenoiser": "multilevel.denoiser",
    "NoiseSchedule": "schedule",
    "NonFiniteError": "sampling",
    "Plan": "multilevel.plan",
    "PlanSpec": "multilevel.spec",
    "RandomizedMidpointScheduler": "interop.schedulers",
    "Result": "sampling",
    "Reuse": "networks",
    "Sampler": "sampling",
    "TimeGrid": "grids",
    "accelerate": "interop.pipelines",
    "restore": "interop.pipelines",
    "sample": "sampling",
}
__all__ = [
    "Coefficients",
    "Family",
    "Level",
    "MultilevelDenoiser",
    "NoiseSchedule",
    "NonFiniteError",
    "Plan",
    "PlanSpec",
    "RandomizedMidpointScheduler",
    "Result",
    "Reuse",
    "Sampler",
    "TimeGrid",
    "accelerate",
    "restore",
    "sample",
]


def __getattr__(name: str) -> object:
    # torch takes seconds to import: `--help` and bad options must not wait for it
    if name not in _HOMES:
        raise AttributeError(f"module 'mlem' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"mlem.{_HOMES[name]}"), name)
