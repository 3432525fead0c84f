"""Intervals of one curve's minimum: exact at a given asymmetry, profiled over the asymmetry.

At a given k the optimum's interval is Fieller's (the set of v at which the slope b + c w(v) is not
significantly different from 0, exact also where it is unbounded) and the curvature's is a t
interval. With k unknown each k keeps the part of the threshold that its own misfit leaves, and the
interval is the union: a profile likelihood in closed form, no iteration. Sources: Fieller 1954
(J. R. Stat. Soc. B 16), Graybill and Wang 1980 (J. Am. Stat. Assoc. 75).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_mup.transfer.fits.shape import (
    Array,
    ShapeFit,
    curve_above_minimum,
    from_slope_coordinate,
    slope_coordinate,
)
from megatron_mup.transfer.fits.tails import two_sided
from megatron_mup.transfer.fits.types import Estimate

# A bound this far (octaves) outside the points rests on the formula alone and is not reported.
_BEYOND = 1.0


@dataclass(frozen=True)
class Profile:
    """What the data say of the asymmetry, and the noise to judge it by.

    Attributes:
        excess: (K,) rise of the residual sum of squares above its minimum over k, of all curves
            that share the asymmetry, in units of the noise variance.
        best: index of the asymmetry with the smallest residual.
        variance: noise variance of this curve, nats^2; None: unknown, no intervals.
        df: its degrees of freedom.
        level: of the intervals, such as 0.9.
    """

    excess: Array
    best: int
    variance: float | None
    df: float
    level: float

    @property
    def quantile(self) -> float:
        """Two-sided t quantile."""
        return two_sided(self.level, self.df)

    @property
    def slack(self) -> Array:
        """(K,) squared threshold left at each k; below 0: k is excluded."""
        return np.asarray(self.quantile**2 - self.excess)


def optimum(fit: ShapeFit, profile: Profile, window: tuple[float, float]) -> tuple[Estimate, float]:
    """Best learning rate, and the signed part of its error that a shared asymmetry causes.

    Args:
        fit: of the window.
        profile: of the asymmetry.
        window: lowest and highest log2 LR of the points.
    """
    value = float(fit.optimum[profile.best])
    if not window[0] <= value <= window[1]:
        return Estimate(value=None, reason=_no_minimum(profile)), 0.0
    if profile.variance is None:
        reason = f"interval not identifiable: {fit.design.learning_rates} points, no repeats"
        return Estimate(value=value, reason=reason), 0.0
    low, high = _fieller(fit, profile)
    reasons = []
    if low < window[0] - _BEYOND:
        low, reasons = -np.inf, ["no lower bound within reach of the points"]
    if high > window[1] + _BEYOND:
        high, reasons = np.inf, [*reasons, "no upper bound within reach of the points"]
    own, shared = _optimum_errors(fit, profile)
    if len(reasons) == 2:
        flat = "not identifiable: the curve is flat within the noise of its points"
        return Estimate(value=None, reason=flat), 0.0
    estimate = Estimate(
        value=value,
        low=float(low) if np.isfinite(low) else None,
        high=float(high) if np.isfinite(high) else None,
        reason=reasons[0] if reasons else None,
        error=float(np.hypot(own, shared)),
        df=profile.df,
    )
    return estimate, shared


def _no_minimum(profile: Profile) -> str:
    seen = "the fitted curve has no minimum among its points"
    return f"not identifiable: {seen}" + ("" if profile.variance else " (no repeats)")


def _fieller(fit: ShapeFit, profile: Profile) -> tuple[float, float]:
    """Ends of the union over k of Fieller's intervals, log2 LR; infinite where unbounded."""
    assert profile.variance is not None
    slack = profile.slack
    kept = slack >= 0.0
    threshold = slack[kept] * profile.variance
    b, c, k = fit.b[kept], fit.c[kept], fit.design.asymmetries[kept]
    covariance = fit.design.covariance[kept]
    vbb, vbc, vcc = covariance[:, -2, -2], covariance[:, -2, -1], covariance[:, -1, -1]
    square, half, constant = c**2 - threshold * vcc, b * c - threshold * vbc, b**2 - threshold * vbb
    if np.any(square <= 0.0) or np.any(c <= 0.0):
        return -np.inf, np.inf
    root = np.sqrt(np.maximum(half**2 - square * constant, 0.0))
    low = from_slope_coordinate((-half - root) / square, k)
    high = from_slope_coordinate((-half + root) / square, k)
    return fit.design.centre + float(low.min()), fit.design.centre + float(high.max())


def _optimum_errors(fit: ShapeFit, profile: Profile) -> tuple[float, float]:
    """Standard error of the optimum at the best k, and the change of the optimum with k."""
    assert profile.variance is not None
    at, covariance = profile.best, fit.design.covariance[profile.best]
    k = fit.design.asymmetries[at : at + 1]
    w = float(slope_coordinate(fit.optimum[at] - fit.design.centre, k)[0])
    slope_variance = covariance[-2, -2] + 2.0 * w * covariance[-2, -1] + w**2 * covariance[-1, -1]
    own = float(np.sqrt(profile.variance * slope_variance) / fit.curvature[at])
    return own, _spread_over_k(fit.optimum, profile)


def _spread_over_k(values: Array, profile: Profile) -> float:
    """Signed half-difference of a value between the ends of k's one-sigma range."""
    inside = np.flatnonzero((profile.excess <= 1.0) & np.isfinite(values))
    return float(values[inside[-1]] - values[inside[0]]) / 2.0 if inside.size else 0.0


def curvature(fit: ShapeFit, profile: Profile) -> Estimate:
    """Second derivative of the loss at the optimum, nats per octave^2."""
    value = float(fit.curvature[profile.best])
    if profile.variance is None:
        points = fit.design.learning_rates
        return Estimate(value=value, reason=f"not identifiable: {points} points, no repeats")
    k, covariance = fit.design.asymmetries, fit.design.covariance
    spread = 4.0 * covariance[:, -1, -1] - 4.0 * k * covariance[:, -2, -1]
    errors = np.sqrt(profile.variance * (spread + k**2 * covariance[:, -2, -2]))
    slack = profile.slack
    kept = slack >= 0.0
    half = np.sqrt(np.where(kept, slack, 0.0)) * errors
    return Estimate(
        value=value,
        low=float((fit.curvature - half)[kept].min()),
        high=float((fit.curvature + half)[kept].max()),
        error=float(np.hypot(errors[profile.best], _spread_over_k(fit.curvature, profile))),
        df=profile.df,
    )


def lowest_loss(fit: ShapeFit, profile: Profile) -> Estimate:
    """Loss at the optimum, expected over seeds; the interval holds the seeds' own variance."""
    at, seeds = profile.best, fit.design.seeds
    values = _losses_at_optimum(fit)
    value = float(values[at])
    if seeds < 2 or profile.variance is None:
        why = (
            "with one seed: the spread between seeds is unknown" if seeds < 2 else "without repeats"
        )
        return Estimate(value=value, reason=f"interval not identifiable {why}")
    between, within = _loss_variances(fit, at, profile.variance)
    # Each component keeps its own quantile (Graybill and Wang 1980 in spirit): Satterthwaite's
    # common one is too small whenever the few seeds happen to agree.
    across = two_sided(profile.level, seeds - 1)
    kept = (profile.slack >= 0.0) & np.isfinite(values)
    share = np.where(kept, profile.slack / profile.quantile**2, 0.0)
    half = np.sqrt(share * (across**2 * between + profile.quantile**2 * within))
    variance = between + within
    return Estimate(
        value=value,
        low=float((values - half)[kept].min()),
        high=float((values + half)[kept].max()),
        error=float(np.hypot(np.sqrt(variance), _spread_over_k(values, profile))),
        df=variance**2 / (between**2 / (seeds - 1) + within**2 / profile.df),
    )


def _losses_at_optimum(fit: ShapeFit) -> Array:
    """(K,) mean over seeds of the curve at its minimum."""
    x = fit.optimum - fit.design.centre
    phi = 2.0 * curve_above_minimum(x, fit.design.asymmetries)
    return np.asarray(fit.levels.mean(axis=1) + fit.b * x + fit.c * phi)


def _loss_variances(fit: ShapeFit, at: int, noise: float) -> tuple[float, float]:
    """Variance of the loss at the optimum: what the seeds' levels show, and the noise beyond it.

    The levels' sample variance holds the seeds' own variance plus the noise of the levels'
    differences; the noise of their mean and of the curve comes on top. At the minimum the slope is
    0, so the error of the optimum itself does not enter to first order.
    """
    seeds, covariance = fit.design.seeds, fit.design.covariance[at]
    x = float(fit.optimum[at] - fit.design.centre)
    phi = 2.0 * float(curve_above_minimum(x, fit.design.asymmetries[at]))
    lever = np.array([*([1.0 / seeds] * seeds), x, phi])
    levels = covariance[:-2, :-2]
    contrasts = (np.trace(levels) - levels.sum() / seeds) / (seeds - 1)
    between = float(np.var(fit.levels[at], ddof=1)) / seeds
    within = noise * max(float(lever @ covariance @ lever) - float(contrasts) / seeds, 0.0)
    return between, within
