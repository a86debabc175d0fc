"""The choices of `eval=` for `sample.py`, each with its options. Nothing here imports torch or Hydra."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mlem.arguments import MOST_STEPS
from mlem.cli.fields import option
from mlem.cli.values import CHECKED, ERRORS, LIST, SHARE, TEXT, one_of, whole

__all__ = ["Benchmark", "Scaling", "Verb"]


@dataclass(frozen=True, kw_only=True)
class Verb:
    """Samples to make, a folder to score, or references to compute."""

    name: str = option(one_of("samples", "folder", "ref", "benchmark", "scaling"))


@dataclass(frozen=True, kw_only=True)
class Benchmark(Verb):
    """Error against time of a list of samplers."""

    names: ClassVar = ("benchmark",)

    solver: str = option(TEXT, "solver of the samplers; ddim for the ODE")
    steps: list[int] = option(LIST, "steps of single levels")
    reference_steps: int = option(whole(1, MOST_STEPS), "steps of the reference: the largest level from the same noise")
    plan_steps: int = option(whole(1, MOST_STEPS), "steps of plans")
    budget: float = option(SHARE, "cost of plans at delta 0: share of the largest level at every step (FLOPs)")
    deltas: list[float] = option(LIST, "added to the logit of every p_k but the first")
    trials: int = option(whole(1), "draws of the coins at every delta")
    coins: str = option(one_of("systematic", "bernoulli", "nested", "poisson"), "how the coins are tossed")
    draws: int = option(whole(1), "bootstrap samples of the images")
    shown: int = option(whole(0), "images per strip of samples; 0: none")
    targets: list[float] = option(
        ERRORS, "mean squared errors at which times are compared, with recommendations; []: the figures of [J]"
    )
    kind: str = option(one_of("ode", "sde"), "kind of the recommended solvers: ode or sde")
    check: int = option(CHECKED, "images on which recommendations are measured before they are made; 0: none")
    samplers: list[Any] = option(
        LIST, "name or rival, solver, steps; grid, options; levels: each alone, reuse; or plan, running, forecast"
    )


@dataclass(frozen=True, kw_only=True)
class Scaling(Verb):
    """The scaling law of a family."""

    names: ClassVar = ("scaling",)

    cost: str = option(one_of("flops", "seconds"), "flops or seconds")
    replicates: int = option(whole(100), "bootstrap samples of the images")
