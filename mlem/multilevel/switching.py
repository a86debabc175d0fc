"""The search for switching plans: which single level runs at each evaluation, by predicted error.

It starts from the best plan with two switches, one level between two times and another before and after (T-Stitch if
the small one comes first), and from the largest level everywhere, thinned out until it is cheap enough; then it changes
two rows at a time, as long as that helps (a sequence of models, OMS-DPM).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mlem.multilevel.plan import Plan
from mlem.multilevel.predict import Predictor

__all__ = ["switches"]

PASSES = 4
"""Over all rows, at most."""

FINE = 32
"""Most rows tried as ends of windows, and to change together with a row."""

Array = NDArray[np.float64]
Rows = NDArray[np.int64]


def switches(predictor: Predictor, subsets: Sequence[Sequence[str]], costs: Tensor, budget: float) -> Plan | None:
    """The plan with the least predicted error found.

    Args:
        subsets: the sets of levels that a plan may use, cheapest first; levels that never run are left out.
        costs: (K,), of one evaluation of each level of the family, the largest being 1.
        budget: largest cost of the plan, in evaluations of the largest level.

    Returns: None if no plan is that cheap.
    """
    names = predictor.calibration.names
    allowed = sorted({names.index(name) for levels in subsets for name in levels})
    found = _Switching(predictor, allowed, costs.numpy(), budget).best() if allowed else None
    if found is None:
        return None
    used = sorted(set(found.tolist()))
    return Plan.switching([used.index(level) for level in found.tolist()], [names[level] for level in used])


class _Switching:
    """Level numbers per row, (R,), and their predicted error.

    The predicted error is a quadratic form in "this level runs at this row": Q of (R, K) by (R, K), flattened.
    """

    def __init__(self, predictor: Predictor, allowed: Sequence[int], costs: Array, budget: float) -> None:
        self._rows, self._allowed, self._budget = predictor.rows, np.array(allowed), budget * (1 + 1e-12)
        self._costs = costs[self._allowed]
        corrections, rows = predictor.scale.shape
        scale = predictor.scale.numpy()
        found = predictor.covariance.block(np.arange(corrections), np.arange(rows))
        found = found.reshape(corrections, rows, corrections, rows) * scale[:, :, None, None] * scale
        # where a level runs, all corrections above it are lost
        for axis in (0, 2):
            found = np.flip(np.flip(found, axis).cumsum(axis), axis)
        form = np.zeros((corrections + 1, rows, corrections + 1, rows))
        form[:-1, :, :-1] = found
        form = form[self._allowed][:, :, self._allowed]
        self._form = form.transpose(1, 0, 3, 2).reshape(rows * len(allowed), -1)

    def _chosen(self, running: Rows) -> Rows:
        """Places in the form, of (.., R) numbers among the allowed levels."""
        return np.arange(self._rows) * len(self._allowed) + running

    def error(self, running: Rows) -> float:
        """Predicted mean squared error."""
        places = self._chosen(running)
        return float(self._form[places[:, None], places].sum())

    def best(self) -> Rows | None:
        """The level numbers; None if no plan is that cheap."""
        starts = [start for start in (self._window(), self._thinned()) if start is not None]
        found = [self._refined(start) for start in starts]
        return self._allowed[min(found, key=self.error)] if found else None

    def _window(self) -> Rows | None:
        """The best plan with one level between two times and another before and after."""
        number, best, least = np.arange(self._rows), None, float("inf")
        ends = [*range(0, self._rows, 1 + self._rows // FINE), self._rows]
        for (first, end), inside, outside in itertools.product(
            itertools.combinations(ends, 2), range(len(self._allowed)), range(len(self._allowed))
        ):
            share = (end - first) * self._costs[inside] + (self._rows - end + first) * self._costs[outside]
            if share > self._budget:
                continue
            running = np.where((first <= number) & (number < end), inside, outside)
            if (error := self.error(running)) < least:
                best, least = running, error
        return best

    def _thinned(self) -> Rows | None:
        """Starting from the largest level everywhere, repeat the change with the least loss per saving."""
        running = np.full(self._rows, len(self._allowed) - 1)
        while (left := self._costs[running].sum() - self._budget) > 0:
            saved = self._costs[running][:, None] - self._costs
            lost = self._singly(running).reshape(self._rows, -1)
            worth = np.where(saved > 0, np.maximum(lost, 0) / np.minimum(np.maximum(saved, 1e-12), left), np.inf)
            if not np.isfinite(worth).any():
                return None
            row, level = np.unravel_index(worth.argmin(), worth.shape)
            running[row] = level
        return running

    def _singly(self, running: Rows) -> Array:
        """Change of the error from running another level at one row: (R K,)."""
        places = self._chosen(running)
        now = np.repeat(places, len(self._allowed))
        slope = self._form[:, places].sum(1)
        diagonal = np.diag(self._form)
        every = np.arange(len(now))
        return 2 * (slope - slope[now]) + diagonal + diagonal[now] - 2 * self._form[every, now]

    def _refined(self, running: Rows) -> Rows:
        """Change the levels of two rows, or one, as long as that helps."""
        running, stride = running.copy(), 1 + self._rows // FINE
        idle = 0
        for number in range(PASSES * self._rows):
            if not self._changed(running, np.arange(number % stride, self._rows, stride)):
                idle += 1
                if idle == stride:
                    break
            else:
                idle = 0
        return running

    def _changed(self, running: Rows, rows: Rows) -> bool:
        """Make the best change at one of these rows and any other, or at one of them alone, if it helps."""
        levels = len(self._allowed)
        every = np.arange(self._rows * levels)
        some = (rows[:, None] * levels + np.arange(levels)).ravel()
        now, single = np.repeat(self._chosen(running), levels), self._singly(running)
        form, here = self._form, now[some]
        cross = form[some] - form[some][:, now] - form[here] + form[here[:, None], now]
        gain = single[some][:, None] + single + 2 * cross
        spent = (self._costs - self._costs[running][:, None]).ravel()
        cost = spent[some][:, None] + spent
        # the same change twice counts once, and two at one row not at all
        same_row = (some // levels)[:, None] == every // levels
        gain = np.where(same_row, single, gain)
        cost = np.where(same_row, spent, cost)
        barred = (same_row & (some[:, None] != every)) | (cost > self._budget - self._costs[running].sum())
        gain[barred] = np.inf
        u, v = np.unravel_index(gain.argmin(), gain.shape)
        if gain[u, v] >= -1e-9 * self.error(running):
            return False
        for place in (int(some[u]), int(v)):
            running[place // levels] = place % levels
        return True
