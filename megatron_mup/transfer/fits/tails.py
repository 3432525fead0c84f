"""Quantiles and tail probabilities, straight from scipy.special.

scipy.stats gives the same numbers a hundred times more slowly, and a report asks for thousands.
"""

from __future__ import annotations

import math

from scipy import special


def two_sided(level: float, df: float) -> float:
    """Student t quantile that holds ``level`` between its signs; normal for infinite df."""
    return one_sided(0.5 + level / 2.0, df)


def one_sided(level: float, df: float) -> float:
    """Student t quantile below which ``level`` lies."""
    if math.isinf(df):
        return float(special.ndtri(level))
    return float(special.stdtrit(df, level))


def f_tail(ratio: float, df: float, df_noise: float) -> float:
    """Chance of an F ratio at least this large; ratios below 0 are rounding."""
    return float(special.fdtrc(df, df_noise, max(ratio, 0.0)))


def chi2_tail(statistic: float, df: float) -> float:
    """Chance of a chi-square at least this large."""
    return float(special.chdtrc(df, statistic))
