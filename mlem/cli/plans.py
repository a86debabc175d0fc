"""From plan options to a specification, a stored plan, or a single level."""

from __future__ import annotations

from mlem.cli.options import plan_defaults
from mlem.cli.schema import Sample
from mlem.cli.values import written
from mlem.family import Family
from mlem.level import Level
from mlem.multilevel.plan import Plan
from mlem.multilevel.spec import TARGETS, PlanSpec

__all__ = ["plan_of"]


def plan_of(job: Sample, model: Family | Level) -> Plan | PlanSpec | None:
    """The plan given by `plan=`, `budget=` etc.; None for a single level. Raises ValueError for conflicts."""
    options, own = dict(job.shared), job.sampler.shared
    other_target = any(value is not None for value in (options["mse"], options["delta"], job.plan))
    if other_target and options["budget"] == own.get("budget"):
        options["budget"] = None  # replaces the sampler's own budget
    targets = [key for key in TARGETS if options[key] is not None] + ["plan"] * (job.plan is not None)
    usual = plan_defaults() | own
    shaping = [key for key, value in options.items() if key not in TARGETS and value not in (None, usual[key])]
    if not targets and options["probabilities"] != "learned":
        if shaping:
            given = f"{shaping[0]}={written(options[shaping[0]])}"
            raise ValueError(f"{given} shapes a multilevel plan: add budget=, such as budget=0.25")
        return None
    first = (targets or ["probabilities"])[0]
    if not isinstance(model, Family):
        raise ValueError(f"{first}= shares work among levels, but model= is a single level; leave it out")
    if job.level is not None:
        raise ValueError(f"level={job.level} runs one level, {first}= several; use one of them")
    if job.plan is None:
        return PlanSpec.from_options(options | {"batch_size": job.batch_size, "seed": job.seed})
    if others := [key for key in targets if key != "plan"] + shaping:
        raise ValueError(f"plan={job.plan} is already made: leave out {others[0]}=")
    return Plan.load(job.plan) if job.plan.endswith(".json") else model.fitted.plan_for(model, job.plan)
