"""A line through estimates that have errors, and scatter between them on top.

Owns the weighted line with between-size scatter (Paule and Mandel 1982, J. Res. NBS 87) and its t
intervals. Rule for the degrees of freedom (ours; coverage in docs/transfer_statistics.md): where
the residuals are no larger than the errors explain, the errors' own; otherwise the scatter is known
from the residuals only and has (sizes - 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from megatron_mup.transfer.fits.shape import Array
from megatron_mup.transfer.fits.tails import two_sided
from megatron_mup.transfer.fits.types import Estimate

# Errors that rest on fewer degrees of freedom than this are too uncertain to be weights one by
# one; their mean variance is used for all (ours).
_TRUSTED_DF = 5.0


@dataclass(frozen=True)
class Measured:
    """Values to fit, in increasing order of size.

    Attributes:
        x: (m,) log2 or log of the size.
        y: (m,) values.
        errors: (m,) standard errors that are independent between sizes; None: unknown.
        shared: (m,) signed part of the error that all sizes have in common.
        df: degrees of freedom of the errors.
    """

    x: Array
    y: Array
    errors: Array | None
    shared: Array
    df: float


@dataclass(frozen=True)
class Line:
    """y = intercept + slope (x - centre).

    Attributes:
        centre: weighted mean of x.
        coefficients: intercept and slope.
        covariance: (2, 2) of them.
        scatter: standard deviation between sizes beyond the errors.
        df: degrees of freedom for t quantiles; 0: no interval.
    """

    centre: float
    coefficients: Array
    covariance: Array
    scatter: float
    df: float

    def slope(self, level: float) -> Estimate:
        """The slope with its t interval."""
        return interval(self.coefficients[1], self.covariance[1, 1], self.df, level)

    def at(self, x: float, level: float) -> Estimate:
        """Value of a further size: its interval holds the scatter between sizes."""
        lever = np.array([1.0, x - self.centre])
        variance = float(lever @ self.covariance @ lever) + self.scatter**2
        return interval(float(lever @ self.coefficients), variance, self.df, level)


def interval(value: float, variance: float, df: float, level: float) -> Estimate:
    """A t interval; without degrees of freedom the value alone."""
    if df <= 0.0:
        return Estimate(value=float(value), reason="interval not identifiable: too few sizes")
    half = two_sided(level, df) * math.sqrt(variance)
    low, high = float(value) - half, float(value) + half
    error = math.sqrt(variance)
    return Estimate(value=float(value), low=low, high=high, error=error, df=float(df))


def measured(
    x: Sequence[float], estimates: Sequence[Estimate], shared: Sequence[float] | None = None
) -> Measured:
    """Collect estimates that have values.

    Args:
        x: of each estimate.
        estimates: with values; an error that is missing anywhere makes all of them unknown.
        shared: signed common part of each error, which is taken out of ``error``.
    """
    common = np.zeros(len(estimates)) if shared is None else np.array(shared, dtype=float)
    errors = [estimate.error for estimate in estimates]
    y = np.array([estimate.value for estimate in estimates], dtype=float)
    known = [error for error in errors if error is not None and error > 0.0]
    if not known or len(known) < len(errors):
        return Measured(np.array(x, dtype=float), y, None, common, 0.0)
    variances = np.maximum(np.array(known) ** 2 - common**2, 1e-6 * np.array(known) ** 2)
    df = [estimate.df if estimate.df is not None else np.inf for estimate in estimates]
    if min(df) < _TRUSTED_DF:
        variances = np.full(len(known), variances.mean())
        return Measured(np.array(x, dtype=float), y, np.sqrt(variances), common, float(sum(df)))
    return Measured(np.array(x, dtype=float), y, np.sqrt(variances), common, float(min(df)))


def fit_line(data: Measured) -> Line:
    """Fit the weighted line; at least two sizes."""
    count = len(data.x)
    if data.errors is None:
        return _unweighted(data)
    scatter2 = _between(data) if count > 2 else 0.0
    df = float(count - 2) if scatter2 > 0.0 else data.df
    weights = 1.0 / (data.errors**2 + scatter2)
    centre, solve = _solver(data.x, weights)
    total = np.diag(1.0 / weights) + np.outer(data.shared, data.shared)
    return Line(centre, solve @ data.y, solve @ total @ solve.T, float(np.sqrt(scatter2)), df)


def _solver(x: Array, weights: Array) -> tuple[float, Array]:
    """Weighted mean of x, and the matrix from values to intercept and slope."""
    centre = float(weights @ x / weights.sum())
    mean = weights / weights.sum()
    lever = weights * (x - centre)
    return centre, np.stack([mean, lever / (lever @ (x - centre))])


def _unweighted(data: Measured) -> Line:
    """Errors unknown: everything about them comes from the residuals."""
    df = len(data.x) - 2
    centre, solve = _solver(data.x, np.ones_like(data.x))
    coefficients = solve @ data.y
    residuals = data.y - coefficients[0] - coefficients[1] * (data.x - centre)
    variance = float(residuals @ residuals) / df if df > 0 else 0.0
    return Line(centre, coefficients, solve @ solve.T * variance, float(np.sqrt(variance)), df)


def _between(data: Measured) -> float:
    """Paule-Mandel variance between sizes: weighted residuals as large as their expectation."""
    assert data.errors is not None
    errors2, expected = data.errors**2, len(data.x) - 2

    def excess(scatter2: float) -> float:
        weights = 1.0 / (errors2 + scatter2)
        centre, solve = _solver(data.x, weights)
        intercept, slope = solve @ data.y
        residuals = data.y - intercept - slope * (data.x - centre)
        return float(weights @ residuals**2) - expected

    ceiling = float(np.var(data.y)) * len(data.x) + float(errors2.max())
    if excess(0.0) <= 0.0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, ceiling, xtol=1e-9 * ceiling))
