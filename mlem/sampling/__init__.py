"""Sampling: `sample()` and the `Sampler`, which binds a solver to a model and keeps the ledger of what it costs."""

from mlem.sampling.sampler import PRECISIONS, NonFiniteError, Result, Sampler, blocks, sample, solver_of

__all__ = ["PRECISIONS", "NonFiniteError", "Result", "Sampler", "blocks", "sample", "solver_of"]
