"""The proxies' runs as minima, verdict and prediction. Pure: no files, no printing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mup.errors import DataError
from megatron_mup.transfer.fits import (
    Estimate,
    Minimum,
    Verdict,
    fit_minima,
    judge,
    measure_transfer,
    predict_log2_lr,
)
from megatron_mup.transfer.report.study import curves_of
from megatron_mup.transfer.runs import Row
from megatron_mup.transfer.sweep.cells import Cell, with_rate_and_seed


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What the proxies say.

    Attributes:
        minima: one a width, increasing.
        verdict: whether the learning rate transfers over them.
        prediction: log2 of the peak learning rate at the target's width.
        runs: number of runs that went into it.
    """

    minima: tuple[Minimum, ...]
    verdict: Verdict
    prediction: Estimate
    runs: int


def own_rows(rows: Sequence[Row], cells: Sequence[Cell]) -> list[Row]:
    """Rows of the arm's runs, those that a refinement added included.

    Args:
        rows: of the sweep's table; it may hold rows of an earlier YAML.
        cells: the arm's.
    """
    curves = {cell.size: cell for cell in cells}
    return [row for row in rows if row.size in curves and _is_of(row, curves[row.size])]


def _is_of(row: Row, cell: Cell) -> bool:
    if row.arm != cell.arm:
        return False
    return with_rate_and_seed(cell, log2_lr=row.log2_lr, seed=row.seed).id == row.cell


def fit_proxies(rows: Sequence[Row], width: float, *, level: float) -> Fit:
    """Fit the runs of an arm and predict for a width.

    Args:
        rows: of the arm.
        width: hidden size of the target.
        level: probability that the intervals hold.

    Raises:
        DataError: no run finished or diverged.
    """
    curves = curves_of(rows)
    if not curves:
        raise DataError(
            "no proxy finished or diverged, so there is nothing to fit; 'megatron-mup sweep "
            "status' says how they ended"
        )
    minima = fit_minima(curves, level=level)
    return Fit(
        minima=tuple(minima),
        verdict=judge(measure_transfer(minima, curves, level=level)),
        prediction=predict_log2_lr(minima, width, level=level),
        runs=sum(len(curve.losses) for curve in curves),
    )
