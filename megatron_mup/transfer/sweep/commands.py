"""``megatron-mup sweep``: reads arguments, calls one function, prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_mup.command_help import PlainCommand
from megatron_mup.transfer.report.command import report_command

app = typer.Typer(no_args_is_help=True)
app.command("report", cls=PlainCommand)(report_command)

SweepYaml = Annotated[Path, typer.Argument(help="YAML of the sweep.", metavar="CONFIG")]
Folder = Annotated[Path, typer.Argument(help="The sweep's folder.", metavar="DIR")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the table and all the rest.")]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        help="Text or JSONL file; unset: the folder's own shards, or installed Python sources.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", help="Runs at a time; unset: one a GPU share, or one a core."),
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="Of each worker; unset: cores divided by workers.")
]
GpuShare = Annotated[int, typer.Option("--gpu-share", help="Workers that share a GPU.")]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", help="This arm or size only.", metavar="ARM[/SIZE]"),
]
MaxCells = Annotated[
    int | None, typer.Option("--max-cells", min=1, help="Start no more than so many cells.")
]
TaskOf = Annotated[
    str | None,
    typer.Option("--task", help="Run share I of N, beside other tasks.", metavar="I/N"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("run", cls=PlainCommand)
def run_command(
    config: SweepYaml,
    out: Out,
    text: Text = None,
    workers: Workers = None,
    threads: Threads = None,
    gpu_share: GpuShare = 1,
    only: Only = None,
    max_cells: MaxCells = None,
    task: TaskOf = None,
) -> None:
    """Run what the folder has no row of; ends with 1 if cells failed, 75 if interrupted."""
    from megatron_mup.transfer.sweep.pool import share_of_machine
    from megatron_mup.transfer.sweep.session import RunRequest, run_sweep
    from megatron_mup.transfer.sweep.tasks import task_from_text

    request = RunRequest(
        config=config,
        out=out,
        text=tuple(text or ()),
        share=share_of_machine(workers, threads, gpu_share),
        only=tuple(only or ()),
        max_cells=max_cells,
        task=None if task is None else task_from_text(task),
    )
    code = run_sweep(request, typer.echo)
    if code:
        raise typer.Exit(code)


@app.command("prepare", cls=PlainCommand)
def prepare_command(config: SweepYaml, out: Out, text: Text = None) -> None:
    """Check everything and make the shards; 'run --task' begins after it."""
    from megatron_mup.transfer.sweep.session import prepare_sweep

    prepare_sweep(config, out, text=text or [], echo=typer.echo)


@app.command("merge", cls=PlainCommand)
def merge_command(folder: Folder, only: Only = None) -> None:
    """Make one table of those of all tasks; ends with 1 if runs failed or are missing."""
    from megatron_mup.transfer.sweep.folder import SweepFolder
    from megatron_mup.transfer.sweep.session import merge_sweep

    code = merge_sweep(SweepFolder(folder), only=only or [], echo=typer.echo)
    if code:
        raise typer.Exit(code)


@app.command("plan", cls=PlainCommand)
def plan_command(
    config: SweepYaml,
    out: Annotated[
        Path | None, typer.Option(help="Folder of 'sweep run'; its runs make time estimates.")
    ] = None,
) -> None:
    """Print sizes, lengths and cost; nothing is run or written."""
    from megatron_mup.transfer.sweep.base import check_base
    from megatron_mup.transfer.sweep.cells import make_cells
    from megatron_mup.transfer.sweep.data_checks import check_text_options
    from megatron_mup.transfer.sweep.folder import SweepFolder
    from megatron_mup.transfer.sweep.plan_report import render_plan
    from megatron_mup.transfer.sweep.remarks import remarks
    from megatron_mup.transfer.sweep.spec import load_sweep

    sweep = load_sweep(config)
    check_base(sweep)
    folder = SweepFolder(out or Path("sweep"))
    cells = make_cells(sweep, folder.data)
    check_text_options(sweep, cells, ())
    for line in remarks(sweep, cells):
        typer.echo(line)
    rows = {} if out is None else {row.cell: row for row in folder.rows()}
    typer.echo(render_plan(sweep, cells, rows))


@app.command("status", cls=PlainCommand)
def status_command(folder: Folder, as_json: AsJson = False) -> None:
    """Print what has ended, what runs, and how long the rest takes."""
    from megatron_mup.transfer.sweep.folder import SweepFolder
    from megatron_mup.transfer.sweep.status_report import render_status, sweep_status

    status = sweep_status(SweepFolder(folder))
    typer.echo(json.dumps(status, indent=1) if as_json else render_status(status))


@app.command("config", cls=PlainCommand)
def config_command(
    folder: Folder,
    cell: Annotated[str, typer.Argument(help="Its id in runs.csv, or the beginning of it.")],
) -> None:
    """Print a cell's YAML for 'megatron-mup train --config'."""
    from megatron_mup.transfer.sweep.cell_yaml import cell_yaml
    from megatron_mup.transfer.sweep.folder import SweepFolder

    typer.echo(cell_yaml(SweepFolder(folder), cell), nl=False)
