"""Names of mlem's commands as the user types them: those of a checkout, or those that the wheel installs.

In a checkout `python train.py` and `python -m mlem.data`, installed `mlem-train` and `mlem data`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

__all__ = ["called", "command", "in_words_of_the_user", "installed"]

_INSTALLED = ("mlem", "mlem-train", "mlem-sample")
_SCRIPTS = ("train", "sample")


def installed() -> bool:
    """Whether this process was started by one of the commands that the wheel installs."""
    return Path(sys.argv[0]).name in _INSTALLED


def called(name: str) -> str:
    """What messages of a command begin with: `train.py` or `mlem-train`, `mlem.data` or `mlem data`."""
    if name in _SCRIPTS:
        return f"mlem-{name}" if installed() else f"{name}.py"
    return f"mlem {name}" if installed() else f"mlem.{name}"


def command(name: str) -> str:
    """What starts a command: `python train.py` or `mlem-train`, `python -m mlem.data` or `mlem data`."""
    return in_words_of_the_user(f"python {name}.py" if name in _SCRIPTS else f"python -m mlem.{name}")


def in_words_of_the_user(text: str) -> str:
    """The text, with every command of a checkout as the installed one where such a one was typed."""
    if not installed():
        return text
    text = re.sub(r"\bpython (train|sample)\.py\b", r"mlem-\1", text)
    return re.sub(r"\bpython -m mlem\.(\w+)", r"mlem \1", text)
