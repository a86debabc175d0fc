"""How a command ends: one-line errors and the exit status."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn

from mlem.invocation import called, in_words_of_the_user

__all__ = ["USAGE", "UnknownOption", "instead", "nearest", "stop"]

USAGE = 2
"""Exit status for bad input."""


class UnknownOption(ValueError):
    """An option that does not exist; the message is complete."""


def stop(name: str, message: str) -> NoReturn:
    """Print the message in one line, prefixed by the command `name`, and exit."""
    print(f"{called(name)}: {in_words_of_the_user(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(USAGE)


def nearest(wrong: str, known: Sequence[str]) -> str | None:
    """The known name closest to `wrong`, if any is close."""
    near = difflib.get_close_matches(wrong, known, 1, 0.5)
    # `training.stepz` is closest to `training.steps`, but `steps` alone may be nested deeper
    near = near or [option for option in known if option.rpartition(".")[2] == wrong.rpartition(".")[2]]
    return near[0] if near else None


def instead(wrong: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, or the list of names."""
    near = nearest(wrong, known)
    return f"; did you mean {near}?" if near else f"; there are: {', '.join(known)}"
