"""The command line: compose the config with Hydra, turn every mistake into one line, run the job."""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from mlem.cli.config import CONFIGS, check
from mlem.cli.find import folders, same_job

COMMANDS = ("train", "sample")
USAGE = 2
"""Exit status for bad input."""


def train() -> None:
    """`python train.py ...`"""

    def job(config: DictConfig) -> None:
        from mlem.cli.train import run

        run(config)

    _main("train", job)


def sample() -> None:
    """`python sample.py ...`"""

    def job(config: DictConfig) -> None:
        from mlem.cli.sample import run

        run(config)

    _main("sample", job)


def _main(name: str, job: Callable[[DictConfig], None]) -> None:
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        print(_help(name))
        return
    debug = "debug=true" in (argument.lower() for argument in arguments)
    try:
        points = sweep(arguments)
        configs = [compose(name, overrides) for overrides in points]
        # before torch is imported, and all of them before the first is run
        for config in configs:
            check(config)
        refuse_one_folder(points, configs)
        for config in configs:
            job(config)
    except (ValueError, OSError, FloatingPointError, OmegaConfBaseException) as error:
        if debug:
            raise
        _stop(name, str(error).split("\n    full_key")[0])
    finally:
        _leave_the_ranks()


def _leave_the_ranks() -> None:
    """Close torch's process group while Python still runs: its threads may abort a process that just ends.

    See https://github.com/pytorch/pytorch/issues/190489.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _stop(name: str, message: str) -> NoReturn:
    line = " ".join(message.split())
    print(f"{name}.py: {line}", file=sys.stderr)
    sys.exit(USAGE)


def sweep(arguments: list[str]) -> list[list[str]]:
    """The overrides of every job: one, or with -m one for each point of the sweep that commas span.

    Raises ValueError for other flags and for settings of Hydra itself (which could name code to run).
    """
    flags = {argument for argument in arguments if argument.startswith("-")}
    if unknown := sorted(flags - {"-m", "--multirun"}):
        raise ValueError(f"{unknown[0]}: there is no such flag; give options as option=value, and -m for a sweep")
    overrides = [_INDICES.sub(r"\1='\2'", argument) for argument in arguments if argument not in flags]
    for override in overrides:
        if re.match(r"[+~]*hydra\b|[^=]*@", override):
            raise ValueError(f"{override}: settings of Hydra itself are fixed; leave it out")
    if not flags:
        return [overrides]
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ValueError(str(error).splitlines()[0]) from error
    axes = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [text]
        for one, text in zip(parsed, overrides, strict=True)
    ]
    return [list(point) for point in itertools.product(*axes)]


def refuse_one_folder(points: list[list[str]], configs: list[DictConfig]) -> None:
    """Raise ValueError where two jobs of a sweep would write into one folder: what one left is lost or in the way."""
    owners: dict[Path, int] = {}
    for number, config in enumerate(configs):
        for folder in folders(config):
            first = owners.setdefault(folder, number)
            changed = [pair for pair in zip(points[first], points[number], strict=True) if pair[0] != pair[1]]
            if not changed or same_job(configs[first], config):
                continue
            one, other = (" ".join(side) for side in zip(*changed, strict=True))
            key = changed[0][0].lstrip("+").split("=")[0]
            option, value = "out" if "out" in config else "root", f"{key}.name" if key in _groups() else key
            raise ValueError(
                f"-m: {one} and {other} both write into {folder}: give each a folder of its own, as with "
                f"'{option}=runs/${{{value}}}'"
            )


_INDICES = re.compile(r"^(seeds|evaluation\.indices)=([-\d, ]*,[-\d, ]*)$")
"""Lists of indices, whose commas would be a sweep to Hydra."""


def compose(name: str, overrides: list[str]) -> DictConfig:
    """The config of `configs/<name>.yaml` with these overrides. Raises ValueError with one line for every mistake."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    _refuse_the_others(name, overrides)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            config = hydra_compose(name, overrides)
            _refuse_added(name, overrides, config)
            OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ValueError(_explain(name, overrides, error)) from error
    return config


def _refuse_the_others(name: str, overrides: list[str]) -> None:
    """Raise ValueError for an experiment or a group of the other command."""
    for group, choice in (override.lstrip("+").split("=", 1) for override in overrides if "=" in override):
        other = _other_command(name, choice) if group == "experiment" else None
        if other:
            raise ValueError(f"experiment={choice} is one of {other}.py: python {other}.py experiment={choice}")
        if group in _groups() and group not in _groups(name):
            command = next(one for one in COMMANDS if group in _groups(one))
            raise ValueError(f"{group}={choice}: {name}.py has no {group}=, it is of {command}.py; leave it out")


def _refuse_added(name: str, overrides: list[str], config: DictConfig) -> None:
    """Raise ValueError for an option that was added (+) where nothing would read it."""
    added = [override for override in overrides if override.startswith("+")]
    known = _options(name, _chosen(overrides)) if added else []
    extra = [key for key in _names(config) if key not in known and not f"{key}.".startswith(_OPEN)] if added else []
    if extra:
        key = next(key for key in extra if not any(other.startswith(f"{key}.") for other in extra))
        given = next(text for text in added if f"{key}.".startswith(f"{text.lstrip('+').split('=')[0]}."))
        places = ", ".join(place.rstrip(".") for place in _OPEN)
        near = _near(key, known)
        raise _Unknown(
            f"{given}: there is no such option{f'; did you mean {near}?' if near else ''} (+ adds only to {places})"
        )


_OPEN = ("schedule.", "data.options.", "sampler.options.")
"""Where options may be added: what reads them refuses those that it does not know."""


class _Unknown(ValueError):
    """An option that is not there, explained already."""


def _explain(name: str, overrides: list[str], error: Exception) -> str:
    """One line for what Hydra says: the option, the nearest match, the remedy."""
    from hydra.errors import OverrideParseException

    text = str(error)
    if isinstance(error, _Unknown):
        return text
    for group, choice in (override.lstrip("+").split("=", 1) for override in overrides if "=" in override):
        if group in _groups() and choice not in _choices(group) and not choice.startswith("["):
            return f"{group}={choice}: there is no such {group}{_nearest(choice, _choices(group, name))}"
    chosen = _chosen(overrides)
    key = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text)
    if group := re.search(r"Could not override '([^']+)'\.\s*No match in the defaults list", text):
        return f"{group[1]}=: there is no such option{_nearest(group[1], _options(name, chosen))}"
    if key:
        wrong = key[1] or next((o.split("=")[0] for o in overrides if key[2] in o), key[2])
        return f"{wrong}: there is no such option{_nearest(wrong, _options(name, chosen))}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read; write option=value, and quote a value with special characters twice"
    if ambiguous := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{ambiguous[1]}: commas are for sweeps, with -m; write a list as [1,2]"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given: add {error.full_key}=..."
    return f"{text.splitlines()[0]}; see python {name}.py --help"


def _chosen(overrides: list[str]) -> list[str]:
    """The overrides that choose in a group."""
    return [override for override in overrides if override.lstrip("+").split("=", 1)[0] in _groups()]


def _nearest(wrong: str, known: list[str]) -> str:
    near = _near(wrong, known)
    return f"; did you mean {near}?" if near else f"; there are: {', '.join(known)}"


def _near(wrong: str, known: list[str]) -> str | None:
    near = difflib.get_close_matches(wrong, known, 1, 0.5)
    # `training.stepz` is nearest to `training.steps`, but `steps` alone may live deeper
    near = near or [option for option in known if option.rpartition(".")[2] == wrong.rpartition(".")[2]]
    return near[0] if near else None


def _groups(name: str | None = None) -> list[str]:
    """All groups, or those of one command."""
    if name is not None:
        defaults = OmegaConf.load(CONFIGS / f"{name}.yaml").defaults
        return sorted(str(group) for entry in defaults if OmegaConf.is_dict(entry) for group in entry)
    return sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and any(path.glob("*.yaml")))


def _choices(group: str, name: str | None = None) -> list[str]:
    """The files of a group; name: those of this command alone, where it matters."""
    choices = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
    if name is None or group != "experiment":
        return choices
    return [choice for choice in choices if not _other_command(name, choice)]


def _other_command(name: str, experiment: str) -> str | None:
    """The command that an experiment is for, where that is not `name`: it sets options that `name` lacks."""
    path = CONFIGS / "experiment" / f"{experiment}.yaml"
    if not path.is_file() or _fits(path, name):
        return None
    return next((other for other in COMMANDS if _fits(path, other)), None)


def _fits(path: Path, name: str) -> bool:
    """Whether a command has the groups and the options that an experiment sets."""
    own: Any = OmegaConf.load(path)
    groups = set(_groups(name))
    changed = [str(key) for entry in own.get("defaults", ()) if OmegaConf.is_dict(entry) for key in entry]
    asked = {key.rpartition("/")[2] for key in changed}
    return asked <= groups and set(own) - {"defaults"} <= groups | set(OmegaConf.load(CONFIGS / f"{name}.yaml"))


def _options(name: str, chosen: list[str]) -> list[str]:
    """Dotted names of all options of a command, with these choices of groups, and its groups."""
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException

    try:
        return _names(hydra_compose(name, chosen)) + _groups(name)
    except HydraException:  # the choices do not compose either
        return _names(hydra_compose(name)) + _groups(name)


def _names(node: DictConfig, prefix: str = "") -> list[str]:
    """Dotted names of all options of a config."""
    found = []
    for key in node:
        found.append(f"{prefix}{key}")
        inner = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        if isinstance(inner, DictConfig) and not inner._is_none():
            found += _names(inner, f"{prefix}{key}.")
    return found


def _first_comment(path: Path) -> str:
    comments = (line[2:].strip() for line in path.read_text().splitlines() if line.startswith("# "))
    return next((line for line in comments if not line.startswith("@package")), "")


def _help(name: str) -> str:
    used = (CONFIGS / f"{name}.yaml").read_text()
    lines = [f"{_first_comment(CONFIGS / f'{name}.yaml')}", "", f"usage: python {name}.py [option=value ...]", ""]
    for group in _groups(name):
        default = re.search(rf"^  - {group}: (\S+)", used, re.MULTILINE)
        lines.append(f"{group}=  (default {default[1] if default else 'null'})")
        lines += [
            f"  {choice:24s}{_first_comment(CONFIGS / group / f'{choice}.yaml')}" for choice in _choices(group, name)
        ]
    body = used.split("\n\n", 1)[1]
    lines += ["", "options (a dot joins the names of inner ones, as in training.steps=500):", body.rstrip(), ""]
    lines += ["-m, --multirun  a sweep, one job for each value between commas: -m seed=0,1 'root=runs/seed${seed}'"]
    return "\n".join(lines)
