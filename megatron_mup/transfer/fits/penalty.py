"""Loss that the largest size gives away when it takes the smallest size's best learning rate.

Owns the zero-shot penalty L_n(x*_smallest) - L*_n, nats: from the largest size's fitted curve
inside its window, from its measured mean losses outside, a lower bound beyond its grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron_mup.transfer.fits.edge import power
from megatron_mup.transfer.fits.shape import curve_above_minimum
from megatron_mup.transfer.fits.tails import one_sided, two_sided
from megatron_mup.transfer.fits.types import Curve, Estimate, Minimum
from megatron_mup.transfer.fits.window import Grid, read_grid


def zero_shot_penalty(
    ordered: Sequence[Minimum], largest_curve: Curve, *, level: float
) -> Estimate:
    """Penalty at the largest size.

    Args:
        ordered: minima by increasing size.
        largest_curve: runs of the largest size.
        level: of the interval.
    """
    first, last = ordered[0], ordered[-1]
    if len(ordered) < 2:
        return Estimate(value=None, reason="not identifiable: one size")
    if first.log2_lr.value is None:
        return Estimate(value=None, reason=f"size {first.size:g}: {first.log2_lr.reason}")
    at, grid = first.log2_lr.value, read_grid(largest_curve)
    if last.log2_lr.value is None:
        return _above_lowest(at, grid, last, level)
    if last.curvature.value is None or last.loss.value is None:
        return Estimate(value=None, reason=f"size {last.size:g}: no curve was fitted")
    if last.window[0] <= at <= last.window[1]:
        return _fitted(first, last, level)
    return _measured(at, grid, last, level)


def _fitted(first: Minimum, last: Minimum, level: float) -> Estimate:
    """From the fitted curve; both optima and the curvature are uncertain.

    The distance's interval is mapped through the curve and joined with the curvature's relative
    error by the method of variance estimates recovery (Zou and Donner 2008, Stat. Med. 27).
    """
    here, there = first.log2_lr, last.log2_lr
    assert here.value is not None
    assert there.value is not None
    assert last.curvature.value is not None
    asymmetry, curvature = last.asymmetry or 0.0, last.curvature.value
    distance = here.value - there.value
    value = curvature * float(curve_above_minimum(distance, asymmetry))
    if here.error is None or there.error is None or last.curvature.error is None:
        return Estimate(value=value, reason="interval not identifiable: no repeats")
    df = min(here.df or math.inf, there.df or math.inf)
    quantile = two_sided(level, df)
    common = 2.0 * first.shared_error * last.shared_error
    reach = quantile * math.sqrt(max(here.error**2 + there.error**2 - common, 0.0))
    ends = [
        curvature * float(curve_above_minimum(distance + side * reach, asymmetry))
        for side in (-1.0, 1.0)
    ]
    nearest = 0.0 if abs(distance) <= reach else min(ends)
    relative = quantile * last.curvature.error / curvature
    down = math.hypot(value - nearest, value * min(relative, 1.0))
    up = math.hypot(max(ends) - value, value * relative)
    return Estimate(
        value=value,
        low=max(value - down, 0.0),
        high=value + up,
        error=(up + down) / 2.0 / quantile,
        df=df,
    )


def _measured(at: float, grid: Grid, last: Minimum, level: float) -> Estimate:
    """From the mean losses; beyond the learning rates that ended well only a lower bound."""
    assert last.loss.value is not None
    inside = grid.log2_lrs[0] <= at <= grid.log2_lrs[-1]
    loss = float(np.interp(at, grid.log2_lrs, grid.means))
    value = loss - last.loss.value
    half = _half(grid, last, level)
    bounds = f"{power(grid.log2_lrs[0])} to {power(grid.log2_lrs[-1])}"
    if not inside:
        return Estimate(
            value=None,
            low=max(value - (half or 0.0), 0.0),
            reason=f"{power(at)} lies outside the learning rates that ended well, {bounds}",
        )
    if half is None:
        return Estimate(value=value, reason="interval not identifiable: no repeats")
    return Estimate(
        value=value,
        low=max(value - half, 0.0),
        high=value + half,
        reason="outside the fitted window: interpolated between measured mean losses",
    )


def _half(grid: Grid, last: Minimum, level: float) -> float | None:
    """Half the interval of a difference of two means; seeds' levels cancel within a curve."""
    if last.noise is None or last.log2_lr.df is None:
        return None
    quantile = two_sided(level, last.log2_lr.df)
    return quantile * last.noise * math.sqrt(1.0 / min(grid.counts) + 1.0 / last.runs)


def _above_lowest(at: float, grid: Grid, last: Minimum, level: float) -> Estimate:
    """The largest size has no inner minimum: the penalty is at least what was measured."""
    if last.lowest is None:
        return Estimate(value=None, reason=f"size {last.size:g}: no run ended well")
    measured = float(np.interp(at, grid.log2_lrs, grid.means)) - last.lowest[1]
    half = 0.0
    if last.noise is not None:
        half = one_sided(level, math.inf) * last.noise * math.sqrt(2.0 / min(grid.counts))
    return Estimate(
        value=None,
        low=max(measured - half, 0.0),
        reason=f"size {last.size:g}: {last.log2_lr.reason}",
    )
