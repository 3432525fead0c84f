"""Numbers that say how well a learning rate transfers over sizes.

Owns their definitions. E, kappa and R(inf) are our definition, after arXiv:2605.21486; the others
are plain differences. Every number is an ``Estimate``: an interval or the reason why there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_mup.errors import DataError
from megatron_mup.transfer.fits.next_steps import FEWEST_FOR_TREND
from megatron_mup.transfer.fits.penalty import zero_shot_penalty
from megatron_mup.transfer.fits.power_laws import fit_power_law
from megatron_mup.transfer.fits.regression import (
    Line,
    Measured,
    fit_line,
    interval,
    measured,
)
from megatron_mup.transfer.fits.types import Comparison, Curve, Estimate, Minimum, Transfer


def measure_transfer(
    minima: Sequence[Minimum], curves: Sequence[Curve], *, level: float = 0.9
) -> Transfer:
    """Measure one arm's transfer.

    Args:
        minima: of ``fit_minima``, one a size.
        curves: the curves they were found on, in the same order.
        level: of the intervals.

    Raises:
        DataError: no size, a size that appears twice, or minima and curves that do not match.
    """
    ordered = _ordered(minima)
    if [curve.size for curve in curves] != [minimum.size for minimum in minima]:
        raise DataError("minima and curves must have the same sizes in the same order")
    largest = next(curve for curve in curves if curve.size == ordered[-1].size)
    sizes = [minimum.size for minimum in ordered]
    losses = [minimum.loss for minimum in ordered]
    law = fit_power_law(sizes, losses, asymptote=True, level=level)
    optima = [_without_shared(minimum) for minimum in ordered]
    alpha = _negative(law.exponent)
    beta = _negative(fit_power_law(sizes, optima, asymptote=True, level=level).exponent)
    curvatures = [minimum.curvature for minimum in ordered]
    gamma = fit_power_law(sizes, curvatures, asymptote=False, level=level).exponent
    total = _total_shift(ordered, level)
    return Transfer(
        shift_per_doubling=_shift_per_doubling(ordered, total, level),
        total_shift=total,
        zero_shot_penalty=zero_shot_penalty(ordered, largest, level=level),
        extrapolation_error=_extrapolation_error(ordered, level),
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        kappa=_kappa(alpha, beta, gamma, level),
        asymptotic_loss=law.asymptote,
        scatter=_scatter(ordered),
        sizes=tuple(sizes),
        minima=tuple(ordered),
    )


def predict_log2_lr(minima: Sequence[Minimum], size: float, *, level: float = 0.9) -> Estimate:
    """Optimum at another size, by the line through the optima in log2 of the size.

    Args:
        minima: of ``fit_minima``; those without a value are left out.
        size: positive.
        level: of the interval, which holds the scatter between sizes.

    Raises:
        DataError: the size is not positive, no minima, or a size that appears twice.
    """
    if not size > 0.0:
        raise DataError(f"size {size:g} to predict for must be positive")
    data = _optima(_ordered(minima))
    if len(data.x) < 2:
        return Estimate(value=None, reason=f"not identifiable: {_count(len(data.x))}, 2 needed")
    line = fit_line(data)
    return _with_remark(line.at(math.log2(size), level), line, data)


def compare_arms(transfers: Mapping[str, Transfer], *, level: float = 0.9) -> Comparison:
    """Set the arms' asymptotic losses against the best one's.

    Args:
        transfers: by name of the arm.
        level: of the intervals.
    """
    known = {
        arm: transfer.asymptotic_loss.value
        for arm, transfer in transfers.items()
        if transfer.asymptotic_loss.value is not None
    }
    if not known:
        reason = "not identifiable: no arm has a fitted asymptotic loss"
        return Comparison(
            best=None,
            asymptotic_penalty={arm: Estimate(value=None, reason=reason) for arm in transfers},
        )
    best = min(known, key=lambda arm: known[arm])
    reference = transfers[best].asymptotic_loss
    penalties = {}
    for arm, transfer in transfers.items():
        own = transfer.asymptotic_loss
        penalties[arm] = own if own.value is None else _difference(own, reference, level)
    penalties[best] = Estimate(value=0.0, reason="the best arm is the reference")
    return Comparison(best=best, asymptotic_penalty=penalties)


def _ordered(minima: Sequence[Minimum]) -> list[Minimum]:
    sizes = [minimum.size for minimum in minima]
    if not sizes:
        raise DataError("no minima: give the curve of at least one size")
    if len(set(sizes)) < len(sizes) or min(sizes) <= 0.0:
        shown = ", ".join(f"{size:g}" for size in sizes)
        raise DataError(f"sizes {shown}: each must be positive and appear once per arm")
    return sorted(minima, key=lambda minimum: minimum.size)


def _without_shared(minimum: Minimum) -> Estimate:
    """Optimum with the part of its error that differs between sizes."""
    own = minimum.log2_lr
    if own.error is None:
        return own
    return replace(own, error=math.sqrt(max(own.error**2 - minimum.shared_error**2, 0.0)))


def _optima(ordered: Sequence[Minimum]) -> Measured:
    found = [minimum for minimum in ordered if minimum.log2_lr.value is not None]
    return measured(
        [math.log2(minimum.size) for minimum in found],
        [minimum.log2_lr for minimum in found],
        [minimum.shared_error for minimum in found],
    )


def _count(sizes: int) -> str:
    return f"{sizes} size{'' if sizes == 1 else 's'} with an identified optimum"


def _difference(of: Estimate, against: Estimate, level: float, common: float = 0.0) -> Estimate:
    """Difference of two values; ``common`` is the variance that both have and that cancels."""
    assert of.value is not None
    assert against.value is not None
    value = of.value - against.value
    if of.error is None or against.error is None:
        return Estimate(value=value, reason="interval not identifiable: no repeats")
    variance = max(of.error**2 + against.error**2 - common, 0.0)
    df = min(of.df or math.inf, against.df or math.inf)
    return interval(value, variance, df, level)


def _total_shift(ordered: Sequence[Minimum], level: float) -> Estimate:
    """Octaves from the smallest to the largest size; bounds where one of them is at an edge."""
    first, last = ordered[0], ordered[-1]
    if len(ordered) < 2:
        return Estimate(value=None, reason="not identifiable: one size")
    if first.log2_lr.value is not None and last.log2_lr.value is not None:
        # var(v1 + g1 z - v2 - g2 z) = own1 + own2 + (g1 - g2)^2 = both errors - 2 g1 g2.
        common = 2.0 * first.shared_error * last.shared_error
        return _difference(last.log2_lr, first.log2_lr, level, common)
    low = _bound(last.log2_lr.low, first.log2_lr.high)
    high = _bound(last.log2_lr.high, first.log2_lr.low)
    at = last if last.log2_lr.value is None else first
    return Estimate(value=None, low=low, high=high, reason=f"size {at.size:g}: {at.log2_lr.reason}")


def _bound(of: float | None, against: float | None) -> float | None:
    return None if of is None or against is None else of - against


def _shift_per_doubling(ordered: Sequence[Minimum], total: Estimate, level: float) -> Estimate:
    """Slope of the optimum in log2 size; the bounds of the total shift where an end is missing."""
    if len(ordered) < 2:
        return Estimate(value=None, reason="not identifiable: one size")
    if total.value is None:
        doublings = math.log2(ordered[-1].size / ordered[0].size)
        low = None if total.low is None else total.low / doublings
        high = None if total.high is None else total.high / doublings
        return Estimate(value=None, low=low, high=high, reason=total.reason)
    data = _optima(ordered)
    line = fit_line(data)
    slope = _with_remark(line.slope(level), line, data)
    missing = [one for one in ordered if one.log2_lr.value is None]
    if not missing:
        return slope
    shown = ", ".join(f"{one.size:g}" for one in missing)
    remark = f"without size {shown}, whose optimum is not identified"
    return replace(slope, reason="; ".join(filter(None, [remark, slope.reason])))


def _with_remark(found: Estimate, line: Line, data: Measured) -> Estimate:
    """Say what an interval of the line rests on, where it is not the optima's own errors."""
    count = len(data.x)
    if found.low is None:
        return found
    if count == 2:
        return replace(found, reason="two sizes only: the interval holds no scatter between sizes")
    if line.scatter == 0.0 or data.errors is None:
        return found
    freedom = f"{count - 2} degree{'' if count == 3 else 's'} of freedom"
    remark = f"the interval rests on the scatter between {count} sizes ({freedom}): further sizes"
    return replace(found, reason=f"{remark} narrow it, seeds do not")


def _scatter(ordered: Sequence[Minimum]) -> float | None:
    data = _optima(ordered)
    if len(data.x) < FEWEST_FOR_TREND or data.errors is None:
        return None
    return fit_line(data).scatter


def _extrapolation_error(ordered: Sequence[Minimum], level: float) -> Estimate:
    """E: distance of the largest size's optimum from the line through the smaller ones."""
    data = _optima(ordered)
    if ordered[-1].log2_lr.value is None or len(data.x) < 3:
        at_end = ordered[-1].log2_lr.value is None
        why = "the largest size has no optimum" if at_end else f"{_count(len(data.x))}, 3 needed"
        return Estimate(value=None, reason=f"not identifiable: {why}")
    errors = data.errors if data.errors is not None else np.ones_like(data.y)
    columns = np.column_stack([np.ones(len(data.x) - 1), data.x[:-1]])
    weights = 1.0 / errors[:-1] ** 2
    solve = np.linalg.solve(columns.T * weights @ columns, columns.T * weights)
    contrast = np.append(-np.array([1.0, data.x[-1]]) @ solve, 1.0)
    miss = float(contrast @ data.y)
    if data.errors is None:
        return Estimate(value=abs(miss), reason="interval not identifiable: no repeats")
    variance = float(contrast**2 @ data.errors**2) + float(contrast @ data.shared) ** 2
    signed = interval(miss, variance, data.df, level)
    assert signed.low is not None
    assert signed.high is not None
    ends = (abs(signed.low), abs(signed.high))
    low = 0.0 if signed.low <= 0.0 <= signed.high else min(ends)
    return replace(signed, value=abs(miss), low=low, high=max(ends))


def _negative(exponent: Estimate) -> Estimate:
    if exponent.value is None:
        return exponent
    low = None if exponent.high is None else -exponent.high
    high = None if exponent.low is None else -exponent.low
    return replace(exponent, value=-exponent.value, low=low, high=high)


def _kappa(alpha: Estimate, beta: Estimate, gamma: Estimate, level: float) -> Estimate:
    """Exponent of the excess loss of the transferred rate relative to the remaining loss gap."""
    parts = {"alpha": alpha, "beta": beta, "gamma": gamma}
    missing = [name for name, part in parts.items() if part.value is None]
    if missing:
        return Estimate(value=None, reason=f"not identifiable: {', '.join(missing)} unknown")
    weights = {"alpha": 1.0, "beta": -2.0, "gamma": 1.0}
    value = sum(weights[name] * (part.value or 0.0) for name, part in parts.items())
    errors = [part.error for part in parts.values()]
    if any(error is None for error in errors):
        return Estimate(value=value, reason="interval not identifiable: no repeats")
    variance = sum((weights[name] * (part.error or 0.0)) ** 2 for name, part in parts.items())
    return interval(value, variance, min(part.df or math.inf for part in parts.values()), level)
