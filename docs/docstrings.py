"""Converts our docstrings to Google style, for the reference.

Here `a, b: ...` describes two arguments at once, `Returns: ...` or `Raises: ...` is one sentence, and fields of a
NamedTuple are arguments.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SENTENCE = re.compile(r"^(Raises|Returns|Warns|Yields): (.+(?:\n +.+)*)", re.MULTILINE)
SEVERAL = re.compile(r"^    (\w+(?:, \w+)+): (.+(?:\n     +.+)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = SENTENCE.sub(lambda found: f"**{found[1]}:** {' '.join(found[2].split())}", obj.docstring.value)
        text = SEVERAL.sub(_one_by_one, text)
        if isinstance(obj, griffe.Class) and "NamedTuple" in map(str, obj.bases):
            text = text.replace("\nArgs:\n", "\nAttributes:\n")
        obj.docstring.value = text


def _one_by_one(found: re.Match[str]) -> str:
    return "\n".join(f"    {name}: {found[2]}" for name in found[1].split(", "))
