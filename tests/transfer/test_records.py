"""The record file survives interruptions and refuses what it cannot read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_mup.errors import DataError
from megatron_mup.transfer.records import Cell, Record, append_record, read_records


def record(log2_lr: float, loss: float = 3.25, *, diverged: bool = False) -> Record:
    """A record of a small run."""
    return Record(
        cell=Cell("mup", 64, log2_lr, 1, 200),
        validation_loss=math.nan if diverged else loss,
        train_loss=3.5,
        diverged=diverged,
        parameters=1000,
        tokens=4096,
        seconds=1.5,
        commit="0.1.0-abc",
    )


def test_records_are_read_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    for item in (record(-5.0), record(-4.5, 0.1 + 0.2)):
        append_record(path, item)
    assert read_records(path) == [record(-5.0), record(-4.5, 0.1 + 0.2)]


def test_a_diverged_run_is_a_row(tmp_path: Path) -> None:
    append_record(tmp_path / "runs.csv", record(-1.0, diverged=True))
    (found,) = read_records(tmp_path / "runs.csv")
    assert found.diverged
    assert math.isnan(found.validation_loss)


def test_an_interrupted_last_row_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    append_record(path, record(-5.0))
    path.write_text(path.read_text() + "mup,64,-4.0,1,2")
    assert read_records(path) == [record(-5.0)]
    append_record(path, record(-3.0))
    assert read_records(path) == [record(-5.0), record(-3.0)]


def test_no_file_has_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "runs.csv") == []


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("width,loss\n64,3.0\n")
    with pytest.raises(DataError, match="move the file away or choose another folder"):
        read_records(tmp_path / "runs.csv")
