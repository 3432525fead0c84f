"""How much one run's loss scatters beside its seed's own level, and how well that is known.

Owns the noise variance of a set of curves: from repeats (pure error of the additive model seed +
learning rate, which no curve's shape can spoil) or else from the residuals of the fitted curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_mup.transfer.fits.shape import ShapeFit
from megatron_mup.transfer.fits.tails import chi2_tail

# Fewer degrees of freedom of pure error than this say less than the residuals do (ours).
_ENOUGH_PURE = 4
# Bartlett's test must be this sure before the sizes stop sharing one noise (ours): at 5% one
# report in twenty would split for nothing and pay with wide t quantiles.
_DIFFERENT_NOISE = 0.01
# Losses are not better than this relative resolution; keeps exact data from dividing by zero.
_RESOLUTION = 1e-9


@dataclass(frozen=True)
class Noise:
    """Noise of each curve of a set.

    Attributes:
        variances: per curve, nats^2; None: nothing to estimate it from.
        df: degrees of freedom per curve.
        source: where it comes from.
        shared: whether all curves have one variance.
    """

    variances: tuple[float, ...] | None
    df: tuple[float, ...]
    source: Literal["repeats", "residuals", "nothing"]
    shared: bool = True


def floor(fits: Sequence[ShapeFit]) -> float:
    """Smallest variance that losses of this size can have, nats^2."""
    return float(_RESOLUTION * max(abs(float(fit.levels.mean())) for fit in fits)) ** 2


def estimate_noise(fits: Sequence[ShapeFit]) -> Noise:
    """Pool the noise over curves.

    Args:
        fits: of every curve that has a window, all on one grid of asymmetries.
    """
    if not fits:
        return Noise(None, (), "nothing")
    pure_df = [fit.design.pure_df for fit in fits]
    total = sum(pure_df)
    if total >= _ENOUGH_PURE:
        pure = [fit.pure for fit in fits]
        if _differ(pure, pure_df):
            own = tuple(max(ss / df, floor(fits)) for ss, df in zip(pure, pure_df, strict=True))
            return Noise(own, tuple(float(df) for df in pure_df), "repeats", shared=False)
        return _shared(fits, sum(pure) / total, total, "repeats")
    # One asymmetry is fitted to all curves together, as soon as one of them has points for it.
    fitted = any(fit.design.learning_rates > 3 for fit in fits)
    df = sum(fit.design.residual_df for fit in fits) - int(fitted)
    if df < 1:
        return Noise(None, tuple(0.0 for _ in fits), "nothing")
    residual = float(np.min(np.sum([fit.residual for fit in fits], axis=0)))
    return _shared(fits, residual / df, df, "residuals")


def _shared(
    fits: Sequence[ShapeFit], variance: float, df: int, source: Literal["repeats", "residuals"]
) -> Noise:
    value = max(variance, floor(fits))
    return Noise(tuple(value for _ in fits), tuple(float(df) for _ in fits), source)


def _differ(pure: Sequence[float], df: Sequence[int]) -> bool:
    """Bartlett's test of equal variances; needs repeats enough on every curve."""
    if len(pure) < 2 or min(df) < _ENOUGH_PURE or min(pure) <= 0.0:
        return False
    ss, nu = np.array(pure), np.array(df, dtype=float)
    pooled = ss.sum() / nu.sum()
    statistic = nu.sum() * np.log(pooled) - float(nu @ np.log(ss / nu))
    correction = 1.0 + (np.sum(1.0 / nu) - 1.0 / nu.sum()) / (3.0 * (len(pure) - 1))
    return chi2_tail(statistic / correction, len(pure) - 1) < _DIFFERENT_NOISE
