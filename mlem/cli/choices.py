"""The files in `configs/`: groups, their choices, and the command that each is for."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mlem.cli.options import COMMANDS, defaults

__all__ = ["CONFIGS", "choices", "default_choices", "first_comment", "groups", "other_command", "usual_options"]


def _folder() -> Path:
    """`configs/`: inside the package if installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


CONFIGS = _folder()


def default_choices(command: str) -> dict[str, str | None]:
    """The groups of a command and their default choices."""
    entries: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{command}.yaml"))
    return {name: choice for entry in entries["defaults"] if isinstance(entry, dict) for name, choice in entry.items()}


def groups(command: str | None = None) -> list[str]:
    """All groups, or those of one command."""
    return list(_groups(command))


@cache  # called for every override
def _groups(command: str | None) -> list[str]:
    if command is not None:
        return sorted(default_choices(command))
    return sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and any(path.glob("*.yaml")))


def choices(group: str, command: str | None = None) -> list[str]:
    """The files of a group; with `command`, without experiments of the other command."""
    found = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
    if command is None or group != "experiment":
        return found
    return [choice for choice in found if not other_command(command, choice)]


def other_command(command: str, experiment: str) -> str | None:
    """The command that an experiment is for, if it sets options that `command` lacks; else None."""
    path = CONFIGS / "experiment" / f"{experiment}.yaml"
    if not path.is_file() or _fits(path, command):
        return None
    return next((other for other in COMMANDS if _fits(path, other)), None)


def _fits(path: Path, command: str) -> bool:
    """Whether a command has the groups and the options that an experiment sets."""
    own: Any = OmegaConf.to_container(OmegaConf.load(path))
    known = set(groups(command))
    changed = [str(key) for entry in own.get("defaults", ()) if isinstance(entry, dict) for key in entry]
    asked = {key.rpartition("/")[2] for key in changed}
    return asked <= known and set(own) - {"defaults"} <= known | set(defaults(command))


def usual_options(source: str) -> dict[str, Any]:
    """The options of a data set as given by its choice; empty if there is no such choice."""
    path = CONFIGS / "data" / f"{source}.yaml"
    plain: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    return plain.get("options", {})


def first_comment(path: Path) -> str:
    """The description of a config, its first comment."""
    comments = (line[2:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    return next((line for line in comments if not line.startswith("@package")), "")
