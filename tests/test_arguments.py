"""Errors about arguments: the caller's name for the function, and the nearest argument."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from mlem.arguments import called, check_whole, named, nearest


def draw(model: str, *, steps: int = 50, seed: int = 0) -> tuple[str, int, int]:
    """Draws."""
    return model, steps, seed


@dataclass(frozen=True)
class Options:
    """Options of a plan."""

    budget: float | None = None
    order: int = 0


class Holder:
    plan = staticmethod(named(Options, "family.plan"))

    @called("Holder")
    def __init__(self, model: str, *, steps: int = 1) -> None:
        self.told = (model, steps)


def test_what_is_right_goes_through() -> None:
    assert named(draw, "sample")("a", steps=3) == ("a", 3, 0)
    assert Holder("a").plan(budget=0.5, order=1) == Options(0.5, 1)
    assert Holder("a", steps=4).told == ("a", 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f("a", stepz=3), "sample() has no argument 'stepz'; did you mean steps?"),
        (lambda f: f("a", quality=3), "sample() has no argument 'quality'; there are model, steps, seed"),
        (lambda f: f("a", 3), "sample() takes at most 1 positional argument; write these by name: steps, seed"),
        (lambda f: f(), "sample(): missing a required argument: 'model'"),
        (lambda f: f("a", model="b"), "sample(): multiple values for argument 'model'"),
        (lambda f: Holder.plan(buget=1), "family.plan() has no argument 'buget'; did you mean budget?"),
        (lambda f: Holder.plan(1.0, 2, 3), "family.plan() takes at most 2 positional arguments"),
        (lambda f: Holder("a", step=1), "Holder() has no argument 'step'; did you mean steps?"),
        (lambda f: Holder("a", self=1), "Holder(): multiple values for argument 'self'"),
    ],
)
def test_a_mistake_names_what_was_called_and_the_nearest_argument(
    call: Callable[[Callable[..., Any]], Any], message: str
) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        call(named(draw, "sample"))


def test_errors_from_within_are_left_alone() -> None:
    def broken(x: int) -> None:
        raise TypeError("from within")

    with pytest.raises(TypeError, match=r"^from within$"):
        named(broken, "sample")(1)


def test_help_shows_the_function_itself() -> None:
    sample, plan = named(draw, "sample"), named(Options, "family.plan")
    assert inspect.signature(sample) == inspect.signature(draw)
    assert (sample.__name__, sample.__doc__) == ("sample", "Draws.")
    assert (plan.__name__, plan.__qualname__, plan.__doc__) == ("plan", "family.plan", "Options of a plan.")
    assert list(inspect.signature(plan).parameters) == ["budget", "order"]


def test_nearest() -> None:
    assert nearest("dimm", ["ddim", "heun"]) == "did you mean ddim?"
    assert nearest("x", ["ddim", "heun"]) == "there are ddim, heun"
    assert nearest("x", []) == "there are none"


def test_whole_numbers() -> None:
    assert check_whole("steps", 1) == 1
    assert check_whole("order", 0, 0) == 0
    for value in (0, True, 2.0, "2", None):
        with pytest.raises(ValueError, match=f"^steps must be a whole number >= 1, got {re.escape(repr(value))}$"):
            check_whole("steps", value)
