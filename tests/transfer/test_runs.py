"""The table of runs: its columns, what an interruption leaves, Parquet."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mup.errors import DataError
from megatron_mup.transfer.runs import (
    COLUMNS,
    Row,
    Status,
    append_row,
    read_rows,
    write_parquet,
)

ROW = Row(
    sweep="widths",
    cell="0123456789ab",
    arm="mup",
    axis="width",
    size=64.0,
    log2_lr=-5.5,
    seed=1,
    settings={"optimizer.weight_decay": "0.1"},
    status=Status.FINISHED,
    validation_loss=0.1 + 0.2,
    train_loss=3.25,
    steps=10,
    planned_steps=10,
    tokens=1280,
    parameters=4096,
    non_embedding_parameters=1024,
    validation_tokens=256,
    loss_spikes=2,
    seconds=1.5,
    config_sha256="0123456789ab" + "0" * 52,
    data_sha256="d" * 64,
    commit="abc+",
    version="0.1.0",
    torch="2.11.0",
    megatron_core="0.19.2",
    machine='NVIDIA "H100", 80 GB',
    started="2026-01-02T03:04:05+00:00",
)
DIVERGED = replace(
    ROW, cell="ba9876543210", status=Status.DIVERGED, validation_loss=math.nan, train_loss=math.nan
)


def test_columns_are_those_of_the_format() -> None:
    assert ",".join(COLUMNS) == (
        "sweep,cell,arm,axis,size,log2_lr,seed,settings,status,validation_loss,train_loss,steps,"
        "planned_steps,tokens,parameters,non_embedding_parameters,validation_tokens,loss_spikes,"
        "seconds,config_sha256,data_sha256,commit,version,torch,megatron_core,machine,started"
    )


@pytest.mark.parametrize("name", ["runs.csv", "runs.parquet"])
def test_rows_come_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("csv"):
        for row in (ROW, DIVERGED):
            append_row(path, row)
        assert path.read_text().splitlines()[1].startswith("widths,0123456789ab,mup,width,64.0,")
    else:
        write_parquet(path, [ROW, DIVERGED])
    first, second = read_rows(path)
    assert first == ROW
    assert first.validation_loss == 0.30000000000000004
    assert second.status is Status.DIVERGED
    assert math.isnan(second.validation_loss)
    assert math.isnan(second.train_loss)


def test_a_missing_or_empty_table_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "runs.csv") == []
    (tmp_path / "runs.csv").touch()
    assert read_rows(tmp_path / "runs.csv") == []


def test_of_a_cell_that_is_there_twice_the_last_row_counts(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    failed = replace(ROW, status=Status.FAILED)
    for row in (failed, DIVERGED, ROW):
        append_row(path, row)
    assert [(row.cell, row.status) for row in read_rows(path)] == [
        ("0123456789ab", "finished"),
        ("ba9876543210", "diverged"),
    ]


@pytest.mark.parametrize("cut", [1, 20, 300])
def test_a_cut_last_line_is_dropped_and_replaced_by_the_next(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "runs.csv"
    append_row(path, ROW)
    append_row(path, DIVERGED)
    path.write_bytes(path.read_bytes()[:-cut])
    assert [row.cell for row in read_rows(path)] == ["0123456789ab"]
    other = replace(ROW, cell="aaaaaaaaaaaa")
    append_row(path, other)
    assert [row.cell for row in read_rows(path)] == ["0123456789ab", "aaaaaaaaaaaa"]
    assert len(path.read_text().splitlines()) == 3


def test_a_table_whose_header_was_cut_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("sweep,cell,ar")
    assert read_rows(path) == []
    append_row(path, ROW)
    assert read_rows(path) == [ROW]


def test_other_columns_are_refused_with_both_lists(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("width,lr,loss\n64,0.1,3\n")
    with pytest.raises(DataError, match=r"has the columns width, lr, loss; .* sweep, cell, arm"):
        read_rows(path)
    with pytest.raises(DataError, match=r"has the columns width, lr, loss"):
        append_row(path, ROW)
    assert path.read_text() == "width,lr,loss\n64,0.1,3\n"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("finished", "half", r"line 2 is no run of this version \('half' is not a valid Status"),
        (",-5.5,", ",fast,", r"line 2 is no run of this version \(could not convert"),
        (",mup,", ",mup,extra,", r"line 2 has 28 values for 27 columns"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "runs.csv"
    append_row(path, ROW)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=words):
        read_rows(path)
