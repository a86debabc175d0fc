"""The command line: compose the config with Hydra, turn every mistake into one line, run the job."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig, OmegaConf

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
        if any(argument.startswith("-") for argument in arguments):
            _refuse_callables_for_hydra(arguments)
            _hand_to_hydra(name, job)
        else:
            job(compose(name, arguments))
    except (ValueError, OSError) as error:
        if debug:
            raise
        _stop(name, str(error))


def _stop(name: str, message: str) -> NoReturn:
    line = " ".join(message.split())
    print(f"{name}.py: {line}", file=sys.stderr)
    sys.exit(USAGE)


def compose(name: str, overrides: list[str]) -> DictConfig:
    """The config of `configs/<name>.yaml` with these overrides. Raises ValueError with one line for every mistake."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            config = hydra_compose(name, overrides)
            OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(_explain(name, overrides, error)) from error
    return config


def _explain(name: str, overrides: list[str], error: Exception) -> str:
    """One line for what Hydra says: the option, the nearest match, the remedy."""
    from hydra.errors import OverrideParseException
    from omegaconf.errors import MissingMandatoryValue

    text = str(error)
    key = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text)
    if missing := re.search(r"Could not find '([^']+)'", text):
        group, _, choice = missing[1].rpartition("/")
        if group:
            return f"{group}={choice}: there is no such {group}{_nearest(choice, _choices(group))}"
    if group := re.search(r"Could not override '([^']+)'\.\s*No match in the defaults list", text):
        return f"{group[1]}=: there is no such option{_nearest(group[1], _options(name))}"
    if key:
        wrong = key[1] or next((o.split("=")[0] for o in overrides if key[2] in o), key[2])
        return f"{wrong}: there is no such option{_nearest(wrong, _options(name))}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read; write option=value, and quote a value with special characters twice"
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


def _options(name: str) -> list[str]:
    """Dotted names of all options of a command, and its groups."""
    from hydra import compose as hydra_compose

    def names(node: DictConfig, prefix: str = "") -> list[str]:
        found = []
        for key in node:
            found.append(f"{prefix}{key}")
            inner = None if OmegaConf.is_missing(node, key) else node._get_node(key)
            if isinstance(inner, DictConfig) and not inner._is_none():
                found += names(inner, f"{prefix}{key}.")
        return found

    return names(hydra_compose(name)) + _groups()


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
                f"  {choice:20s}{_first_comment(CONFIGS / group / f'{choice}.yaml')}" for choice in _choices(group)
            ]
    body = used.split("\n\n", 1)[1]
    lines += ["", "options (a dot joins the names of inner ones, as in training.steps=500):", body.rstrip(), ""]
    lines += ["-m, --multirun  sweeps: training.learning_rate=1e-3,2e-3"]
    return "\n".join(lines)


def _refuse_callables_for_hydra(arguments: list[str]) -> None:
    for argument in arguments:
        if re.match(r"[+~]*hydra", argument) and re.search(r"_target_|\(\)|\.class\b|callable", argument):
            raise ValueError(f"{argument}: code named in Hydra's own settings is not run; leave it out")
        if argument.lstrip("-").split("=")[0] in ("config-dir", "config-path", "cp", "cd"):
            raise ValueError(f"{argument}: configs are read from {CONFIGS} alone; give options on the command line")


def _hand_to_hydra(name: str, job: Callable[[DictConfig], None]) -> None:
    """Sweeps and Hydra's own flags."""
    import hydra

    hydra.main(config_path=str(CONFIGS), config_name=name, version_base="1.3")(job)()
