"""Derived from the schema: names and defaults of options, their checks, and typed values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any

from mlem.cli.callbacks import refuse_targets
from mlem.cli.schema import PLAN_ONLY, Learning, Sample, Train
from mlem.cli.values import ANY, OPTIONS, Kind, written
from mlem.multilevel.spec import PlanSpec

__all__ = ["COMMANDS", "OPEN", "Row", "check", "defaults", "plan_defaults", "read", "rows", "value_of"]

COMMANDS: dict[str, type[Train] | type[Sample]] = {"train": Train, "sample": Sample}
OPEN = ("schedule", "data.options", "sampler.options")
"""Groups to which options may be added (+): their readers reject unknown ones."""


@dataclass(frozen=True)
class Row:
    """One option of a command. default: MISSING if the choices of its group give it."""

    name: str
    kind: Kind
    words: str
    default: Any
    unused: tuple[str, ...]


def rows(command: str) -> list[Row]:
    """All options of a command, including those of every choice of its groups, in schema order."""
    return list(_rows(COMMANDS[command], ""))


def _rows(kind: type, prefix: str) -> Iterator[Row]:
    found: set[str] = set()
    for one in fields(kind):
        name = f"{prefix}{one.metadata.get('name') or one.name}"
        if "plans" in one.metadata:
            yield from _plan_rows()
        elif "classes" in one.metadata:
            # choices of one group share options
            for row in (row for choice in one.metadata["classes"] for row in _rows(choice, f"{name}.")):
                if row.name not in found:
                    found.add(row.name)
                    yield row
        elif "kind" in one.metadata:
            about = one.metadata
            yield Row(name, about["kind"], about["help"], _default(one), about["unused"])


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _plan_fields() -> list[Field[Any]]:
    """The options of plans; `batch_size` and `seed` are those of the samples."""
    return [one for one in fields(PlanSpec) if one.name not in ("batch_size", "seed")]


def plan_defaults() -> dict[str, Any]:
    """The options of plans and their defaults."""
    return {one.name: one.default for one in _plan_fields()}


def _plan_rows() -> Iterator[Row]:
    for one in _plan_fields():
        about = one.metadata
        words = f"{about['help']}: {', '.join(about['choices']) or about['value']}"
        # a choice in configs/sampler may set it; PlanSpec checks its value
        yield Row(one.name, ANY, words, f"${{oc.select:sampler.{one.name},{written(one.default)}}}", PLAN_ONLY)


def defaults(command: str) -> dict[str, Any]:
    """The options outside groups of choices, as a config: nested, with their defaults."""
    nested: dict[str, Any] = {}
    own = _own_groups(command)
    for row in rows(command):
        *outer, last = row.name.split(".")
        if row.default is not MISSING and (not outer or outer[0] in own):
            node = nested
            for key in outer:
                node = node.setdefault(key, {})
            node[last] = row.default
    return nested


def _own_groups(command: str) -> set[str]:
    """Groups without choices: every option has its default."""
    given = {row.name.partition(".")[0] for row in rows(command) if "." in row.name and row.default is MISSING}
    return {row.name.partition(".")[0] for row in rows(command) if "." in row.name} - given


def check(plain: dict[str, Any]) -> None:
    """Check a composed config, resolved to plain data, before anything heavy is imported.

    Raises ValueError for the first option out of range, with its value and what is allowed.
    """
    known = rows("sample" if "eval" in plain else "train")
    _refuse_values_for_groups(plain, known)
    refuse_targets(plain)
    for row in known:
        for value in _given(plain, row.name):
            row.kind.check(row.name, value)
    for name in ("eval", "model"):
        if isinstance(plain.get(name), dict):
            _refuse_half_a_choice(name, plain[name], "sample" if "eval" in plain else "train")
    _check_together(plain)


def _refuse_values_for_groups(plain: dict[str, Any], known: list[Row]) -> None:
    groups = {row.name.rpartition(".")[0] for row in known if "." in row.name}
    groups |= {row.name for row in known if row.kind is OPTIONS}
    for name in sorted(groups):
        for value in _given(plain, name):
            if not isinstance(value, dict) and not (name == "model" and value is None):
                raise ValueError(f"{name} holds options: write {name}.OPTION=VALUE, got {value!r}")


def _given(plain: Any, name: str) -> list[Any]:
    """The value of the option with this dotted name, if the config has it."""
    *outer, last = name.split(".")
    for key in outer:
        plain = plain.get(key) if isinstance(plain, dict) else None
    return [plain[last]] if isinstance(plain, dict) and last in plain else []


def _refuse_half_a_choice(group: str, plain: dict[str, Any], command: str) -> None:
    """Reject `eval.name` or `model.name` alone, which do not bring the options of that choice."""
    kind, name = _class_of(_field(COMMANDS[command], group), plain), plain["name"]
    missing = [one.name for one in fields(kind) if _default(one) is MISSING and _key(one) not in plain]
    if missing:
        raise ValueError(f"{group}.name={name} has options of its own, which {group}={name} brings: use that instead")


def _check_together(plain: dict[str, Any]) -> None:
    """Check conditions between options."""
    trainer = plain["trainer"]
    nodes = trainer["num_nodes"]
    if nodes > 1 and not plain.get("dry_run") and not {"RANK", "SLURM_PROCID"} & os.environ.keys():
        raise ValueError(f"trainer.num_nodes={nodes} needs torchrun or srun on every machine: see docs/cluster.md")
    if (training := plain.get("training")) is not None and training["batch_size"] % training["accumulate"]:
        raise ValueError(
            f"training.batch_size must be a multiple of training.accumulate {training['accumulate']}, got "
            f"{training['batch_size']}"
        )
    model = plain.get("model")
    if isinstance(model, dict) and (steps := model.get("level_steps")) and len(steps) != len(model["levels"]):
        raise ValueError(f"model.level_steps must have one number for each of {model['levels']}, got {steps}")
    if isinstance(model, dict) and model.get("name") in Learning.names:
        if model["images"] % model["batch_size"]:
            raise ValueError(
                f"model.images must be a multiple of model.batch_size {model['batch_size']}, got {model['images']}"
            )
        if model["tangents"] == "reverse" and model["coins"] != "bernoulli":
            raise ValueError(f"model.tangents must be exact or random for model.coins={model['coins']}, got 'reverse'")
        if trainer["precision"] != "fp32":
            raise ValueError(f"trainer.precision must be fp32 for model=coefficients, got {trainer['precision']!r}")
        if trainer["compile"]:
            raise ValueError("trainer.compile must be false for model=coefficients, got True")


def _field(kind: type, name: str) -> Field[Any]:
    return next(one for one in fields(kind) if one.name == name)


def _key(one: Field[Any]) -> str:
    return one.metadata.get("name") or one.name


def _class_of(one: Field[Any], plain: dict[str, Any]) -> type:
    """The class of the group to which these values belong."""
    classes: tuple[type, ...] = one.metadata["classes"]
    named = [kind for kind in classes if plain.get("name") in getattr(kind, "names", ())]
    free = [kind for kind in classes if not hasattr(kind, "names")]
    whole = [kind for kind in free if all(_key(each) in plain for each in fields(kind) if _default(each) is MISSING)]
    return (named or whole or free)[0]


def read(plain: dict[str, Any], told: dict[str, Any] | None = None) -> Train | Sample:
    """The typed options of a checked config: a `Sample` if it has `eval`, else a `Train` that holds `told`."""
    if "eval" in plain:
        values, names = _values(Sample, plain), plan_defaults()
        own = {name: plain["sampler"][name] for name in names if name in plain["sampler"]}
        values["sampler"] = replace(values["sampler"], shared=own)
        return Sample(shared={name: plain[name] for name in names}, **values)
    return Train(told=told or {}, **_values(Train, plain))


def value_of(job: Sample, name: str) -> Any:
    """The value of the option with this dotted name."""
    if name in job.shared:
        return job.shared[name]
    value: Any = job
    for key in name.split("."):
        value = getattr(value, key)
    return value


def _values(kind: type, plain: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in fields(kind):
        if _key(one) not in plain or not one.metadata:
            continue
        value = plain[_key(one)]
        if "classes" in one.metadata and value is not None and not str(one.type).startswith("dict"):
            chosen = _class_of(one, value)
            value = chosen(**_values(chosen, value))
        found[one.name] = value
    return found
