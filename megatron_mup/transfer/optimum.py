"""Where the best learning rate lies on a grid, and what the grid cannot tell.

The estimate is the vertex of the parabola in log2 LR through the grid's minimum and its two
neighbours (ours; the same reading for every width and parameterization). Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Optimum:
    """Minimum of one curve.

    Attributes:
        log2_lr: vertex in log2 of the base LR; the grid point itself when it is at the edge.
        loss: smallest loss on the grid, nats per token.
        at_edge: the minimum is the first or last finite point, so the optimum may lie outside.
    """

    log2_lr: float
    loss: float
    at_edge: bool


def find_optimum(log2_lrs: Sequence[float], losses: Sequence[float]) -> Optimum | None:
    """Locate the minimum of loss against log2 LR.

    Args:
        log2_lrs: grid in increasing order.
        losses: loss per grid point; not finite where a run diverged.

    Returns:
        The optimum, or None when no run has a finite loss. A minimum next to a diverged run or at
        the grid's end is reported as an edge.
    """
    finite = [index for index, loss in enumerate(losses) if math.isfinite(loss)]
    if not finite:
        return None
    best = min(finite, key=lambda index: losses[index])
    # A diverged neighbour bounds the optimum as the grid's end does: the loss beside it is unknown.
    neighbours = (best - 1, best + 1)
    if not all(index in finite for index in neighbours):
        return Optimum(log2_lrs[best], losses[best], at_edge=True)
    return Optimum(_vertex(log2_lrs, losses, best), losses[best], at_edge=False)


def _vertex(xs: Sequence[float], ys: Sequence[float], best: int) -> float:
    """Vertex of the parabola through the minimum and its neighbours (any spacing)."""
    left, right = xs[best] - xs[best - 1], xs[best + 1] - xs[best]
    rise_left, rise_right = ys[best - 1] - ys[best], ys[best + 1] - ys[best]
    curvature = rise_left * right + rise_right * left
    # Three equal losses: every point is a minimum, and the grid's own is as good as another.
    if curvature == 0.0:
        return xs[best]
    return xs[best] + 0.5 * (rise_left * right**2 - rise_right * left**2) / curvature
