"""One asymmetry for all curves of a set, as far as the data allow; its likelihood profile.

The shape of a real curve cannot be told from five points of one size, but it hardly changes between
sizes: shared, it costs the optimum little precision, and what it costs is common to all sizes and
drops out of their differences. Owns the grid of asymmetries and the test whether they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mup.transfer.fits.noise import Noise, floor
from megatron_mup.transfer.fits.profile import Profile
from megatron_mup.transfer.fits.shape import Array, ShapeFit
from megatron_mup.transfer.fits.tails import f_tail, two_sided

# Asymmetries k that are considered, per octave (assumption): at 1 the loss rises 3.9 times as much
# 2 octaves right of the optimum as 2 octaves left of it, at -0.5 half as much.
LOWEST, HIGHEST = -0.5, 1.0
_STEPS = 30
_FINE_STEPS = 40
# F test of one asymmetry against one per curve (ours).
_DIFFERENT = 0.05
# The profile counts as resolved when so many points of its grid lie inside the interval.
_RESOLVED, _REFINEMENTS = 8, 4
# Below this rise, in units of the noise variance, two asymmetries fit equally well.
_INDIFFERENT = 1e-3

Fitter = Callable[[tuple[float, ...]], ShapeFit]


@dataclass(frozen=True)
class Asymmetries:
    """Result for a set of curves.

    Attributes:
        fits: of each curve on the grid of its profile.
        profiles: of each curve.
        shared: whether all curves have one asymmetry.
    """

    fits: list[ShapeFit]
    profiles: list[Profile]
    shared: bool


def coarse_grid() -> tuple[float, ...]:
    """Asymmetries of the first pass."""
    return tuple(float(k) for k in np.linspace(LOWEST, HIGHEST, _STEPS + 1))


def profile_asymmetries(
    coarse: Sequence[ShapeFit], fitters: Sequence[Fitter], *, noise: Noise, level: float
) -> Asymmetries:
    """Profile the asymmetry of a set of curves.

    Args:
        coarse: their fits on ``coarse_grid``.
        fitters: refit a curve on another grid.
        noise: of the curves.
        level: of the intervals.
    """
    if not coarse:
        return Asymmetries([], [], shared=True)
    shared = not _differ(coarse, noise)
    groups = [list(range(len(coarse)))] if shared else [[index] for index in range(len(coarse))]
    fits, profiles = {}, {}
    for group in groups:
        unit = [_variance(coarse, noise, index) for index in group]
        threshold = max(_quantile(noise, index, level) for index in group) ** 2
        start, members = [coarse[index] for index in group], [fitters[index] for index in group]
        refined, excess = _refine(start, members, unit, threshold)
        for index, fit in zip(group, refined, strict=True):
            fits[index] = fit
            profiles[index] = Profile(
                excess=excess,
                best=_best(excess, fit.design.asymmetries),
                variance=noise.variances[index] if noise.variances else None,
                df=noise.df[index],
                level=level,
            )
    order = range(len(coarse))
    return Asymmetries([fits[i] for i in order], [profiles[i] for i in order], shared)


def _variance(fits: Sequence[ShapeFit], noise: Noise, index: int) -> float:
    return noise.variances[index] if noise.variances else floor(fits)


def _quantile(noise: Noise, index: int, level: float) -> float:
    return two_sided(level, noise.df[index]) if noise.variances else 1.0


def _refine(
    fits: Sequence[ShapeFit], fitters: Sequence[Fitter], unit: Sequence[float], threshold: float
) -> tuple[Sequence[ShapeFit], Array]:
    """Refit on finer grids until the interval of k is resolved."""
    for _ in range(_REFINEMENTS):
        excess = _excess(fits, unit)
        inside = np.flatnonzero(excess <= threshold)
        if inside.size >= _RESOLVED:
            break
        k = fits[0].design.asymmetries
        low, high = k[max(inside[0] - 1, 0)], k[min(inside[-1] + 1, k.size - 1)]
        grid = tuple(float(value) for value in np.linspace(low, high, _FINE_STEPS + 1))
        fits = [refit(grid) for refit in fitters]
    return fits, _excess(fits, unit)


def _excess(fits: Sequence[ShapeFit], unit: Sequence[float]) -> Array:
    total = np.sum([fit.residual / one for fit, one in zip(fits, unit, strict=True)], axis=0)
    return np.asarray(total - total.min())


def _best(excess: Array, asymmetries: Array) -> int:
    """Best fitting asymmetry; the one nearest to a parabola where the data do not tell."""
    candidates = np.flatnonzero(excess <= _INDIFFERENT)
    return int(candidates[np.argmin(np.abs(asymmetries[candidates]))])


def _differ(fits: Sequence[ShapeFit], noise: Noise) -> bool:
    """F test of one asymmetry for all against one each; needs noise from repeats."""
    told = [index for index, fit in enumerate(fits) if fit.design.learning_rates > 3]
    if noise.source != "repeats" or noise.variances is None or len(told) < 2:
        return False
    scaled = np.array([fits[index].residual / noise.variances[index] for index in told])
    gain = float(scaled.sum(axis=0).min() - scaled.min(axis=1).sum())
    df = min(noise.df[index] for index in told)
    return f_tail(gain / (len(told) - 1), len(told) - 1, df) < _DIFFERENT
