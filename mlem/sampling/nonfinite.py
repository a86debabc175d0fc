"""Where a trajectory becomes NaN or infinite: after which step, and in which network."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mlem.ledger import Meter, Network
from mlem.sampling.hooks import Step

__all__ = ["FirstFailure", "suspects"]


class FirstFailure:
    """Watches a trajectory (`watch=`) for the first step after which a sample is not finite.

    step, row: of the first failure; None until there is one.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.row: int | None = None

    def __call__(self, step: Step) -> None:
        if self.step is None:
            bad = ~torch.isfinite(step.x.flatten(1)).all(1)
            if bad.any():
                self.step, self.row = step.number - 1, int(bad.nonzero()[0])


@contextmanager
def suspects(meters: Mapping[str, Meter]) -> Generator[list[str], None, None]:
    """Names of the networks that turned finite input non-finite within the block, in order."""
    found: list[str] = []

    def watched(name: str, network: Network) -> Network:
        def call(x: Tensor, t: Tensor, **conditions: Tensor) -> Any:
            output = network(x, t, **conditions)
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
