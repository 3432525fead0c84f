"""What can be said when the lowest loss lies at the end of the learning rates that were run.

Owns one-sided bounds: with a single minimum the optimum lies beyond every learning rate whose loss
is significantly higher than the edge's, seen from inside, and below those that diverged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_mup.transfer.fits.tails import one_sided
from megatron_mup.transfer.fits.types import Estimate
from megatron_mup.transfer.fits.window import Grid


def edge_estimates(
    grid: Grid, *, variance: float | None, df: float, level: float
) -> tuple[Estimate, Estimate]:
    """Optimum and loss of a curve without an inner minimum: bounds with reasons, no values.

    Args:
        grid: of the curve, with at least one learning rate at which all runs ended well.
        variance: noise of one run, nats^2; None: unknown.
        df: its degrees of freedom.
        level: of the bounds (one-sided).
    """
    best, high = grid.best, grid.edge == "high"
    inside = _surely_worse(grid, variance=variance, df=df, level=level)
    outside = _beyond(grid, grid.all_diverged)
    low, above = (inside, outside) if high else (outside, inside)
    known = "" if variance is not None else " (noise unknown)"
    reason = f"{_where(grid)}: the optimum lies {_between(low, above)}{known}"
    spread = 0.0
    if variance is not None:
        spread = one_sided(level, df) * math.sqrt(variance / grid.counts[best])
    loss = Estimate(
        value=None,
        high=grid.means[best] + spread if variance is not None else None,
        reason="the optimum lies outside the learning rates that were run",
    )
    return Estimate(value=None, low=low, high=above, reason=reason), loss


def diverged_beside(grid: Grid) -> float | None:
    """Nearest learning rate beyond the edge at which a run diverged; None: none did, or no edge.

    Args:
        grid: of the curve, with at least one learning rate at which all runs ended well.
    """
    return None if grid.edge is None else _beyond(grid, grid.diverged)


def _where(grid: Grid) -> str:
    """Where the lowest loss lies, as a reader of the grid sees it."""
    at, beside = power(grid.log2_lrs[grid.best]), diverged_beside(grid)
    end = "highest" if grid.edge == "high" else "lowest"
    if beside is None:
        return f"the lowest loss lies at the {end} learning rate, {at}"
    if beside in grid.all_diverged:
        return f"the lowest loss lies at the {end} learning rate that did not diverge, {at}"
    some = f"{grid.diverged_at(beside)} runs diverged"
    return f"the lowest loss, at {at}, lies beside {power(beside)}, at which {some}"


def power(log2_lr: float) -> str:
    """A learning rate in words, such as ``2^-6.5``."""
    return f"2^{log2_lr:.4g}"


def _between(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"between {power(low)} and {power(high)}"
    if low is not None:
        return f"above {power(low)}"
    return f"below {power(high)}" if high is not None else "anywhere"


def _surely_worse(grid: Grid, *, variance: float | None, df: float, level: float) -> float | None:
    """Nearest learning rate inside the grid whose loss is significantly above the edge's."""
    best = grid.best
    inside = range(best - 1, -1, -1) if grid.edge == "high" else range(best + 1, len(grid.means))
    for index in inside:
        error = 0.0
        if variance is not None:
            runs = 1.0 / grid.counts[index] + 1.0 / grid.counts[best]
            error = one_sided(level, df) * math.sqrt(variance * runs)
        if grid.means[index] - grid.means[best] > error:
            return grid.log2_lrs[index]
    return None


def _beyond(grid: Grid, log2_lrs: Sequence[float]) -> float | None:
    """Nearest of some learning rates beyond the edge."""
    at = grid.log2_lrs[grid.best]
    if grid.edge == "high":
        return min((x for x in log2_lrs if x > at), default=None)
    return max((x for x in log2_lrs if x < at), default=None)
