"""The record of one run and the table of runs: ``runs.csv``, ``runs.parquet``.

A format, so the columns are written out in the order of ``Row`` and other columns are refused. One
process appends; a row that an interruption cut is dropped. Tables that other programs wrote are
read by ``foreign_rows``. Must not import torch or megatron.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from io import StringIO
from pathlib import Path
from typing import Any

from megatron_mup.data.publication import published
from megatron_mup.errors import DataError


class Status(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    STOPPED_EARLY = "stopped_early"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run.

    Attributes:
        sweep: name in the YAML.
        cell: first 12 hex digits of ``config_sha256``.
        arm: name of the variant.
        axis: what is scaled: "width", "depth", "batch" or "tokens".
        size: value on that axis: hidden size, layers, sequences a batch, tokens.
        log2_lr: log2 of the peak base learning rate.
        seed: of weights and data order.
        settings: values on further axes, option -> value.
        status: how the run ended.
        validation_loss: nats per token on held-out text; NaN unless finished.
        train_loss: mean of the last tenth of the steps made, nats per token; NaN if diverged.
        steps: optimizer steps made.
        planned_steps: optimizer steps of the whole run.
        tokens: positions trained on.
        parameters: all of them, the vocabulary as padded.
        non_embedding_parameters: without the embedding and unembedding matrices.
        validation_tokens: positions of the evaluation.
        loss_spikes: steps whose loss stands out from the 20 before (our definition, see
            ``transfer.sweep.losses``).
        seconds: wall clock, attempts that were interrupted included.
        config_sha256: of the canonical configuration, see ``transfer.sweep.cells``.
        data_sha256: of the shards.
        commit: of this package; empty for an installed one.
        version: of this package.
        torch: its version.
        megatron_core: its version.
        machine: device or processor.
        started: UTC, ISO 8601.
    """

    sweep: str
    cell: str
    arm: str
    axis: str
    size: float
    log2_lr: float
    seed: int
    settings: Mapping[str, str]
    status: Status
    validation_loss: float
    train_loss: float
    steps: int
    planned_steps: int
    tokens: int
    parameters: int
    non_embedding_parameters: int
    validation_tokens: int
    loss_spikes: int
    seconds: float
    config_sha256: str
    data_sha256: str
    commit: str
    version: str
    torch: str
    megatron_core: str
    machine: str
    started: str


COLUMNS = tuple(field.name for field in fields(Row))
"""Of the table, in order."""


def _settings(value: str) -> dict[str, str]:
    data = json.loads(value)
    if not isinstance(data, dict):
        raise ValueError(f"settings is {value!r}, which is no JSON object")
    return {str(option): str(setting) for option, setting in data.items()}


_READERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "Status": Status,
    "Mapping[str, str]": _settings,
}
_READER_OF = {field.name: _READERS[str(field.type)] for field in fields(Row)}
# Numbers of a Parquet file are numbers; everything else is text as in the CSV.
_NUMBERS = {field.name: str(field.type) for field in fields(Row) if field.type in ("int", "float")}


def _values(row: Row) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in COLUMNS}
    values["settings"] = json.dumps(dict(row.settings), sort_keys=True)
    values["status"] = row.status.value
    return values


def _row(values: Mapping[str, Any], origin: str) -> Row:
    try:
        return Row(**{name: _READER_OF[name](values[name]) for name in COLUMNS})
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{origin} is no run of this version ({error}); remove that row or read the table with "
            "--column if another program wrote it"
        ) from error


def _csv_line(values: Iterable[Any]) -> str:
    buffer = StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(list(values))
    return buffer.getvalue()


def append_row(path: Path, row: Row) -> None:
    """Append one row to a CSV table and wait for the disk; the first row brings the header.

    What an interruption left of a last row is cut away first. One process at a time may append.

    Args:
        path: the table; made if missing.
        row: the run.

    Raises:
        DataError: the file has other columns.
    """
    line = _csv_line(_values(row).values()).encode()
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        file.truncate(len(whole))
        if whole:
            _check_columns(path, whole.split(b"\n", 1)[0].decode(errors="replace").split(","))
        else:
            line = _csv_line(COLUMNS).encode() + line
        file.write(line)
        file.flush()
        # A row is minutes of training; a power cut must not take it.
        os.fsync(file.fileno())


def table_text(rows: Iterable[Row]) -> str:
    """A whole CSV table with its header."""
    return "".join(map(_csv_line, [COLUMNS, *(_values(row).values() for row in rows)]))


def read_rows(path: Path) -> list[Row]:
    """Rows of a table, by suffix CSV or Parquet; of a cell that is there twice the last one.

    Args:
        path: ``runs.csv`` or ``runs.parquet``; a missing file has no rows.

    Returns:
        Rows, ordered by where a cell came first.

    Raises:
        DataError: other columns, or a row that cannot be read.
    """
    if not path.exists():
        return []
    records = _parquet_records(path) if path.suffix == ".parquet" else _csv_records(path)
    rows = [_row(values, f"{path}, {place}") for place, values in records]
    return list({row.cell: row for row in rows}.values())


def _csv_records(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Each record with its place, counted as an editor does."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the table '{path}': {error}; give a CSV file") from error
    # Without its newline the last line is what an interrupted write left.
    reader = csv.reader(StringIO(text[: text.rfind("\n") + 1]))
    lines = [(reader.line_num, line) for line in reader]
    if not lines:
        return []
    _check_columns(path, lines[0][1])
    for number, line in lines[1:]:
        if len(line) != len(COLUMNS):
            raise DataError(
                f"{path}, line {number} has {len(line)} values for {len(COLUMNS)} columns; remove "
                "it"
            )
    return [(f"line {n}", dict(zip(COLUMNS, line, strict=True))) for n, line in lines[1:]]


def _check_columns(path: Path, found: Sequence[str]) -> None:
    if tuple(found) != COLUMNS:
        raise DataError(
            f"{path} has the columns {', '.join(found)}; this version's tables have "
            f"{', '.join(COLUMNS)}; of another program's table name the columns, such as "
            "--column width=NAME --column lr=NAME --column loss=NAME --column seed=NAME; otherwise "
            "move the file away"
        )


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    """Write a table anew; it appears under its name when it is whole.

    Args:
        path: ``runs.parquet``.
        rows: all of its rows.
    """
    import pyarrow
    import pyarrow.parquet

    kinds = {"int": pyarrow.int64(), "float": pyarrow.float64()}
    schema = pyarrow.schema(
        [(name, kinds.get(_NUMBERS.get(name, ""), pyarrow.string())) for name in COLUMNS]
    )
    table = pyarrow.Table.from_pylist([_values(row) for row in rows], schema=schema)
    with published(path) as stream:
        pyarrow.parquet.write_table(table, stream)


def _parquet_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read the table '{path}': {error}; give runs.parquet") from error
    _check_columns(path, table.column_names)
    return [(f"row {number}", values) for number, values in enumerate(table.to_pylist(), 1)]


AXES = ("width", "depth", "batch", "tokens")
"""What a sweep can scale."""

_FINEST_STEP = 0.125
"""Octaves between learning rates of a grid, at the least; an assumption of ``look_like_rates``."""


def look_like_rates(log2_lrs: Sequence[float]) -> bool:
    """Whether what is called log2 of learning rates are learning rates themselves.

    Such as 0.001 and 0.01: all lie between 0 and 1, where logarithms would mean rates from 1 to 2,
    and not all on a grid of eighths, where someone may mean just that.

    Args:
        log2_lrs: as given.
    """
    return (
        bool(log2_lrs)
        and all(0 < value < 1 for value in log2_lrs)
        and any(value % _FINEST_STEP for value in log2_lrs)
    )
