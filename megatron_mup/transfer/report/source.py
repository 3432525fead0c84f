"""What a report is made of: the runs of a sweep's folder or of a table, and what to say of them.

A folder's ``sweep.yaml`` says which rows count and which runs are still to come. Fits nothing but
what refinement decides by, and writes nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mup.errors import ConfigError, DataError, MupError
from megatron_mup.transfer.foreign_rows import read_foreign
from megatron_mup.transfer.report.wording import counted, listed, shortened, size_text
from megatron_mup.transfer.runs import Row, read_rows
from megatron_mup.transfer.sweep.cells import Cell, make_cells
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.order import ended
from megatron_mup.transfer.sweep.own_rows import on_last_data, own_rows
from megatron_mup.transfer.sweep.refinement import strategy_of
from megatron_mup.transfer.sweep.spec import Sweep


@dataclass(frozen=True, kw_only=True)
class Reported:
    """Runs to report on.

    Attributes:
        rows: of these runs.
        notes: what is missing, what was left out, what does not compare; in words.
        incomplete: the sweep asks for runs that have not ended.
        seeds_known: the table names the runs' seeds.
        table: that the runs come from, to be printed; empty: not said.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    incomplete: bool = False
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
    missing: list[str] = []
    left_out: list[str] = []
    if source.is_dir():
        rows, missing, left_out = rows_of_sweep(source, rows)
    return Reported(
        rows=tuple(rows),
        notes=(*missing, *left_out, *mixed_data(rows)),
        incomplete=bool(missing),
        table=str(table),
    )


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


def rows_of_sweep(source: Path, rows: Sequence[Row]) -> tuple[list[Row], list[str], list[str]]:
    """Rows of the runs that a folder's ``sweep.yaml`` asks for.

    Args:
        source: the folder; without a ``sweep.yaml`` that can be read all rows are used.
        rows: of its table.

    Returns:
        The rows; in words how many are missing; in words how many are left out and why.

    Raises:
        DataError: no row is of such a run.
    """
    folder = SweepFolder(source)
    if not folder.sweep_yaml.exists():
        return list(rows), [], []
    try:
        sweep = folder.read_sweep()
        cells = make_cells(sweep, folder.data)
    except MupError as error:
        reason = " ".join(str(error).split())
        used = f"all {len(rows)} rows are used: sweep.yaml cannot be read ({reason})"
        return list(rows), [], [used]
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
    missing = missing_runs(sweep, cells, last, folder=folder)
    return last, missing, [words for words in said if not words.startswith("0 ")]


def missing_runs(
    sweep: Sweep, cells: Sequence[Cell], rows: Sequence[Row], *, folder: SweepFolder
) -> list[str]:
    """What to say of runs that the sweep asks for and that have not ended, or have failed.

    Further seeds that wait for the first one's losses, and what refinement has not decided yet,
    are no missing runs; that they may come is said. ``sweep status`` counts alike.

    Args:
        sweep: as asked for.
        cells: all cells of its grid.
        rows: that are reported on.
        folder: of the sweep.
    """
    known = {row.cell: row for row in rows}
    strategy = strategy_of(sweep, cells)
    wanted, undecided = strategy.wanted(known), strategy.undecided(known)
    left = [cell for cell in wanted if not ended(known.get(cell.id))]
    if not left:
        return []
    failed = sum(cell.id in known for cell in left)
    lost = f" ({failed} failed)" if failed else ""
    verb = "is" if len(left) == 1 else "are"
    said = [f"{len(left)} of {counted(len(wanted), 'run')} {verb} missing{lost}: {_places(left)}"]
    if undecided:
        said.append(
            f"up to {counted(len(undecided), 'run')} of further seeds wait for those of the first"
        )
    if sweep.refine is not None:
        said.append("refinement adds runs when these have ended")
    recorded = {row.cell for row in folder.rows()}
    of_tasks = sum(cell.id in recorded and cell.id not in known for cell in left)
    if of_tasks:
        merge = shlex.join(["megatron-mup", "sweep", "merge", str(folder.path)])
        where = "is in a table" if of_tasks == 1 else "are in tables"
        said.append(f"{of_tasks} of them {where} of tasks, which '{merge}' takes over")
    words = ["megatron-mup", "sweep", "run", str(folder.sweep_yaml), "--out", str(folder.path)]
    return ["; ".join([*said, f"'{shlex.join(words)}' goes on"])]


def _places(cells: Sequence[Cell]) -> str:
    """Arms, their sizes, and the number of runs of each."""
    counts: dict[str, dict[float, int]] = {}
    for cell in sorted(cells, key=lambda cell: cell.size):
        further = "".join(f" {key.split('.')[-1]}={text}" for key, text in cell.settings.items())
        sizes = counts.setdefault(f"{cell.arm}{further} {cell.axis}", {})
        sizes[cell.size] = sizes.get(cell.size, 0) + 1
    return shortened(
        [
            f"{arm} {listed(f'{size_text(size)} ({count})' for size, count in sizes.items())}"
            for arm, sizes in counts.items()
        ]
    )


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
