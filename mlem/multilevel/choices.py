"""Named choices for plans; free of torch, since the command line reads them before torch is loaded.

`coins.py` and `estimators.py` implement them; their registries have exactly these names.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["COINS", "ESTIMATORS", "PROBABILITIES", "UNITS", "Traits", "check_choice"]


@dataclass(frozen=True)
class Traits:
    """Properties of an estimator, known before it runs.

    Args:
        holds: whether corrections are held between the evaluations at which they are measured.
        moves_state: whether the state is moved between evaluations, which needs a solver with one evaluation per step.
        searched: whether the evaluations are searched for with a calibration, unless coins are requested.
        specified: whether a specification may name it; plans of others are made by hand.
        orders: allowed orders of extrapolation.
    """

    holds: bool
    moves_state: bool
    searched: bool
    specified: bool = True
    orders: tuple[int, ...] = (0, 1)


ESTIMATORS = {
    "jump": Traits(holds=False, moves_state=False, searched=False),
    "held": Traits(holds=True, moves_state=False, searched=True),
    "hindsight": Traits(holds=True, moves_state=True, searched=True),
    "switch": Traits(holds=False, moves_state=False, searched=True),
    "forecast": Traits(holds=True, moves_state=False, searched=True, specified=False, orders=(0, 1, 2)),
}
COINS = ("systematic", "bernoulli", "nested", "poisson")
"""The kinds of coins, the recommended one first."""
PROBABILITIES = ("calibrated", "learned", "theory")
"""The laws of probabilities; numbers may be given instead."""
UNITS = ("seconds", "flops")
"""The units of cost."""


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError, with the nearest choice, unless `value` is one of `choices`."""
    if value in choices:
        return
    near = difflib.get_close_matches(value, choices, 1) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")
