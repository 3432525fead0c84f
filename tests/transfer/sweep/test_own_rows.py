"""Which rows of a table are of a sweep's runs."""

from __future__ import annotations

from dataclasses import replace

from megatron_mup.transfer.sweep.cells import with_rate_and_seed
from megatron_mup.transfer.sweep.own_rows import on_last_data, own_rows
from tests.transfer.sweep.sweeps import cells_of, row_of
from tests.transfer.test_runs import ROW


def test_rows_of_another_length_are_not_of_the_sweep() -> None:
    cells, longer = cells_of(), cells_of(tokens={"rule": "fixed_tokens", "tokens": 1200})
    rows = [row_of(cell) for cell in (*longer, *cells)]
    assert own_rows(rows, cells) == rows[8:]
    assert own_rows(rows, longer) == rows[:8]
    assert own_rows(rows[:8], cells) == []


def test_runs_that_a_refinement_added_are_of_the_sweep() -> None:
    cells = cells_of(
        arms={"a": {}, "b": {"clip_grad": 0.5}}, axes={"weight_decay": [0.0, 0.1]}, seeds=[1]
    )
    added = [with_rate_and_seed(cell, log2_lr=-6.5, seed=4) for cell in cells]
    rows = [row_of(cell) for cell in added]
    assert own_rows(rows, cells) == rows
    # What a row says of itself does not make it one.
    assert own_rows([replace(rows[0], log2_lr=-6.25)], cells) == []
    assert own_rows([replace(rows[0], size=128.0)], cells) == []
    assert own_rows([replace(rows[0], arm="b")], cells) == []


def test_a_rate_that_differs_in_its_last_digit_is_that_of_the_cell() -> None:
    cells = cells_of()
    row = replace(row_of(cells[0]), log2_lr=-6.999999999999999)
    assert own_rows([row], cells) == [row]


def test_rows_on_the_shards_of_the_last_run_are_kept() -> None:
    old = replace(ROW, data_sha256="a", started="2026-01-01T00:00:00+00:00")
    new = replace(ROW, data_sha256="b", started="2026-01-02T00:00:00+00:00")
    later = replace(ROW, data_sha256="b", started="2026-01-03T00:00:00+00:00")
    assert on_last_data([new, later, old]) == [new, later]
    assert on_last_data([]) == []
