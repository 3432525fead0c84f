"""The fitted curve: a parabola in log2 LR that may be steeper on one side.

Notation: x = log2 LR, d = x - v the distance from the optimum v in octaves, h the curvature there,
k the asymmetry per octave. The curve is (ours)

    loss = level + h (e^(k d) - k d - 1) / k^2  =  level + h (d^2 / 2 + k d^3 / 6 + ...),

a parabola for k = 0. For a given k it is linear in (levels of the seeds, b, c) with the columns x
and phi_k(x) = 2 (e^(k x) - k x - 1) / k^2, so that everything at a given k is least squares; k is
profiled over a grid. Owns the algebra of one window; knows nothing of several curves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Below this asymmetry the series is exact to rounding and the quotient is not.
_SMALL = 1e-4


def curve_above_minimum(distance: Array | float, asymmetry: Array | float) -> Array:
    """Loss above the minimum at curvature 1: (e^(k d) - k d - 1) / k^2.

    Args:
        distance: d, octaves.
        asymmetry: k, per octave; broadcast against ``distance``.
    """
    d, k = np.broadcast_arrays(np.asarray(distance, float), np.asarray(asymmetry, float))
    small = np.abs(k) < _SMALL
    safe = np.where(small, 1.0, k)
    exact = (np.expm1(safe * d) - safe * d) / safe**2
    return np.asarray(np.where(small, d**2 / 2 + k * d**3 / 6, exact))


def slope_coordinate(x: Array | float, asymmetry: Array) -> Array:
    """w(x) = 2 (e^(k x) - 1) / k: the slope of the curve is b + c w."""
    small = np.abs(asymmetry) < _SMALL
    safe = np.where(small, 1.0, asymmetry)
    return np.asarray(np.where(small, 2.0 * np.asarray(x), 2.0 * np.expm1(safe * x) / safe))


def from_slope_coordinate(w: Array, asymmetry: Array) -> Array:
    """Invert ``slope_coordinate``; minus (plus) infinity where no x has the slope."""
    small = np.abs(asymmetry) < _SMALL
    safe = np.where(small, 1.0, asymmetry)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.log1p(np.maximum(safe * w / 2.0, -1.0)) / safe
    return np.asarray(np.where(small, w / 2.0, inverse))


@dataclass(frozen=True)
class Design:
    """Least squares of one window for K asymmetries, N runs, S seeds.

    Attributes:
        asymmetries: (K,).
        centre: log2 LR that is x = 0.
        columns: (K, N, S + 2).
        solve: (K, S + 2, N), from losses to coefficients.
        covariance: (K, S + 2, S + 2), of the coefficients at unit noise.
        pure_error: (N, N), projector on what neither seed nor learning rate explains.
        pure_df: its rank.
        learning_rates: distinct ones.
        estimable: whether the runs can tell the curve from the seeds' levels.
    """

    asymmetries: Array
    centre: float
    columns: Array
    solve: Array
    covariance: Array
    pure_error: Array
    pure_df: int
    learning_rates: int
    estimable: bool

    @property
    def seeds(self) -> int:
        """Number of seeds in the window."""
        return int(self.columns.shape[2]) - 2

    @property
    def residual_df(self) -> int:
        """Degrees of freedom left by the curve at a given asymmetry."""
        return int(self.columns.shape[1] - self.columns.shape[2])

    @property
    def misfit_df(self) -> int:
        """Those of them that are not pure error."""
        return self.residual_df - self.pure_df


@lru_cache(maxsize=512)
def design(
    log2_lrs: tuple[float, ...], seeds: tuple[int, ...], asymmetries: tuple[float, ...]
) -> Design:
    """Prepare a window's least squares; cached, because sizes mostly share one grid.

    Args:
        log2_lrs: of each run; at least 3 distinct ones.
        seeds: of each run.
        asymmetries: the grid of k.
    """
    centre = 0.5 * (min(log2_lrs) + max(log2_lrs))
    x = np.array(log2_lrs) - centre
    k = np.array(asymmetries)
    dummies = _dummies(np.array(seeds))
    phi = 2.0 * curve_above_minimum(x[None, :], k[:, None])
    shared = np.broadcast_to(np.column_stack([dummies, x]), (len(k), len(x), dummies.shape[1] + 1))
    columns = np.concatenate([shared, phi[:, :, None]], axis=2)
    solve = np.linalg.pinv(columns)
    additive = np.column_stack([dummies, _dummies(x)])
    pure_error = np.eye(len(x)) - additive @ np.linalg.pinv(additive)
    return Design(
        asymmetries=k,
        centre=centre,
        columns=columns,
        solve=solve,
        covariance=solve @ solve.transpose(0, 2, 1),
        pure_error=pure_error,
        pure_df=round(float(np.trace(pure_error))),
        learning_rates=len(set(log2_lrs)),
        estimable=bool(np.linalg.matrix_rank(columns[0]) == columns.shape[2]),
    )


def _dummies(labels: NDArray[np.generic]) -> Array:
    return np.asarray(labels[:, None] == np.unique(labels)[None, :], dtype=np.float64)


@dataclass(frozen=True)
class ShapeFit:
    """One window's fit for every asymmetry of its design.

    Attributes:
        design: the design.
        levels: (K, S) level of each seed.
        b: (K,) coefficient of x.
        c: (K,) coefficient of phi.
        residual: (K,) residual sum of squares.
        pure: sum of squares of pure error.
    """

    design: Design
    levels: Array
    b: Array
    c: Array
    residual: Array
    pure: float

    @property
    def curvature(self) -> Array:
        """(K,) second derivative at the optimum, 2 c - k b; not positive: no minimum."""
        return 2.0 * self.c - self.design.asymmetries * self.b

    @property
    def optimum(self) -> Array:
        """(K,) log2 LR of the minimum; not finite where the curve has none."""
        with np.errstate(divide="ignore", invalid="ignore"):
            w = np.where(self.c > 0, -self.b / self.c, np.nan)
        found = from_slope_coordinate(w, self.design.asymmetries)
        return self.design.centre + np.where(self.curvature > 0, found, np.nan)


def fit_shape(design_: Design, losses: Array) -> ShapeFit:
    """Fit one window.

    Args:
        design_: of the window's runs.
        losses: (N,) in the design's order.
    """
    # The mean goes first: sums of squares of losses near 3 would lose the digits of noise.
    mean = float(losses.mean())
    y = losses - mean
    coefficients = design_.solve @ y
    residuals = y - np.einsum("knp,kp->kn", design_.columns, coefficients)
    return ShapeFit(
        design=design_,
        levels=coefficients[:, :-2] + mean,
        b=coefficients[:, -2],
        c=coefficients[:, -1],
        residual=np.einsum("kn,kn->k", residuals, residuals),
        pure=float(y @ design_.pure_error @ y),
    )
