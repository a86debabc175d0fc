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

from mlem.app.config import check

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
USAGE = 2
"""Exit status for bad input."""


def train() -> None:
    """`python train.py ...`"""

    def job(config: DictConfig) -> None:
        from mlem.app.train import run

        run(config)

    _main("train", job)


def sample() -> None:
    """`python sample.py ...`"""

    def job(config: DictConfig) -> None:
        from mlem.app.sample import run

        run(config)

    _main("sample", job)


def _main(name: str, job: Callable[[DictConfig], None]) -> None:
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        print(_help(name))
        return
    debug = "debug=true" in (argument.lower() for argument in arguments)
    try:
        configs = [compose(name, overrides) for overrides in sweep(arguments)]
        # before torch is imported, and all of them before the first is run
        for config in configs:
            check(config)
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


_INDICES = re.compile(r"^(seeds|evaluation\.indices)=([-\d, ]*,[-\d, ]*)$")
"""Lists of indices, whose commas would be a sweep to Hydra."""


def compose(name: str, overrides: list[str]) -> DictConfig:
    """The config of `configs/<name>.yaml` with these overrides. Raises ValueError with one line for every mistake."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            config = hydra_compose(name, overrides)
            OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ValueError(_explain(name, overrides, error)) from error
    return config


def _explain(name: str, overrides: list[str], error: Exception) -> str:
    """One line for what Hydra says: the option, the nearest match, the remedy."""
    from hydra.errors import OverrideParseException

    text = str(error)
    for group, choice in (override.lstrip("+").split("=", 1) for override in overrides if "=" in override):
        if group in _groups() and choice not in _choices(group) and not choice.startswith("["):
            return f"{group}={choice}: there is no such {group}{_nearest(choice, _choices(group))}"
    chosen = [override for override in overrides if override.split("=", 1)[0] in _groups()]
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


def _nearest(wrong: str, known: list[str]) -> str:
    near = difflib.get_close_matches(wrong, known, 1, 0.5)
    # `training.stepz` is nearest to `training.steps`, but `steps` alone may live deeper
    near = near or [option for option in known if option.rpartition(".")[2] == wrong.rpartition(".")[2]][:1]
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(known)}"


def _groups() -> list[str]:
    return sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and any(path.glob("*.yaml")))


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def _options(name: str, chosen: list[str]) -> list[str]:
    """Dotted names of all options of a command, with these choices of groups, and its groups."""
    from hydra import compose as hydra_compose

    def names(node: DictConfig, prefix: str = "") -> list[str]:
        found = []
        for key in node:
            found.append(f"{prefix}{key}")
            inner = None if OmegaConf.is_missing(node, key) else node._get_node(key)
            if isinstance(inner, DictConfig) and not inner._is_none():
                found += names(inner, f"{prefix}{key}.")
        return found

    return names(hydra_compose(name, chosen)) + _groups()


def _first_comment(path: Path) -> str:
    comments = (line[2:].strip() for line in path.read_text().splitlines() if line.startswith("# "))
    return next((line for line in comments if not line.startswith("@package")), "")


def _help(name: str) -> str:
    used = (CONFIGS / f"{name}.yaml").read_text()
    lines = [f"{_first_comment(CONFIGS / f'{name}.yaml')}", "", f"usage: python {name}.py [option=value ...]", ""]
    for group in _groups():
        if re.search(rf"^  - {group}:", used, re.MULTILINE):
            default = re.search(rf"^  - {group}: (\S+)", used, re.MULTILINE)
            lines.append(f"{group}=  (default {default[1] if default else 'null'})")
            lines += [
                f"  {choice:24s}{_first_comment(CONFIGS / group / f'{choice}.yaml')}" for choice in _choices(group)
            ]
    body = used.split("\n\n", 1)[1]
    lines += ["", "options (a dot joins the names of inner ones, as in training.steps=500):", body.rstrip(), ""]
    lines += ["-m, --multirun  a sweep, one job for each value between commas: -m seed=0,1 'root=runs/seed${seed}'"]
    return "\n".join(lines)
