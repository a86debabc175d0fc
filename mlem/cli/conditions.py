"""Conditions of samples, from the options `labels`, `conditions` and `guidance`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlem.cli.schema import Guidance, Sample
from mlem.cli.values import parse_indices
from mlem.conditions import ConditionSource, rows_of
from mlem.family import Family
from mlem.files import sha256
from mlem.guidance import guided_level
from mlem.level import Level

__all__ = ["conditions_for", "guided", "told"]


def guided(model: Family | Level, options: Guidance) -> Family | Level:
    """The model under guidance, if there is any. Raises ValueError naming the option."""
    interval = None if options.interval is None else (options.interval[0], options.interval[1])
    if options.scale is None:
        for name, value in (("weak", options.weak), ("interval", interval)):
            if value is not None:
                raise ValueError(f"guidance.{name}={value} needs a scale: add guidance.scale=2")
        return model
    try:
        if isinstance(model, Family):
            return model.guided(options.scale, weak=options.weak, interval=interval)
        if options.weak is not None:
            raise ValueError(f"weak={options.weak} names a level of a family, but model= is a single level")
        return guided_level(model, options.scale, interval=interval)
    except ValueError as error:
        raise ValueError(f"guidance: {error}") from error


def conditions_for(job: Sample, model: Family | Level) -> ConditionSource | None:
    """Conditions of the samples; None: the default. Raises ValueError if they do not fit the model."""
    if job.labels is not None and job.conditions is not None:
        raise ValueError("labels= and conditions= exclude each other; use one")
    if job.labels is not None:
        return _labels(list(parse_indices(job.labels, "labels")), model)
    return None if job.conditions is None else rows_of(job.conditions)


def told(job: Sample) -> dict[str, Any]:
    """The settings of conditions that determine samples; empty without conditions."""
    found: dict[str, Any] = {}
    if job.guidance.scale is not None:
        found["guidance"] = vars(job.guidance)
    if job.labels is not None:
        found["labels"] = job.labels
    if job.conditions is not None:
        found["conditions"] = sha256(job.conditions)
    return found


def _labels(labels: list[int], model: Family | Level) -> ConditionSource:
    levels = model.levels if isinstance(model, Family) else (model,)
    classes = {name: count for level in levels for name, count in level.conditions.items() if isinstance(count, int)}
    if not classes:
        raise ValueError(f"labels={labels[0]}.. names classes, but these levels take none; leave out labels")
    most = min(classes.values())
    if max(labels) > most:
        raise ValueError(f"labels must be in [0, {most}], {most} meaning no class, got {max(labels)}")

    def source(indices: Tensor) -> dict[str, Tensor]:
        own = indices.new_tensor(labels)[indices % len(labels)]
        return dict.fromkeys(classes, own)

    return source
