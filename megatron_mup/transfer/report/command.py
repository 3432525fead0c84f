"""``megatron-mup sweep report``: which rows to read, where the report goes, what to print."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_mup.errors import ConfigError, DataError, MupError

if TYPE_CHECKING:
    from megatron_mup.transfer.report.build import Report
    from megatron_mup.transfer.runs import Row

Source = Annotated[
    Path,
    typer.Argument(help="Folder of a sweep, or a table: CSV or Parquet.", metavar="DIR|TABLE"),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of the report; unset: report, beside the table."),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="Of another program's CSV: NAME=COLUMN, such as width=n_embd, lr=learning_rate, "
        "loss=val/loss; once for each.",
    ),
]
Level = Annotated[float, typer.Option("--level", help="Probability that the intervals hold.")]
Title = Annotated[
    str | None, typer.Option("--title", help="Of the report; unset: the sweep's name.")
]


def report_command(
    source: Source,
    out: Out = None,
    column: Columns = None,
    level: Level = 0.9,
    title: Title = None,
) -> None:
    """Fit a sweep's runs; write report.md, report.html and figures; print the verdicts."""
    report = make_folder_report(source, out=out, columns=column or [], level=level, title=title)
    for line in summary(report):
        typer.echo(line)


def make_folder_report(
    source: Path,
    *,
    out: Path | None = None,
    columns: Sequence[str] = (),
    level: float = 0.9,
    title: str | None = None,
) -> Report:
    """Report on a sweep's folder or a table.

    Args:
        source: the folder, whose ``sweep.yaml`` says which rows count, or a table.
        out: folder of the report; None: ``report``, beside the table.
        columns: ``NAME=COLUMN`` of another program's CSV.
        level: probability that the intervals hold.
        title: of the report; None: the sweep's name.

    Raises:
        ConfigError: an option is refused.
        DataError: the table cannot be read or reported on, or the folder cannot be written.
    """
    if not 0 < level < 1:
        raise ConfigError(f"--level {level} is no probability; give a number between 0 and 1")
    table = table_of(source)
    rows, notes = _rows_and_notes(source, table, columns)
    if title is None:
        title = f"Learning-rate transfer: {', '.join(sorted({row.sweep for row in rows}))}"
    folder = out if out is not None else table.parent / "report"
    # Late, because fits and figures take a second to import, and errors above are to come at once.
    from megatron_mup.transfer.report.build import make_report

    command = _command(source, out, columns, level)
    told = "; ".join([str(table), *notes])
    report = make_report(rows, folder, title=title, level=level, command=command, source=told)
    return replace(report, notes=tuple(notes))


def _command(source: Path, out: Path | None, columns: Sequence[str], level: float) -> str:
    """What makes the same report again."""
    words = ["megatron-mup", "sweep", "report", str(source)]
    words += ["--out", str(out)] if out is not None else []
    words += [word for item in columns for word in ("--column", item)]
    words += ["--level", f"{level:g}"] if level != 0.9 else []
    return shlex.join(words)


def _rows_and_notes(
    source: Path, table: Path, columns: Sequence[str]
) -> tuple[list[Row], list[str]]:
    """The rows to report on, and what is to be said of them."""
    rows = rows_of(table, columns)
    notes: list[str] = []
    if source.is_dir() and not columns:
        rows, notes = rows_of_sweep(source, rows)
    return rows, [*notes, *mixed_data(rows)]


def table_of(source: Path) -> Path:
    """The table to read: of a sweep's folder, or the file itself.

    Raises:
        DataError: there is none.
    """
    from megatron_mup.transfer.sweep.folder import SweepFolder

    table = SweepFolder(source).table if source.is_dir() else source
    if not table.is_file():
        raise DataError(
            f"no table of runs at '{table}'; give the folder of 'megatron-mup sweep run --out', or "
            "a CSV or Parquet file"
        )
    return table


def rows_of(table: Path, columns: Sequence[str]) -> list[Row]:
    """Rows of a table, of another program where columns are named.

    Args:
        table: that exists.
        columns: ``NAME=COLUMN``, none for a table of this package.

    Raises:
        ConfigError: a column is named in another form, or twice.
        DataError: the table cannot be read.
    """
    from megatron_mup.transfer.runs import read_foreign, read_rows

    if not columns:
        return read_rows(table)
    mapping: dict[str, str] = {}
    for item in columns:
        name, equals, column = item.partition("=")
        if not (name and equals and column):
            raise ConfigError(f"--column '{item}' must be NAME=COLUMN, such as width=n_embd")
        if name in mapping:
            raise ConfigError(f"--column {name} is given twice: {mapping[name]} and {column}")
        mapping[name] = column
    return read_foreign(table, mapping)


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
    from megatron_mup.transfer.sweep.cells import make_cells
    from megatron_mup.transfer.sweep.folder import SweepFolder
    from megatron_mup.transfer.sweep.own_rows import on_last_data, own_rows

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


def summary(report: Report) -> list[str]:
    """What the command prints: notes, the optima, each verdict, and where the report is."""
    from megatron_mup.transfer.report.markdown import table_text
    from megatron_mup.transfer.report.wording import sentence

    lines = [*report.notes, *table_text(report.optima).splitlines(), ""]
    lines += [
        f"{name}: {verdict.outcome}. {sentence(verdict.because)}"
        for name, verdict in report.verdicts.items()
    ]
    return [*lines, f"report: {report.page} (also {report.markdown.name}, figures/)"]
