"""Argument errors that name the function as its caller wrote it, and suggest the nearest argument."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

__all__ = ["MOST_STEPS", "called", "check_whole", "hint", "named", "nearest"]

MOST_STEPS = 10**6
"""Most steps of a solver: a longer grid would fill the memory."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def named(function: Callable[_P, _R], name: str) -> Callable[_P, _R]:
    """`function`, with argument errors that call it `name`.

    An unknown keyword gets `sample() has no argument 'stepz'; did you mean steps?`, or the list of arguments if
    none is close.

    Args:
        function: a function, a class, or an `__init__`, without `**kwargs`.
        name: what the caller typed, such as "sample" or "family.plan".

    Returns: a function of the same signature, which raises TypeError for arguments that `function` does not take.
    """
    signature = inspect.signature(function)

    @functools.wraps(function, updated=())
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            unknown = [key for key in kwargs if key not in signature.parameters]
            raise TypeError(f"{name}(){_complaint(signature, unknown, str(error))}") from None
        return function(*args, **kwargs)

    call.__qualname__ = name
    call.__name__ = name.rpartition(".")[2]
    return call


def called(name: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """`named` as a decorator, also of an `__init__`: `@called("Sampler")`."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        return named(function, name)

    return decorate


def _complaint(signature: inspect.Signature, unknown: list[str], error: str) -> str:
    """The message after the function's name; error: the message of `bind`."""
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    by_name = [one.name for one in parameters if one.kind is not inspect.Parameter.POSITIONAL_ONLY]
    if unknown:
        return f" has no argument {unknown[0]!r}; {nearest(unknown[0], by_name)}"
    if "too many positional" in error:
        keywords = [one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY]
        count = len(parameters) - len(keywords)
        remedy = f"; write these by name: {', '.join(keywords)}" if keywords else ""
        return f" takes at most {count} positional argument{'s' * (count != 1)}{remedy}"
    return f": {error}"


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean steps?` for the closest known word; if none is close, the list of them."""
    known = list(known)
    near = hint(word, known).removeprefix("; ")
    return near or (f"there are {', '.join(known)}" if known else "there are none")


def hint(word: str, known: Iterable[str]) -> str:
    """`; did you mean steps?` for the closest known word; empty if none is close."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def check_whole(name: str, value: object, least: int = 1, most: int = 10**9) -> int:
    """Return `value`. Raises ValueError naming `name` unless it is a whole number in [least, most]."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return value
