"""What runs next: the expensive first, further seeds near the first seed's minimum."""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_mup.transfer.runs import Row, Status
from megatron_mup.transfer.sweep.cells import Cell
from megatron_mup.transfer.sweep.order import SeedsNearMinimum, ended
from tests.transfer.sweep.sweeps import cells_of
from tests.transfer.test_runs import ROW

_RATES = [-8, -7, -6, -5, -4, -3]


def rows_of(cells: list[Cell], losses: dict[tuple[float, float], float]) -> dict[str, Row]:
    """Rows of the first seed's cells whose (size, log2 LR) has a loss; NaN is diverged."""
    rows = {}
    for cell in cells:
        loss = losses.get((cell.size, cell.log2_lr))
        if cell.seed == 1 and loss is not None:
            status = Status.DIVERGED if math.isnan(loss) else Status.FINISHED
            rows[cell.id] = replace(ROW, cell=cell.id, validation_loss=loss, status=status)
    return rows


def places(cells: list[Cell]) -> list[tuple[float, float, int]]:
    return [(cell.size, cell.log2_lr, cell.seed) for cell in cells]


def test_the_first_seed_runs_everywhere_and_the_largest_first() -> None:
    cells = cells_of(learning_rate={"log2": _RATES})
    strategy = SeedsNearMinimum(cells, 1)
    assert places(strategy.wanted({})) == [
        (size, rate, 1) for size in (64.0, 32.0) for rate in _RATES
    ]
    assert len(strategy.undecided({})) == 12


def test_further_seeds_wait_for_their_own_curve_and_stay_near_its_minimum() -> None:
    cells = cells_of(learning_rate={"log2": _RATES}, seeds=[1, 3, 2])
    strategy = SeedsNearMinimum(cells, 1)
    curve = zip(_RATES, [5, 4, 3, 3.5, math.nan, math.nan], strict=True)
    losses = {(32.0, rate): loss for rate, loss in curve}
    further = places(strategy.wanted(rows_of(cells, losses)))[12:]
    assert further == [(32.0, rate, seed) for seed in (3, 2) for rate in (-7.0, -6.0, -5.0)]
    assert {cell.size for cell in strategy.undecided(rows_of(cells, losses))} == {64.0}
    # One run of the curve is missing.
    del losses[(32.0, -3)]
    assert len(strategy.wanted(rows_of(cells, losses))) == 12


def test_without_a_range_further_seeds_run_everywhere_once_the_curve_is_done() -> None:
    cells = cells_of(learning_rate={"log2": _RATES})
    strategy = SeedsNearMinimum(cells, None)
    losses = {(64.0, float(rate)): 3.0 for rate in _RATES}
    assert len(strategy.wanted(rows_of(cells, losses))) == 18
    assert len(strategy.wanted({})) == 12


def test_a_curve_that_diverged_everywhere_gets_no_further_seeds() -> None:
    cells = cells_of(learning_rate={"log2": _RATES})
    losses = {(64.0, float(rate)): math.nan for rate in _RATES}
    for within in (2.0, None):
        assert len(SeedsNearMinimum(cells, within).wanted(rows_of(cells, losses))) == 12


def test_steps_that_are_no_binary_fractions_count_as_near() -> None:
    # -5.8 - 0.1 is a little above -5.9.
    cells = cells_of(learning_rate={"log2_min": -6.0, "log2_max": -5.6, "step": 0.1})
    losses = {(64.0, cell.log2_lr): abs(cell.log2_lr + 5.8) for cell in cells}
    wanted = SeedsNearMinimum(cells, 0.1).wanted(rows_of(cells, losses))
    assert len([cell for cell in wanted if cell.seed == 2]) == 3


def test_a_failed_cell_is_not_through() -> None:
    assert ended(ROW)
    assert ended(replace(ROW, status=Status.DIVERGED))
    assert ended(replace(ROW, status=Status.STOPPED_EARLY))
    assert not ended(replace(ROW, status=Status.FAILED))
    assert not ended(None)
