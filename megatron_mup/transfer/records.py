"""The record of a set of runs: one CSV row a run, appended as each run ends."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_mup.errors import DataError


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        parameterization: rule set, ``mup`` or ``sp``.
        width: hidden size.
        log2_lr: log2 of the base learning rate.
        seed: seed of weights and data order.
        steps: optimizer steps.
    """

    parameterization: str
    width: int
    log2_lr: float
    seed: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """Outcome of one run; losses in nats per token, NaN where it diverged."""

    cell: Cell
    validation_loss: float
    train_loss: float
    diverged: bool
    parameters: int
    tokens: int
    seconds: float
    commit: str


# Written out and not derived from the classes: the file is a format, and a renamed attribute must
# not change it unnoticed.
_COLUMNS = (
    "parameterization",
    "width",
    "log2_lr",
    "seed",
    "steps",
    "validation_loss",
    "train_loss",
    "diverged",
    "parameters",
    "tokens",
    "seconds",
    "commit",
)


def append_record(path: Path, record: Record) -> None:
    """Append one row and flush it to the disk; the first row brings the header.

    A file that an interruption left without a final newline gets one first.
    """
    values = asdict(record)
    row = {**values.pop("cell"), **values}
    # An empty file counts as absent: its header was lost with an interrupted first write.
    exists = path.exists() and path.stat().st_size > 0
    with path.open("a+b") as raw:
        if exists:
            # The cut row stays as a line of its own, which reading drops.
            raw.seek(-1, os.SEEK_END)
            if raw.read(1) != b"\n":
                raw.write(b"\n")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        if not exists:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        # A row is minutes of training; a power cut must not take it.
        os.fsync(file.fileno())


def read_records(path: Path) -> list[Record]:
    """Rows of a record file; an incomplete last row (an interrupted write) is dropped.

    Raises:
        DataError: the columns are not those of this version.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is not None and tuple(reader.fieldnames) != _COLUMNS:
            raise DataError(
                f"{path} has columns {reader.fieldnames}; this version writes {list(_COLUMNS)}; "
                "move the file away or choose another folder"
            )
        return [_parse(row) for row in reader if all(row[name] for name in _COLUMNS)]


def _parse(row: Mapping[str, str]) -> Record:
    return Record(
        cell=Cell(
            row["parameterization"],
            int(row["width"]),
            float(row["log2_lr"]),
            int(row["seed"]),
            int(row["steps"]),
        ),
        validation_loss=float(row["validation_loss"]),
        train_loss=float(row["train_loss"]),
        diverged=row["diverged"] == "True",
        parameters=int(row["parameters"]),
        tokens=int(row["tokens"]),
        seconds=float(row["seconds"]),
        commit=row["commit"],
    )
