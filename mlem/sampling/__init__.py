"""Sampling: `sample()` and the `Sampler`, which binds a solver to a model and keeps the ledger of what it costs."""

from mlem.sampling.batches import blocks, sample
from mlem.sampling.hooks import Step, noised
from mlem.sampling.sampler import PRECISIONS, NonFiniteError, Result, Sampler, solver_of

__all__ = [
    "PRECISIONS",
    "NonFiniteError",
    "Result",
    "Sampler",
    "Step",
    "blocks",
    "noised",
    "sample",
    "solver_of",
]
