"""The covariance of corrections at any two evaluations, from a calibration: a matrix that is never formed.

Between two calibrated times, the knots, a correction q is a straight line plus a Brownian bridge. So with `m(i)` the
weights of the knots at row i, `c(i)` the cell between knots that contains row i and `s(i)` in [0, 1] the place in it,

    E[q_k(i) q_l(j)] = m(i)' inner_kl m(j) + change_kl[c(i)] (min(s(i), s(j)) - s(i) s(j)) [c(i) = c(j)].

A quadratic form costs R operations, not R^2, as bridges have independent increments. R rows, C corrections, T knots;
arrays are NumPy's, in float64, as the search needs thousands of small ones.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mlem.multilevel.calibration import LinearResponse

__all__ = ["CorrectionCovariance", "knot_weights"]

Array = NDArray[np.float64]


class CorrectionCovariance:
    """Mean of `q_k(i) q_l(j)` per pixel.

    Args:
        times: (R,), `-ln kappa` of the evaluations, in any order.
        knots: (T,), rising, of the calibration.
        found: of the calibration.
    """

    def __init__(self, times: Array, knots: Array, found: LinearResponse) -> None:
        self._cell, self._share = _places(times, knots)
        self._weights = knot_weights(times, knots)
        self._inner: Array = found.inner.numpy()
        self._corrections, count = self._inner.shape[0], len(knots)
        rough = found.roughness.numpy()
        change = np.diff(np.diff(self._inner, axis=1), axis=3).diagonal(axis1=1, axis2=3)  # (C, C, T-1)
        self._change = change * np.sqrt(rough[:, None] * rough)[..., None]
        # rows in order of time; for each, the first row of its cell, and the distance from the row before in the cell
        self._order = np.argsort(self._cell + self._share, kind="stable")
        self._starts = np.searchsorted(self._cell[self._order], np.arange(count))  # (T,), the last is R
        shares = self._share[self._order]
        self._ways = np.diff(shares, prepend=0.0)
        begun = self._starts[:-1][self._starts[:-1] < self._starts[1:]]
        self._ways[begun] = shares[begun]
        # in order of time, the first row of each row's cell and the first after it
        self._begins, self._ends = (self._starts[self._cell[self._order] + after] for after in (0, 1))
        self._changes = self._change[:, :, self._cell]

    def energy(self, deviations: Array) -> Array:
        """The quadratic form: (.., C, R) -> (..)."""
        straight = deviations @ self._weights
        flat = straight.reshape(*straight.shape[:-2], -1)
        total = ((flat @ self._inner.reshape(flat.shape[-1], -1)) * flat).sum(-1)
        after = self._after(deviations)  # an increment of a bridge counts for all that comes after it
        whole = deviations * self._share
        cells = self._cell[self._order]
        for k in range(self._corrections):
            for other in range(self._corrections):
                change = self._change[k, other]
                total += (after[..., k, :] * after[..., other, :]) @ (self._ways * change[cells])
        ends = self._by_cell(whole)
        return total - np.einsum("...km,...lm,klm->...", ends, ends, self._change)

    def times(self, deviations: Array) -> Array:
        """The matrix times a vector: (C, R) -> (C, R)."""
        size = self._inner.shape[0] * self._inner.shape[1]
        knots = self._inner.reshape(size, size) @ (deviations @ self._weights).ravel()
        straight = knots.reshape(self._inner.shape[:2]) @ self._weights.T
        running = _sums(self._ways * self._after(deviations))
        least = np.empty_like(deviations)
        least[:, self._order] = running[:, 1:] - running[:, self._begins]  # sum_j min(s(i), s(j)) d(j), within the cell
        bridge = least - self._share * self._by_cell(deviations * self._share)[:, self._cell]
        return straight + (self._changes * bridge).sum(1)

    def block(self, corrections: NDArray[np.intp], rows: NDArray[np.intp]) -> Array:
        """The part of the matrix of these corrections (c,) at these rows (N,): (c, N, c, N)."""
        cell, share = self._cell[rows], self._share[rows]
        half = self._half[
            corrections[:, None, None, None], np.arange(self._half.shape[1])[:, None, None], corrections[:, None], rows
        ]
        here = share[:, None, None]
        straight = half[:, cell] * (1 - here) + half[:, cell + 1] * here
        bridge = (np.minimum(share[:, None], share) - share[:, None] * share) * (cell[:, None] == cell)
        change = self._change[corrections[:, None, None], corrections[:, None], cell]
        return straight + (change[..., None] * bridge).transpose(0, 2, 1, 3)

    @cached_property
    def _half(self) -> Array:
        """inner_kl m(j), at every knot and row: (C, T, C, R)."""
        return self._inner @ self._weights.T

    def at_same_row(self) -> Array:
        """Mean of `q_k(i) q_l(i)`: (C, C, R)."""
        straight = np.einsum("rt,ktls,rs->klr", self._weights, self._inner, self._weights, optimize=True)
        return straight + self._changes * (self._share - self._share**2)

    def _after(self, deviations: Array) -> Array:
        """In order of time, the sum over the same cell from each row on: (.., R) -> (.., R)."""
        passed = _sums(deviations[..., self._order])
        return passed[..., self._ends] - passed[..., :-1]

    def _by_cell(self, values: Array) -> Array:
        """Sums over the rows of each cell: (.., R) -> (.., T-1)."""
        return np.diff(_sums(values[..., self._order])[..., self._starts], axis=-1)


def _sums(values: Array) -> Array:
    """Cumulative sums, starting from 0: (.., R) -> (.., R + 1)."""
    sums = np.zeros((*values.shape[:-1], values.shape[-1] + 1))
    np.cumsum(values, axis=-1, out=sums[..., 1:])
    return sums


def knot_weights(times: Array, knots: Array) -> Array:
    """Weights of linear interpolation from the knots (T,) to the times (R,), constant beyond: (R, T)."""
    cell, share = _places(times, knots)
    rows, weights = np.arange(len(times)), np.zeros((len(times), len(knots)))
    weights[rows, cell], weights[rows, cell + 1] = 1 - share, share
    return weights


def _places(times: Array, knots: Array) -> tuple[NDArray[np.intp], Array]:
    """The cell of each time, and the place in it, in [0, 1]: (R,) each."""
    inside = np.clip(times, knots[0], knots[-1])
    cell = np.clip(np.searchsorted(knots, inside, side="right") - 1, 0, len(knots) - 2)
    return cell, (inside - knots[cell]) / (knots[cell + 1] - knots[cell])
