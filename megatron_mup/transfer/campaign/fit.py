"""The proxies' runs as minima, verdict and prediction. Pure: no files, no printing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
from megatron_mup.transfer.runs import Row, Status

VERDICT_LEVEL = 0.9
"""Of the minima's intervals and of those that the verdict reads: the level at which its coverage
was measured (docs/transfer_statistics.md). No option changes what counts as transfer."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """The learning rate next to a lowest loss at an edge, on the outer side.

    Attributes:
        log2_lr: of runs without a final loss.
        stopped: they were stopped early; otherwise one of them diverged.
    """

    log2_lr: float
    stopped: bool


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What the proxies say.

    Attributes:
        minima: one a width, increasing.
        verdict: whether the learning rate transfers over them.
        scatter: between the widths' optima beyond their errors, see ``Transfer``.
        prediction: log2 of the peak learning rate at the target's width.
        runs: number of runs that went into it.
        without_curve: widths of the sweep of which no run finished or diverged.
        neighbours: width -> what lies next to its lowest loss, where that is at an edge.
    """

    minima: tuple[Minimum, ...]
    verdict: Verdict
    scatter: float | None
    prediction: Estimate
    runs: int
    without_curve: tuple[float, ...] = ()
    neighbours: Mapping[float, Neighbour] = field(default_factory=dict)


def on_shards(rows: Sequence[Row], data_sha256: str) -> list[Row]:
    """Rows of runs on the sweep's present shards; a table may hold those of earlier ones.

    Args:
        rows: of the arm.
        data_sha256: of the shards.
    """
    return [row for row in rows if row.data_sha256 == data_sha256]


def fit_proxies(rows: Sequence[Row], width: float, *, widths: Sequence[float], level: float) -> Fit:
    """Fit the runs of an arm and predict for a width.

    Args:
        rows: of the arm.
        width: hidden size of the target.
        widths: of the sweep.
        level: probability that the prediction's interval holds; the verdict has a level of its own.

    Raises:
        DataError: no run finished or diverged.
    """
    curves = curves_of(rows)
    if not curves:
        raise DataError(
            "no proxy finished or diverged, so there is nothing to fit; 'megatron-mup sweep "
            "status' says how they ended"
        )
    minima = fit_minima(curves, level=VERDICT_LEVEL)
    known = {curve.size for curve in curves}
    transfer = measure_transfer(minima, curves, level=VERDICT_LEVEL)
    beside = {one.size: _neighbour(one, rows) for one in minima}
    return Fit(
        minima=tuple(minima),
        verdict=judge(transfer),
        scatter=transfer.scatter,
        prediction=predict_log2_lr(minima, width, level=level),
        runs=sum(len(curve.losses) for curve in curves),
        without_curve=tuple(one for one in widths if one not in known),
        neighbours={size: found for size, found in beside.items() if found is not None},
    )


def _neighbour(one: Minimum, rows: Sequence[Row]) -> Neighbour | None:
    """What lies next to a lowest loss at an edge; None where no learning rate was run there."""
    if one.edge is None or one.lowest is None:
        return None
    best, outwards = one.lowest[0], 1 if one.edge == "high" else -1
    ended = [
        row
        for row in rows
        if row.size == one.size
        and outwards * (row.log2_lr - best) > 0
        and row.status is not Status.FAILED
    ]
    if not ended:
        return None
    at = min((row.log2_lr for row in ended), key=lambda log2_lr: abs(log2_lr - best))
    lost = any(_diverged(row) for row in ended if row.log2_lr == at)
    return Neighbour(log2_lr=at, stopped=not lost)


def _diverged(row: Row) -> bool:
    """As the curves have it: a final loss that is not a number is a diverged run's."""
    if row.status is Status.FINISHED:
        return not math.isfinite(row.validation_loss)
    return row.status is Status.DIVERGED
