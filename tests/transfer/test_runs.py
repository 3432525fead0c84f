"""The table of runs: its columns, what an interruption leaves, Parquet, tables of others."""

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
    read_foreign,
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
        ("finished", "half", r"row 1 is no run of this version \('half' is not a valid Status"),
        (",-5.5,", ",fast,", r"row 1 is no run of this version \(could not convert"),
        (",mup,", ",mup,extra,", r"row 1 has 28 values for 27 columns"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "runs.csv"
    append_row(path, ROW)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=words):
        read_rows(path)


_WANDB = (
    '"Name","n_embd","learning_rate","val/loss","_runtime"\n'
    '"calm","256","0.0009765625","3.125","12.5"\n'
    '"wild","256","0.5","NaN","2"\n'
    '"cut","512","1e-3","","2"\n'
)
_COLUMNS = {"width": "n_embd", "lr": "learning_rate", "loss": "val/loss"}


def test_an_export_of_wandb_is_read_with_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "export.csv"
    path.write_text(_WANDB, encoding="utf-8-sig")
    rows = read_foreign(path, _COLUMNS | {"arm": "Name", "seconds": "_runtime"})
    assert [(row.axis, row.size, row.arm, row.seed) for row in rows] == [
        ("width", 256.0, "calm", 1),
        ("width", 256.0, "wild", 1),
        ("width", 512.0, "cut", 1),
    ]
    assert (rows[0].log2_lr, rows[0].validation_loss, rows[0].seconds) == (-10.0, 3.125, 12.5)
    assert [row.status.value for row in rows] == ["finished", "diverged", "diverged"]
    assert len({row.cell for row in rows}) == 3


def test_repeated_runs_of_a_foreign_table_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("batch,log2,loss\n8,-3,2.5\n8,-3,2.5\n")
    rows = read_foreign(path, {"batch": "batch", "log2_lr": "log2", "loss": "loss"})
    assert [(row.axis, row.log2_lr, row.arm) for row in rows] == [("batch", -3.0, "runs")] * 2
    assert len({row.cell for row in rows}) == 2


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"width": "n_embd", "lr": "rate", "loss": "val/loss"}, r"no column 'rate'; it has Name"),
        (
            {"width": "n_embd", "loss": "val/loss"},
            r"a learning rate must be given once as --column",
        ),
        ({"lr": "learning_rate", "loss": "val/loss"}, r"a size .*given: none"),
        (_COLUMNS | {"depth": "n_embd"}, r"a size .*given: width, depth"),
        (_COLUMNS | {"speed": "n_embd"}, r"--column speed=\.\.\.: 'speed' is not known"),
        (_COLUMNS | {"width": "Name"}, r"row 1: width \('Name'\) is 'calm', no number"),
        (_COLUMNS | {"lr": "_runtime", "width": "n_embd"}, None),
    ],
)
def test_what_a_foreign_table_lacks_is_named(
    tmp_path: Path, mapping: dict[str, str], words: str | None
) -> None:
    path = tmp_path / "export.csv"
    path.write_text(_WANDB)
    if words is None:
        path.write_text(_WANDB.replace('"12.5"', '"0"'))
        words = r"row 1: the learning rate is 0.0; it must be positive"
    with pytest.raises(DataError, match=words):
        read_foreign(path, mapping)
    with pytest.raises(DataError, match="cannot read the table"):
        read_foreign(tmp_path / "absent.csv", _COLUMNS)
