"""Names of mlem's commands as the user types them.

In a checkout these are `python train.py` and `python -m mlem.data`; installed, `mlem-train` and `mlem data`.
"""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path
from types import TracebackType

__all__ = [
    "INTERRUPTED",
    "called",
    "command",
    "in_words_of_the_user",
    "installed",
    "interrupted",
    "one_line_for_interrupts",
]

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, as the shell counts it."""

_INSTALLED = ("mlem", "mlem-train", "mlem-sample")
_SCRIPTS = ("train", "sample")


def installed() -> bool:
    """Whether this process was started by one of the commands that the wheel installs."""
    return Path(sys.argv[0]).name in _INSTALLED


def _is_script() -> bool:
    """Whether this process was started by a command that the wheel installs, or by `train.py` or `sample.py` here."""
    script = Path(sys.argv[0] if sys.argv else "").resolve()
    return installed() or (script.stem in _SCRIPTS and script.parent == Path(__file__).resolve().parents[1])


def called(name: str) -> str:
    """The prefix of a command's messages: `train.py` or `mlem-train`, `mlem.data` or `mlem data`."""
    if name in _SCRIPTS:
        return f"mlem-{name}" if installed() else f"{name}.py"
    return f"mlem {name}" if installed() else f"mlem.{name}"


def command(name: str) -> str:
    """How to type a command: `python train.py` or `mlem-train`, `python -m mlem.data` or `mlem data`."""
    return in_words_of_the_user(f"python {name}.py" if name in _SCRIPTS else f"python -m mlem.{name}")


def in_words_of_the_user(text: str) -> str:
    """The text, with checkout commands replaced by installed ones if the user typed an installed command."""
    if not installed():
        return text
    text = re.sub(r"\bpython (train|sample)\.py\b", r"mlem-\1", text)
    return re.sub(r"\bpython -m mlem\.(\w+)", r"mlem \1", text)


def interrupted(name: str, kept: str) -> int:
    """Report in one line that Ctrl-C ended the command `name`, and what remains; return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process is ending: a second Ctrl-C would only add a traceback
    print(f"{called(name)}: interrupted; {in_words_of_the_user(kept)}", file=sys.stderr, flush=True)
    return INTERRUPTED


def one_line_for_interrupts() -> None:
    """In mlem's own commands, report Ctrl-C during imports in one line, as later on."""
    words = sys.orig_argv[1:]
    module = words[words.index("-m") + 1 : words.index("-m") + 2] if "-m" in words else []
    if not (module[0].partition(".")[0] == "mlem" if module else _is_script()):
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted; finished work is kept, the same command continues", file=sys.stderr, flush=True)
        else:
            before(kind, error, trace)

    sys.excepthook = hook
