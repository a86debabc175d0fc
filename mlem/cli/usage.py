"""The text of `--help`: the choices of every group, and every option with its default and meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any

from mlem.cli.choices import CONFIGS, choices, default_choices, first_comment, groups
from mlem.cli.options import Row, defaults, rows
from mlem.cli.values import written
from mlem.invocation import command as typed
from mlem.invocation import in_words_of_the_user

__all__ = ["usage"]

_PLANS = "# Multilevel sampling: one of budget, mse and delta, or a plan; all null: a single level."


def usage(command: str) -> str:
    """The help of a command."""
    lines = [first_comment(CONFIGS / f"{command}.yaml"), "", f"usage: {typed(command)} [option=value ...]", ""]
    usual = default_choices(command)
    for group in groups(command):
        lines.append(f"{group}=  (default {usual[group] or 'null'})")
        lines += [
            f"  {choice:24s}{first_comment(CONFIGS / group / f'{choice}.yaml')}" for choice in choices(group, command)
        ]
    lines += ["", "options (nested names are joined by dots, as in training.steps=500):"]
    own = defaults(command)
    known = {row.name: row for row in rows(command)}
    for name, value in own.items():
        lines += _plan_heading(known.get(name), lines)
        lines += list(_option(name, value, "", known))
    lines += ["", "options of the chosen groups:"]
    chosen = [row for row in known.values() if row.default is MISSING or row.name.partition(".")[0] not in own]
    lines += [_line(row.name, row.words) for row in chosen if row.words]
    lines += ["", "-m, --multirun  a sweep, one job per comma-separated value: -m seed=0,1 'root=runs/seed${seed}'"]
    return in_words_of_the_user("\n".join(lines))


def _plan_heading(row: Row | None, before: list[str]) -> list[str]:
    return [_PLANS] if row is not None and _shared(row) and _PLANS not in before else []


def _shared(row: Row) -> bool:
    """Whether it is an option of plans, with a default that the sampler may set."""
    return isinstance(row.default, str) and row.default.startswith("${oc.select:sampler.")


def _option(name: str, value: Any, prefix: str, known: dict[str, Row]) -> Iterator[str]:
    """An option, or a group of options, as YAML."""
    indent = "  " * prefix.count(".")
    if isinstance(value, dict) and f"{prefix}{name}" not in known:
        yield f"{indent}{name}:"
        for key, inner in value.items():
            yield from _option(key, inner, f"{prefix}{name}.", known)
        return
    row = known[f"{prefix}{name}"]
    value = row.default.removesuffix("}").rpartition(",")[2] if _shared(row) else value
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        yield _line(f"{indent}{name}:", row.words)
        yield from (f"{indent}  - {_flow(one)}" for one in value)
        return
    yield _line(f"{indent}{name}: {_flow(value)}", row.words)


def _line(left: str, words: str) -> str:
    return f"{left:25s} # {words}" if words else left


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(inner) for inner in value) + "]"
    return written(value)
