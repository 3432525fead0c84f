"""Which runs a report is made of, and what it says of those that it lacks."""

import pytest

from megatron_mup.errors import ConfigError
from megatron_mup.transfer.report.source import reported, rows_of_sweep
from megatron_mup.transfer.sweep.cells import with_rate_and_seed
from tests.transfer.report.folders import TEN, folder_of, rows_of_cells
from tests.transfer.report.sample_rows import a_row
from tests.transfer.sweep.sweeps import cells_of


def test_runs_that_refinement_added_stay_and_those_on_other_shards_go(tmp_path):
    rows = rows_of_cells(TEN)
    cell = with_rate_and_seed(cells_of(**TEN)[0], log2_lr=-6.5, seed=4)
    added = a_row(cell=cell.id, arm="base", size=32.0, log2_lr=-6.5, seed=4)
    cell = with_rate_and_seed(cell, log2_lr=-7.5, seed=4)
    old = a_row(
        cell=cell.id,
        arm="base",
        size=32.0,
        log2_lr=-7.5,
        seed=4,
        data_sha256="e" * 64,
        started="2026-01-01T00:00:00+00:00",
    )
    folder_of(tmp_path, TEN, [])

    kept, notes = rows_of_sweep(tmp_path, [*rows, added, old])

    assert kept == [*rows, added]
    assert notes == [
        "1 of 12 rows are left out: on other shards than the run that started last (column "
        "data_sha256)"
    ]
    assert rows_of_sweep(tmp_path, [*rows, added]) == ([*rows, added], [])


def test_a_yaml_that_cannot_be_read_any_more_leaves_all_rows(tmp_path):
    rows = rows_of_cells(TEN)
    assert rows_of_sweep(tmp_path, rows) == (rows, [])
    (tmp_path / "sweep.yaml").write_text("name: x\nstairs: {}\n")
    kept, (note,) = rows_of_sweep(tmp_path, rows)
    assert kept == rows
    assert note.startswith("all 10 rows are used: sweep.yaml cannot be read (")
    assert "stairs" in note


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (["width"], "--column 'width' must be NAME=COLUMN"),
        (["width="], "must be NAME=COLUMN"),
        (["lr=a", "lr=b"], "--column lr is given twice: a and b"),
    ],
)
def test_columns_in_another_form_are_refused(tmp_path, columns, words):
    (tmp_path / "t.csv").touch()
    with pytest.raises(ConfigError, match=words):
        reported(tmp_path / "t.csv", columns)
