"""``megatron-mup sweep report``: which rows to read, where the report goes, what to print."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_mup.errors import ConfigError

if TYPE_CHECKING:
    from megatron_mup.transfer.report.build import Report

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
    from megatron_mup.transfer.report.source import reported, table_of

    runs = reported(source, columns)
    if title is None:
        title = f"Learning-rate transfer: {', '.join(sorted({row.sweep for row in runs.rows}))}"
    # Late, because fits and figures take a second to import, and errors above are to come at once.
    from megatron_mup.transfer.report.build import make_report

    folder = out if out is not None else table_of(source).parent / "report"
    command = _command(source, out, columns, level)
    return make_report(runs, folder, title=title, level=level, command=command)


def _command(source: Path, out: Path | None, columns: Sequence[str], level: float) -> str:
    """What makes the same report again."""
    words = ["megatron-mup", "sweep", "report", str(source)]
    words += ["--out", str(out)] if out is not None else []
    words += [word for item in columns for word in ("--column", item)]
    words += ["--level", f"{level:g}"] if level != 0.9 else []
    return shlex.join(words)


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
