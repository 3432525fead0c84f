"""The record of one run and the table of runs: ``runs.csv``, ``runs.parquet``.

A format, so the columns are written out in the order of ``Row`` and other columns are refused. One
process appends; a row that an interruption cut is dropped. Tables that other programs wrote are
read with a mapping of their columns. Must not import torch or megatron.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
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
    rows = [_row(values, f"{path}, row {number}") for number, values in enumerate(records, 1)]
    return list({row.cell: row for row in rows}.values())


def _csv_records(path: Path) -> list[dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the table '{path}': {error}; give a CSV file") from error
    # Without its newline the last line is what an interrupted write left.
    lines = list(csv.reader(StringIO(text[: text.rfind("\n") + 1])))
    if not lines:
        return []
    _check_columns(path, lines[0])
    for number, line in enumerate(lines[1:], 1):
        if len(line) != len(COLUMNS):
            raise DataError(
                f"{path}, row {number} has {len(line)} values for {len(COLUMNS)} columns; remove it"
            )
    return [dict(zip(COLUMNS, line, strict=True)) for line in lines[1:]]


def _check_columns(path: Path, found: Sequence[str]) -> None:
    if tuple(found) != COLUMNS:
        raise DataError(
            f"{path} has the columns {', '.join(found)}; this version's tables have "
            f"{', '.join(COLUMNS)}; move the file away, or name the columns of another program's "
            "table with --column"
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


def _parquet_records(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read the table '{path}': {error}; give runs.parquet") from error
    _check_columns(path, table.column_names)
    records: list[dict[str, Any]] = table.to_pylist()
    return records


AXES = ("width", "depth", "batch", "tokens")
"""What a sweep can scale."""

_FOREIGN = ("loss", "lr", "log2_lr", "size", *AXES, "arm", "seed", "steps", "seconds", "parameters")


def read_foreign(path: Path, mapping: Mapping[str, str]) -> list[Row]:
    """Runs of a CSV table that another program wrote, such as wandb's export.

    Args:
        path: the table.
        mapping: what -> its column. Needed are a size (``width``, ``depth``, ``batch`` or
            ``tokens``; ``size`` if it is none of them), ``lr`` or ``log2_lr``, and ``loss``; known
            are ``arm``, ``seed``, ``steps``, ``seconds`` and ``parameters``.

    Returns:
        One row a run; without the column the arm is "runs" and the seed 1. A loss that is empty or
        not finite is a diverged run.

    Raises:
        DataError: the table or a column is missing, or a value is no number.
    """
    _check_mapping(mapping)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in mapping.values() if name not in (reader.fieldnames or [])]
            if missing:
                raise DataError(
                    f"{path} has no column '{missing[0]}'; it has "
                    f"{', '.join(reader.fieldnames or [])}; correct --column"
                )
            return [
                _foreign_row(values, mapping, f"{path}, row {number}")
                for number, values in enumerate(reader, 1)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the table '{path}': {error}; give a CSV file") from error


def _check_mapping(mapping: Mapping[str, str]) -> None:
    unknown = [name for name in mapping if name not in _FOREIGN]
    if unknown:
        raise DataError(
            f"--column {unknown[0]}=...: '{unknown[0]}' is not known; use {', '.join(_FOREIGN)}"
        )
    for kind, names in {
        "a size": ("size", *AXES),
        "a learning rate": ("lr", "log2_lr"),
        "the loss": ("loss",),
    }.items():
        given = [name for name in names if name in mapping]
        if len(given) != 1:
            raise DataError(
                f"{kind} must be given once as --column {names[0]}=NAME"
                + (f" (or {', '.join(names[1:])})" if names[1:] else "")
                + f"; given: {', '.join(given) or 'none'}"
            )


def _foreign_row(values: Mapping[str, str], mapping: Mapping[str, str], origin: str) -> Row:
    def number(name: str, default: float = 0.0) -> float:
        if name not in mapping:
            return default
        try:
            return float(values[mapping[name]])
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{origin}: {name} ('{mapping[name]}') is {values[mapping[name]]!r}, no number"
            ) from error

    size = next(name for name in ("size", *AXES) if name in mapping)
    loss = number("loss") if values[mapping["loss"]] else math.nan
    rate = number("lr", 1.0)
    if not 0 < rate < math.inf:
        raise DataError(f"{origin}: the learning rate is {rate}; it must be positive and finite")
    # Every line is a run of its own: repeated runs need not name their seeds.
    digest = hashlib.sha256(json.dumps([origin, dict(values)]).encode()).hexdigest()
    found = {
        "sweep": origin.rpartition(",")[0],
        "cell": digest[:12],
        "config_sha256": digest,
        "arm": values[mapping["arm"]] if "arm" in mapping else "runs",
        "axis": "width" if size == "size" else size,
        "size": number(size),
        "log2_lr": number("log2_lr", math.log2(rate)),
        "seed": int(number("seed", 1)),
        "status": Status.FINISHED if math.isfinite(loss) else Status.DIVERGED,
        "validation_loss": loss if math.isfinite(loss) else math.nan,
        "steps": int(number("steps")),
        "planned_steps": int(number("steps")),
        "tokens": int(number("tokens")),
        "parameters": int(number("parameters")),
        "seconds": number("seconds"),
    }
    return Row(**{**_UNKNOWN, **found})


_UNKNOWN: dict[str, Any] = {
    "settings": {},
    "train_loss": math.nan,
    "non_embedding_parameters": 0,
    "validation_tokens": 0,
    "loss_spikes": 0,
    **dict.fromkeys(("data_sha256", "commit", "version", "torch"), ""),
    **dict.fromkeys(("megatron_core", "machine", "started"), ""),
}
