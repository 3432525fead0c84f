"""Where each curve's minimum lies: windows, one asymmetry, noise, misfit, intervals.

Owns the order of the decisions, which docs/transfer_statistics.md states; the algebra is in
``shape`` and ``profile``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mup.errors import DataError
from megatron_mup.transfer.fits.asymmetry import Asymmetries, coarse_grid, profile_asymmetries
from megatron_mup.transfer.fits.edge import diverged_beside, edge_estimates
from megatron_mup.transfer.fits.noise import Noise, estimate_noise
from megatron_mup.transfer.fits.profile import curvature, lowest_loss, optimum
from megatron_mup.transfer.fits.shape import ShapeFit, design, fit_shape
from megatron_mup.transfer.fits.tails import f_tail
from megatron_mup.transfer.fits.types import Curve, Estimate, Minimum
from megatron_mup.transfer.fits.window import NARROW, WIDE, Grid, choose_window, read_grid

# Lack-of-fit tests (ours). A wrong alarm costs precision, a missed misfit costs coverage, so the
# one test over all curves is at an ordinary level; the many tests of single curves are stricter.
_MISFIT_TOGETHER, _MISFIT_ALONE = 0.05, 0.01


@dataclass
class _Piece:
    """One curve on its way through the fit."""

    curve: Curve
    grid: Grid
    window: tuple[float, ...]
    misfit: str | None = None
    narrowed: bool = False

    def fit(self, asymmetries: tuple[float, ...]) -> ShapeFit:
        """Fit the window's runs for each asymmetry."""
        runs = sorted(
            (x, seed, loss)
            for x, loss, seed in zip(
                self.curve.log2_lrs, self.curve.losses, self.curve.seeds, strict=True
            )
            if x in self.window
        )
        log2_lrs = tuple(run[0] for run in runs)
        prepared = design(log2_lrs, tuple(run[1] for run in runs), asymmetries)
        if not prepared.estimable:
            # Seeds that never meet at two learning rates have no level of their own.
            prepared = design(log2_lrs, tuple(0 for _ in runs), asymmetries)
        return fit_shape(prepared, np.array([run[2] for run in runs]))


@dataclass(frozen=True)
class _Fitted:
    """All curves that have a window, fitted together."""

    pieces: list[_Piece]
    noise: Noise
    asymmetries: Asymmetries


def fit_minima(curves: Sequence[Curve], *, level: float = 0.9) -> list[Minimum]:
    """Find the minimum of each curve, with noise and asymmetry shared between them.

    Args:
        curves: of one arm, one a size.
        level: of the intervals, two-sided.

    Returns:
        One minimum a curve, in the order given.

    Raises:
        DataError: a curve's columns differ in length, or the level is no probability.
    """
    if not 0.0 < level < 1.0:
        raise DataError(f"level = {level} of the intervals must lie between 0 and 1")
    pieces = [_start(curve) for curve in curves]
    together = _fit_together([piece for piece in pieces if piece.window], level)
    for narrowed in (False, True):
        if not _act_on_misfits(together, narrowed):
            break
        together = _fit_together(together.pieces, level)
    found = {id(piece): index for index, piece in enumerate(together.pieces)}
    return [
        _minimum(together, found[id(piece)])
        if id(piece) in found
        else _no_minimum(piece, together.noise, level)
        for piece in pieces
    ]


def _start(curve: Curve) -> _Piece:
    lengths = {len(curve.log2_lrs), len(curve.losses), len(curve.seeds)}
    if len(lengths) != 1:
        raise DataError(
            f"size {curve.size:g}: log2_lrs, losses and seeds have {len(curve.log2_lrs)}, "
            f"{len(curve.losses)} and {len(curve.seeds)} entries; give one of each per run"
        )
    grid = read_grid(curve)
    return _Piece(curve, grid, choose_window(grid, WIDE))


def _fit_together(pieces: list[_Piece], level: float) -> _Fitted:
    coarse = [piece.fit(coarse_grid()) for piece in pieces]
    noise = estimate_noise(coarse)
    fitters = [piece.fit for piece in pieces]
    return _Fitted(pieces, noise, profile_asymmetries(coarse, fitters, noise=noise, level=level))


def _act_on_misfits(together: _Fitted, narrowed: bool) -> bool:
    """Say which curves miss their points, and narrow their windows the first time.

    The curves share one shape, so a wrong shape shows in all of them together first.
    """
    everything = _misfit_chance(together, range(len(together.pieces)))
    changed = False
    for index, piece in enumerate(together.pieces):
        chance = _misfit_chance(together, [index])
        if everything >= _MISFIT_TOGETHER and chance >= _MISFIT_ALONE:
            continue
        words = f"the fitted curve misses its points (lack-of-fit test, p = {chance:.2g})"
        if chance >= _MISFIT_ALONE:
            words = f"the fitted curves of all sizes miss their points (p = {everything:.2g})"
        window = choose_window(piece.grid, NARROW)
        if narrowed or len(window) == len(piece.window):
            piece.misfit = f"{words}; do not trust the intervals"
            piece.narrowed = False
            continue
        piece.misfit = f"{words}; only points within {NARROW:g} octave of the lowest are used"
        piece.window, piece.narrowed = window, True
        changed = True
    return changed


def _misfit_chance(together: _Fitted, indices: Sequence[int]) -> float:
    """Chance of at least this lack of fit, if the curves were right; 1 without repeats."""
    noise, fits = together.noise, together.asymmetries.fits
    df = sum(fits[index].design.misfit_df for index in indices)
    if noise.source != "repeats" or noise.variances is None or df < 1:
        return 1.0
    total = 0.0
    for index in indices:
        at = together.asymmetries.profiles[index].best
        total += (float(fits[index].residual[at]) - fits[index].pure) / noise.variances[index]
    return f_tail(total / df, df, min(noise.df[index] for index in indices))


def _minimum(together: _Fitted, index: int) -> Minimum:
    piece, noise = together.pieces[index], together.noise
    fit, profile = together.asymmetries.fits[index], together.asymmetries.profiles[index]
    window = (piece.window[0], piece.window[-1])
    log2_lr, shared = optimum(fit, profile, window)
    missing = Estimate(value=None, reason="not identifiable: no optimum")
    found = log2_lr.value is not None
    best = piece.grid.best
    return Minimum(
        size=piece.curve.size,
        log2_lr=log2_lr,
        loss=lowest_loss(fit, profile) if found else missing,
        curvature=curvature(fit, profile) if found else missing,
        edge=None,
        window=window,
        points=len(piece.window),
        runs=fit.design.columns.shape[1],
        diverged=piece.grid.diverged_runs,
        noise=math.sqrt(noise.variances[index]) if noise.variances else None,
        misfit=piece.misfit,
        narrowed=piece.narrowed,
        lowest=(piece.grid.log2_lrs[best], piece.grid.means[best]),
        asymmetry=float(fit.design.asymmetries[profile.best]) if found else None,
        shared_error=shared if together.asymmetries.shared else 0.0,
        notes=_notes(together, index),
    )


def _notes(together: _Fitted, index: int) -> tuple[str, ...]:
    noise, fit = together.noise, together.asymmetries.fits[index]
    notes = []
    if noise.source == "residuals":
        notes.append("no repeats: the noise is the scatter about the fitted curves")
    if not noise.shared:
        notes.append("the noise differs between sizes: each has its own")
    if not together.asymmetries.shared:
        notes.append("the curves' asymmetry differs between sizes: each has its own")
    if len(set(together.pieces[index].curve.seeds)) > 1 and fit.design.seeds == 1:
        notes.append("no seed was run at several learning rates: the seeds' spread counts as noise")
    return tuple(notes)


def _no_minimum(piece: _Piece, noise: Noise, level: float) -> Minimum:
    """A curve whose lowest loss lies at an edge, or of which nothing ended well."""
    grid = piece.grid
    none = Estimate(value=None, reason="no learning rate at which every run ended well")
    log2_lr, loss, ends = none, none, (math.nan, math.nan)
    if grid.log2_lrs:
        ends = (grid.log2_lrs[0], grid.log2_lrs[-1])
        variance = noise.variances[0] if noise.variances and noise.shared else None
        df = noise.df[0] if variance is not None else 0.0
        log2_lr, loss = edge_estimates(grid, variance=variance, df=df, level=level)
    return Minimum(
        size=piece.curve.size,
        log2_lr=log2_lr,
        loss=loss,
        curvature=Estimate(value=None, reason=loss.reason),
        edge=grid.edge if grid.log2_lrs else None,
        beside=diverged_beside(grid) if grid.log2_lrs else None,
        window=ends,
        points=len(grid.log2_lrs),
        runs=sum(grid.counts),
        diverged=grid.diverged_runs,
        noise=math.sqrt(noise.variances[0]) if noise.variances and noise.shared else None,
        misfit=None,
        lowest=(grid.log2_lrs[grid.best], grid.means[grid.best]) if grid.log2_lrs else None,
    )
