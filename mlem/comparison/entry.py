"""One entry in a list of samplers, such as `evaluation.samplers` and `eval.samplers` in a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mlem.comparison.handmade import Handmade, handmade
from mlem.family import Family
from mlem.multilevel.choices import ESTIMATORS
from mlem.multilevel.plan import Plan
from mlem.multilevel.spec import TARGETS, PlanSpec
from mlem.networks import Reuse
from mlem.sampling import solver_of

__all__ = ["Entry", "refuse_duplicates"]

_NEEDS = {"learned": "coefficients", "calibrated": "calibration"}
_KEYS = {"grid": "grid: name", "options": "options: of it", "plan": "plan: options", "reuse": "reuse: {every: n}"}
_KEYS |= {"forecast": "forecast: {every: n}", "running": "running: [[level, share], ..]"}
_NAMED = ("grid", "options", "levels", "plan", "reuse", "forecast", "running", "deltas", "trials", "rival")
_PLANS = ("plan", "forecast", "running")


@dataclass(frozen=True)
class Entry:
    """A sampler at several numbers of steps: a line in the figure.

    Attributes:
        solver: its name.
        steps: numbers of steps, at least one.
        grid: name of a time grid; None for the solver's own choice.
        spec: specification of a plan; None: every level alone.
        options: of the solver.
        name: in figures and tables; None: from `label`.
        levels: the levels that run alone, by name or "smallest" and "largest"; None for all. Only without plan.
        deltas: shifts of the logits of p_k, one plan each; None for the plan as it is. Only with coins.
        trials: replicates of the coins; None for the plan's own coins. Only with coins.
        reuse: of deep features, by the largest level, under a plan too, or by each of `levels`.
        made: a plan, or a handmade layout, instead of `spec`.
        rival: the kind of sampler, such as T-Stitch; "" for a kind of its own.

    Raises:
        ValueError: no steps, or options that exclude each other.
    """

    solver: str
    steps: tuple[int, ...]
    grid: str | None = None
    spec: PlanSpec | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    levels: tuple[str, ...] | None = None
    deltas: tuple[float, ...] | None = None
    trials: int | None = None
    reuse: Reuse | None = None
    made: Handmade | Plan | None = None
    rival: str = ""

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError(f"evaluation of {self.solver} needs at least one step count")
        tosses = self.deltas is not None or self.trials is not None
        if tosses and self.spec is None:
            raise ValueError("deltas and trials need coins: add plan={...}, or leave them out")
        if tosses and self.spec is not None and ESTIMATORS[self.spec.estimator].holds:
            raise ValueError("deltas and trials toss coins: add estimator: jump to its plan")
        if self.planned and self.levels is not None:
            raise ValueError("levels= is for levels that run alone; for a plan, write plan={levels: [..]}")

    @property
    def planned(self) -> bool:
        """Whether a plan says what runs."""
        return self.spec is not None or self.made is not None

    @property
    def detail(self) -> str:
        """Its difference to others of its rival, besides solver, grid and steps."""
        parts = [self.made.detail if isinstance(self.made, Handmade) else self.target]
        parts += [] if self.reuse is None else [str(self.reuse)]
        return ", ".join(filter(None, parts))

    @property
    def label(self) -> str:
        """The name, or else the rival, or else all non-default options except steps and target."""
        if self.name is not None:
            return self.name
        if self.rival:
            return ", ".join([self.rival, *([self.detail] if self.detail else [])])
        label = "_".join([self.solver.replace(":", "_"), *([self.grid] if self.grid else [])])
        label += "".join(f"_{key}-{value}" for key, value in self._settings.items())
        if isinstance(self.made, Handmade):
            plain = self.made.detail.replace(" + ", "-").replace(", ", "_").replace(" ", "-")
            return f"{label}_{type(self.made).__name__.lower()}_{plain}"
        if self.spec is None:
            return label
        label += f"_{self.spec.estimator}" + (f"_{self.spec.coins}" if self.spec.coins else "")
        for one in fields(self.spec):
            value = getattr(self.spec, one.name)
            if one.name not in (*TARGETS, "cost", "estimator", "coins") and value != one.default:
                label += f"_{one.name}-{'+'.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
        return label

    @property
    def method(self) -> str:
        """The solver with its options, such as heun(order=2), and the reuse."""
        options = ", ".join(f"{key}={value}" for key, value in self._settings.items())
        return f"{self.solver}({options})" if options else self.solver

    @property
    def _settings(self) -> dict[str, Any]:
        """Options of the solver, and of the reuse of features."""
        reused = {} if self.reuse is None else {"reuse": self.reuse.every, "branch": self.reuse.branch}
        return {**self.options, **reused}

    @property
    def target(self) -> str:
        """The plan's target, such as budget0.25, with the unit unless that is seconds; "" for none."""
        if self.spec is None:
            return ""
        target = "".join(f"{name}{v:g}" for name in TARGETS if (v := getattr(self.spec, name)) is not None)
        return f"{target}_{self.spec.cost}" if target and self.spec.cost != PlanSpec.cost else target

    def missing(self, family: Family) -> str | None:
        """The fit that the family lacks, "coefficients" or "calibration"; None if nothing."""
        law = self.spec.probabilities if self.spec is not None else None
        needed = _NEEDS.get(law) if isinstance(law, str) else None
        return needed if needed is not None and not family.fitted.has(needed) else None

    @classmethod
    def from_options(cls, options: Any, where: str, *, named: bool = False) -> Entry:
        """The entry described by a config.

        Args:
            options: plain data; a mapping with solver, steps and optionally grid, options, plan, reuse.
            where: prefix of messages, such as evaluation.samplers[0].
            named: the entry also has a name or a rival and optionally levels, deltas, trials.

        Raises:
            ValueError: names what is missing, unknown, or of the wrong kind.
        """
        _check_keys(options, where, named)
        given = {key: value for key, value in options.items() if value is not None}
        _check_kinds(given, where)
        if len(plans := [key for key in _PLANS if key in given]) > 1:
            raise ValueError(f"{where}: each of {' and '.join(plans)} says what runs; use only one")
        spec = PlanSpec.from_options(given["plan"], f"{where}.plan: ") if "plan" in given else None
        own: dict[str, Any] = {name: str(given[name]) for name in ("name", "rival") if name in given}
        own["trials"] = given.get("trials")
        own["levels"] = tuple(given["levels"]) if "levels" in given else None
        own["deltas"] = tuple(map(float, given["deltas"])) if "deltas" in given else None
        try:
            own["reuse"] = _reuse(given["reuse"]) if "reuse" in given else None
            own["made"] = handmade(given) if given.keys() & {"running", "forecast"} else None
            solver_of(given["solver"], **given.get("options", {}))
            return cls(given["solver"], tuple(given["steps"]), given.get("grid"), spec, given.get("options", {}), **own)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error


def _check_keys(options: Any, where: str, named: bool) -> None:
    known = {"solver", "steps", *({"name", *_NAMED} if named else _KEYS)}
    called = not named or (isinstance(options, Mapping) and options.keys() & {"name", "rival"})
    if called and isinstance(options, Mapping) and {"solver", "steps"} <= {*options} <= known:
        return
    first = "name: text, " if named else ""
    others = f"{', '.join(_NAMED)}: .." if named else ", ".join(_KEYS.values())
    raise ValueError(
        f"{where} must be {{{first}solver: name, steps: [n, ..]}}, optionally with {others}, got {options}"
    )


def _reuse(options: Any) -> Reuse:
    if not isinstance(options, dict) or not {"every"} <= {*options} <= {"every", "branch"}:
        raise ValueError(f"reuse must be {{every: n}}, optionally with branch: n, got {options}")
    return Reuse(**options)


def _check_kinds(given: Mapping[str, Any], where: str) -> None:
    steps, deltas, trials = (given.get(key) for key in ("steps", "deltas", "trials"))
    if not isinstance(steps, list) or not steps or not all(type(n) is int and n >= 1 for n in steps):
        raise ValueError(f"{where}.steps must be a list of step counts >= 1, got {steps}")
    for key in ("plan", "options"):
        if key in given and not isinstance(given[key], dict):
            raise ValueError(f"{where}.{key} must be options, such as {key}: {{name: value}}, got {given[key]}")
    if not isinstance(given.get("levels", []), list):
        raise ValueError(f"{where}.levels must be a list, got {given['levels']}")
    if deltas is not None and not (isinstance(deltas, list) and all(type(d) in (int, float) for d in deltas)):
        raise ValueError(f"{where}.deltas must be a list of numbers, got {deltas}")
    if trials is not None and not (type(trials) is int and trials >= 1):
        raise ValueError(f"{where}.trials must be a whole number >= 1, got {trials}")


def refuse_duplicates(entries: Sequence[Entry]) -> None:
    """Raise ValueError for a sampler that is listed twice: its images and metrics would share a name."""
    seen: dict[tuple[str, int, str], int] = {}
    for number, entry in enumerate(entries):
        for steps in entry.steps:
            key = (entry.label, steps, entry.target)
            if key in seen:
                places = " and ".join(f"evaluation.samplers[{n}]" for n in sorted({seen[key], number}))
                plan = f", {entry.target}" if entry.target else ""
                raise ValueError(f"{places}: {entry.label} at {steps} steps{plan} is listed twice; list it once")
            seen[key] = number
