"""Power laws over sizes, with and without an asymptote, or the reason why there is none.

Owns the law's fit: without asymptote a weighted line in logarithms; with one a profile likelihood
over the exponent, at which the law is linear. When a law is reported at all (ours): at least 4
sizes, and an exponent whose interval closes inside the searched range and is at most 1 wide (a
wider one cannot tell a square root from no dependence).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_mup.transfer.fits.regression import Measured, fit_line, interval, measured
from megatron_mup.transfer.fits.shape import Array
from megatron_mup.transfer.fits.tails import two_sided
from megatron_mup.transfer.fits.types import Estimate, PowerLaw

FEWEST_SIZES = 4
# With one degree of freedom an asymptote's interval is short by luck only; the lucky ones would be
# the ones shown, and 67% of them covered.
FEWEST_SIZES_WITHOUT_ERRORS = 5
WIDEST_EXPONENT = 1.0
# Exponents searched with an asymptote: the value approaches its limit, so they are negative.
_STEEPEST, _FLATTEST, _EXPONENTS = -3.0, -0.02, 200
# The profile is resolved when so many of its points lie inside the interval.
_RESOLVED, _REFINEMENTS = 12, 4


def fit_power_law(
    sizes: Sequence[float],
    estimates: Sequence[Estimate],
    *,
    asymptote: bool,
    level: float = 0.9,
) -> PowerLaw:
    """Fit value(size) = asymptote + coefficient * size ** exponent.

    Args:
        sizes: of each estimate, positive.
        estimates: those without a value are left out; weighted by their errors where all have one.
        asymptote: fit one; it is 0 otherwise.
        level: of the intervals.
    """
    kept = [(n, one) for n, one in zip(sizes, estimates, strict=True) if one.value is not None]
    count = len({n for n, _ in kept})
    if count < FEWEST_SIZES:
        known = f"{count} size{'' if count == 1 else 's'} with a value"
        return _refuse(f"not identifiable: {known}, {FEWEST_SIZES} needed")
    if asymptote:
        return _with_asymptote(kept, level)
    values = [one.value for _, one in kept if one.value is not None]
    if min(values) <= 0.0:
        return _refuse(f"not identifiable: a value is {min(values):.3g}, a power law is positive")
    return _without_asymptote(kept, level)


def _refuse(reason: str) -> PowerLaw:
    nothing = Estimate(value=None, reason=reason)
    return PowerLaw(exponent=nothing, coefficient=nothing, asymptote=nothing, reason=reason)


def _without_asymptote(kept: list[tuple[float, Estimate]], level: float) -> PowerLaw:
    logs = []
    for _, one in kept:
        assert one.value is not None
        error = one.error / one.value if one.error is not None else None
        logs.append(replace(one, value=math.log(one.value), error=error))
    line = fit_line(measured([math.log(n) for n, _ in kept], logs))
    exponent = line.slope(level)
    if _hopeless(exponent):
        return _refuse(_too_wide(exponent))
    lever = np.array([1.0, -line.centre])
    intercept = interval(
        float(lever @ line.coefficients), float(lever @ line.covariance @ lever), line.df, level
    )
    assert intercept.value is not None
    coefficient = Estimate(
        value=math.exp(intercept.value),
        low=None if intercept.low is None else math.exp(intercept.low),
        high=None if intercept.high is None else math.exp(intercept.high),
    )
    return PowerLaw(exponent=exponent, coefficient=coefficient, asymptote=Estimate(value=0.0))


def _hopeless(exponent: Estimate) -> bool:
    if exponent.low is None or exponent.high is None:
        return True
    return exponent.high - exponent.low > WIDEST_EXPONENT


def _too_wide(exponent: Estimate) -> str:
    low = "-inf" if exponent.low is None else f"{exponent.low:.2f}"
    high = "inf" if exponent.high is None else f"{exponent.high:.2f}"
    return f"not identifiable: the exponent could be anything from {low} to {high}"


def _with_asymptote(kept: list[tuple[float, Estimate]], level: float) -> PowerLaw:
    """Profile likelihood over the exponent."""
    data = measured([n for n, _ in kept], [one for _, one in kept])
    if data.errors is None and len(kept) < FEWEST_SIZES_WITHOUT_ERRORS:
        needed = f"{FEWEST_SIZES_WITHOUT_ERRORS} sizes needed"
        return _refuse(f"not identifiable: the values have no errors (no repeats), {needed}")
    # Relative to the geometric mean, so that asymptote and coefficient are hardly correlated.
    middle = math.exp(float(np.mean(np.log(data.x))))
    exponents = -np.geomspace(-_FLATTEST, -_STEEPEST, _EXPONENTS)
    for _ in range(_REFINEMENTS):
        found, errors, misfit = _at_exponents(data, data.x / middle, exponents)
        unit, df = _unit(data, float(misfit.min()))
        slack = two_sided(level, df) ** 2 * unit - (misfit - misfit.min())
        inside = np.flatnonzero(slack >= 0.0)
        if inside.size >= _RESOLVED:
            break
        ends = exponents[max(inside[0] - 1, 0)], exponents[min(inside[-1] + 1, _EXPONENTS - 1)]
        exponents = np.linspace(ends[0], ends[1], _EXPONENTS)
    exponent = _profiled(exponents, np.zeros(_EXPONENTS), slack / unit, df, level)
    exponent = replace(
        exponent,
        low=None if exponents[inside[-1]] == _STEEPEST else exponent.low,
        high=None if exponents[inside[0]] == _FLATTEST else exponent.high,
    )
    if _hopeless(exponent):
        return _refuse(_too_wide(exponent))
    asymptote, coefficient = (
        _profiled(found[:, i], np.sqrt(unit) * errors[:, i], slack / unit, df, level)
        for i in (0, 1)
    )
    assert exponent.value is not None
    assert coefficient.value is not None
    return PowerLaw(
        exponent=exponent,
        asymptote=asymptote,
        coefficient=Estimate(value=coefficient.value * middle**-exponent.value),
    )


def _at_exponents(data: Measured, relative: Array, exponents: Array) -> tuple[Array, Array, Array]:
    """Asymptote and coefficient, their errors at unit noise, and the misfit, per exponent."""
    weights = np.ones_like(data.y) if data.errors is None else 1.0 / data.errors
    columns = np.stack(
        [np.ones((len(exponents), len(data.y))), relative ** exponents[:, None]], axis=2
    )
    weighted = columns * weights[None, :, None]
    transposed = weighted.transpose(0, 2, 1)
    covariance = np.linalg.inv(transposed @ weighted)
    found = (covariance @ transposed) @ (data.y * weights)
    residuals = data.y * weights - np.einsum("knp,kp->kn", weighted, found)
    errors = np.sqrt(np.einsum("kpp->kp", covariance))
    return found, errors, np.einsum("kn,kn->k", residuals, residuals)


def _unit(data: Measured, smallest: float) -> tuple[float, float]:
    """Variance per unit of misfit and its degrees of freedom; the rule of ``regression``."""
    df = float(len(data.x) - 3)
    if data.errors is None or smallest / df > 1.0:
        return max(smallest / df, np.finfo(float).tiny), df
    return 1.0, data.df


def _profiled(values: Array, errors: Array, slack: Array, df: float, level: float) -> Estimate:
    """Value at the best exponent, interval as the union over those that the data allow."""
    kept, best = slack >= 0.0, int(np.argmax(slack))
    half = np.sqrt(np.where(kept, slack, 0.0)) * errors
    low, high = float((values - half)[kept].min()), float((values + half)[kept].max())
    quantile = two_sided(level, df)
    error = (high - low) / 2.0 / quantile
    return Estimate(value=float(values[best]), low=low, high=high, error=error, df=df)
