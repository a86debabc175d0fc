"""From the command line to a config, with Hydra: overrides, sweeps, and one-line errors."""

from __future__ import annotations

import itertools
import re
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from omegaconf.resolvers import oc

from mlem.cli.choices import CONFIGS, choices, groups, other_command
from mlem.cli.errors import UnknownOption, instead, nearest
from mlem.cli.options import COMMANDS, OPEN, defaults
from mlem.invocation import called
from mlem.invocation import command as typed

__all__ = ["compose", "plain", "sweep", "without_secrets"]

_INDICES = re.compile(r"^(seeds|labels|evaluation\.indices)=([-\d, ]*,[-\d, ]*)$")
"""Lists of indices, whose commas Hydra would read as a sweep."""


def sweep(arguments: list[str]) -> list[list[str]]:
    """The overrides of every job: one, or with -m one per point of the sweep given by commas.

    Raises: ValueError for other flags and for Hydra's own settings (which could name code to run).
    """
    flags = {argument for argument in arguments if argument.startswith("-")}
    if unknown := sorted(flags - {"-m", "--multirun"}):
        raise ValueError(f"{unknown[0]}: there is no such flag; write options as option=value, and -m for a sweep")
    overrides = [_INDICES.sub(r"\1='\2'", argument) for argument in arguments if argument not in flags]
    for override in overrides:
        if re.match(r"[+~]*hydra\b|[^=]*@", override):
            raise ValueError(f"{override}: Hydra's own settings are fixed; leave it out")
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


def compose(command: str, overrides: list[str]) -> DictConfig:
    """The config of a command: its options with their defaults, `configs/<command>.yaml`, and these overrides.

    Raises: ValueError with a one-line message.
    """
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    _refuse_the_others(command, overrides)
    _refuse_removed(overrides)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            config = _composed(command, overrides)
            _refuse_added(command, overrides, config)
            OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ValueError(_explain(command, overrides, error)) from error
    return config


def _composed(command: str, overrides: list[str]) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra.core.config_store import ConfigStore

    own: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{command}.yaml"))
    whole = OmegaConf.merge(defaults(command), own)
    ConfigStore.instance().store(f"mlem_{command}", whole)
    return hydra_compose(f"mlem_{command}", overrides)


def plain(config: DictConfig) -> dict[str, Any]:
    """The config resolved to plain data."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def without_secrets(config: DictConfig) -> dict[str, Any]:
    """The config resolved to plain data, but with environment variables left as names, also within strings."""
    OmegaConf.register_new_resolver("oc.env", lambda name, default=None: f"oc.env:{name}", replace=True)
    try:
        return plain(config)
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _split(overrides: list[str]) -> list[tuple[str, str]]:
    """(option, value) of the overrides with a value."""
    pairs = (override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    return [(option, value) for option, value in pairs]


def _refuse_the_others(command: str, overrides: list[str]) -> None:
    """Raise ValueError for an experiment or a group of the other command."""
    for group, choice in _split(overrides):
        other = other_command(command, choice) if group == "experiment" else None
        if other:
            raise ValueError(f"experiment={choice} is one of {called(other)}: {typed(other)} experiment={choice}")
        if group in groups() and group not in groups(command):
            owner = next(one for one in COMMANDS if group in groups(one))
            raise ValueError(
                f"{group}={choice}: {called(command)} has no {group}=, it belongs to {called(owner)}; leave it out"
            )


def _refuse_removed(overrides: list[str]) -> None:
    """Raise ValueError for a removed (~) option that is required."""
    for override in overrides:
        option = override.lstrip("~").split("=", 1)[0]
        if override.startswith("~") and not option.startswith(tuple(f"{place}." for place in OPEN)):
            raise ValueError(f"{override}: options can be removed only from {', '.join(OPEN)}; leave it out")


def _refuse_added(command: str, overrides: list[str], config: DictConfig) -> None:
    """Raise ValueError for an added (+) option that nothing would read."""
    added = [override for override in overrides if override.startswith("+")]
    if not added:
        return
    known = _known(command, overrides)
    free = tuple(f"{place}." for place in OPEN)
    extra = [key for key in _names(config) if key not in known and not f"{key}.".startswith(free)]
    if extra:
        key = next(key for key in extra if not any(other.startswith(f"{key}.") for other in extra))
        given = next(text for text in added if f"{key}.".startswith(f"{text.lstrip('+').split('=')[0]}."))
        near = nearest(key, known)
        raise UnknownOption(
            f"{given}: there is no such option{f'; did you mean {near}?' if near else ''} (+ adds only to "
            f"{', '.join(OPEN)})"
        )


def _explain(command: str, overrides: list[str], error: Exception) -> str:
    """One line for an error of Hydra: the option, the nearest match, the remedy."""
    from hydra.errors import OverrideParseException

    message = str(error)
    if isinstance(error, UnknownOption):
        return message
    for group, choice in _split(overrides):
        if group in groups() and choice not in choices(group) and not choice.startswith("["):
            return f"{group}={choice}: there is no such {group}{instead(choice, choices(group, command))}"
    if wrong := _unknown_key(overrides, message):
        return f"{wrong}: there is no such option{instead(wrong, _known(command, overrides))}"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: cannot be parsed; write option=value, and quote a value with special characters twice"
        )
    if ambiguous := re.search(r"Ambiguous value for argument '([^']+)'", message):
        return f"{ambiguous[1]}: commas are for sweeps, with -m; write a list as [1,2]"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given: add {error.full_key}=..."
    return f"{message.splitlines()[0]}; see {typed(command)} --help"


def _unknown_key(overrides: list[str], message: str) -> str | None:
    """The unknown option in Hydra's message."""
    if key := re.search(r"Could not override '([^']+)'", message):
        return key[1]
    if key := re.search(r"Key '([^']+)' is not in struct", message):
        return next((override.split("=")[0] for override in overrides if key[1] in override), key[1])
    return None


def _known(command: str, overrides: list[str]) -> list[str]:
    """Dotted names of all options of a command, with the groups as chosen here."""
    from hydra.errors import HydraException

    chosen = [override for override in overrides if override.lstrip("+").split("=", 1)[0] in groups()]
    try:
        return _names(_composed(command, chosen)) + groups(command)
    except HydraException:  # the choices alone do not compose either
        return _names(_composed(command, [])) + groups(command)


def _names(node: DictConfig, prefix: str = "") -> list[str]:
    """Dotted names of all options of a config."""
    found = []
    for key in node:
        found.append(f"{prefix}{key}")
        inner = None if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, str(key)) else node[key]
        if isinstance(inner, DictConfig):
            found += _names(inner, f"{prefix}{key}.")
    return found
