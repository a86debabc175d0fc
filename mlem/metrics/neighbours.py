"""Improved precision and recall (Kynkaanniemi et al., arXiv:1904.06991) between sets of features."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NEIGHBOURS", "precision_recall"]

NEIGHBOURS = 3
_ROWS = 1000  # rows of the distance matrix in memory at once


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Share of generated features on the manifold of the real ones, and vice versa.

    generated, real: (n, d) and (m, d), at least 4 rows each. The manifold of a set is the union of balls around its
    members that reach to the third nearest other member (equation 1, k = 3). Both shares depend on n and m.
    """
    return _share_inside(generated, real), _share_inside(real, generated)


def _share_inside(points: Tensor, members: Tensor) -> float:
    # each member is its own nearest: the third other one is number four
    radii = torch.cat(
        [torch.cdist(rows, members).kthvalue(NEIGHBOURS + 1, dim=1).values for rows in members.split(_ROWS)]
    )
    inside = torch.cat([(torch.cdist(rows, members) <= radii).any(1) for rows in points.split(_ROWS)])
    return float(inside.double().mean())
