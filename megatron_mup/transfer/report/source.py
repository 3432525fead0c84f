"""What a report is made of: the runs of a sweep's folder or of a table, and what to say of them.

A folder's ``sweep.yaml`` says which rows count. Fits and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mup.errors import ConfigError, DataError, MupError
from megatron_mup.transfer.foreign_rows import read_foreign
from megatron_mup.transfer.runs import Row, read_rows
from megatron_mup.transfer.sweep.cells import make_cells
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.own_rows import on_last_data, own_rows


@dataclass(frozen=True, kw_only=True)
class Reported:
    """Runs to report on.

    Attributes:
        rows: of these runs.
        notes: what was left out and what does not compare; in words.
        seeds_known: the table names the runs' seeds.
        table: that the runs come from, to be printed; empty: not said.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    seeds_known: bool = True
    table: str = ""


def reported(source: Path, columns: Sequence[str] = ()) -> Reported:
    """The runs to report on.

    Args:
        source: folder of a sweep, or a table.
        columns: ``NAME=COLUMN`` of another program's CSV; none for a table of this package.

    Raises:
        ConfigError: a column is named in another form, or twice.
        DataError: there is no table, it cannot be read, or it holds no run of the sweep.
    """
    table = table_of(source)
    if columns:
        theirs = read_foreign(table, _mapping(columns))
        return Reported(
            rows=theirs.rows,
            notes=theirs.notes,
            seeds_known=theirs.seeds_known,
            table=str(table),
        )
    rows = read_rows(table)
    notes: list[str] = []
    if source.is_dir():
        rows, notes = rows_of_sweep(source, rows)
    return Reported(rows=tuple(rows), notes=(*notes, *mixed_data(rows)), table=str(table))


def table_of(source: Path) -> Path:
    """The table to read: of a sweep's folder, or the file itself.

    Raises:
        DataError: there is none.
    """
    table = SweepFolder(source).table if source.is_dir() else source
    if not table.is_file():
        raise DataError(
            f"no table of runs at '{table}'; give the folder of 'megatron-mup sweep run --out', or "
            "a CSV or Parquet file"
        )
    return table


def _mapping(columns: Sequence[str]) -> dict[str, str]:
    """What -> its column."""
    mapping: dict[str, str] = {}
    for item in columns:
        name, equals, column = item.partition("=")
        if not (name and equals and column):
            raise ConfigError(f"--column '{item}' must be NAME=COLUMN, such as width=n_embd")
        if name in mapping:
            raise ConfigError(f"--column {name} is given twice: {mapping[name]} and {column}")
        mapping[name] = column
    return mapping


def rows_of_sweep(source: Path, rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Rows of the runs that a folder's ``sweep.yaml`` asks for.

    Args:
        source: the folder; without a ``sweep.yaml`` that can be read all rows are used.
        rows: of its table.

    Returns:
        The rows, and in words how many are left out and why.

    Raises:
        DataError: no row is of such a run.
    """
    folder = SweepFolder(source)
    if not folder.sweep_yaml.exists():
        return list(rows), []
    try:
        cells = make_cells(folder.read_sweep(), folder.data)
    except MupError as error:
        reason = " ".join(str(error).split())
        return list(rows), [f"all {len(rows)} rows are used: sweep.yaml cannot be read ({reason})"]
    own = own_rows(rows, cells)
    if rows and not own:
        raise DataError(
            f"none of the {len(rows)} rows of '{folder.table}' is of a run that the folder's "
            "sweep.yaml asks for; run the sweep, or give the table itself to report on all rows"
        )
    last = on_last_data(own)
    left_out = {
        "of no run that sweep.yaml asks for": len(rows) - len(own),
        "on other shards than the run that started last (column data_sha256)": len(own) - len(last),
    }
    said = [f"{count} of {len(rows)} rows are left out: {why}" for why, count in left_out.items()]
    return last, [words for words in said if not words.startswith("0 ")]


def mixed_data(rows: Sequence[Row]) -> list[str]:
    """What to say of each arm whose runs are on different shards.

    Args:
        rows: that are reported on.
    """
    shards: dict[str, set[str]] = {}
    for row in rows:
        shards.setdefault(row.arm, set()).add(row.data_sha256)
    return [
        f"{arm}: its runs are on {len(found)} different sets of shards (column data_sha256), so "
        "that their losses do not compare"
        for arm, found in shards.items()
        if len(found) > 1
    ]
