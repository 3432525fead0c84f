"""``megatron-mup launch <verb>``: what the launch scripts call; see docs/operation.md."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_mup.command_help import PlainCommand
from megatron_mup.errors import ConfigError
from megatron_mup.launching.attempts import current_attempt
from megatron_mup.launching.run_folder import attempt_of_process, existing_run_folder

app = typer.Typer(no_args_is_help=True, help="Steps of the launch scripts around a run.")

RunDir = Annotated[Path, typer.Option("--run-dir", help="Folder of the run.")]


def _say(line: str) -> None:
    typer.echo(line, err=True)


def begin_command(
    run_dir: RunDir,
    config: Annotated[Path, typer.Option("--config", help="YAML configuration.")],
    world_size: Annotated[int, typer.Option("--world-size", help="Ranks of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value", metavar="KEY=VALUE")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")] = None,
    lr_from: Annotated[
        Path | None,
        typer.Option("--lr-from", help="File with the peak learning rate: what tuned it."),
    ] = None,
    attempt_of: Annotated[
        str | None, typer.Option("--attempt-of", help="JOBID:RESTART of the scheduler.")
    ] = None,
    max_restarts: Annotated[
        int | None,
        typer.Option(
            "--max-restarts", help="Starts in a row of one job without a newer checkpoint."
        ),
    ] = None,
) -> None:
    """Check a run, open an attempt in its folder, and print the variables of the ranks."""
    from megatron_mup.launching.beginning import BeginRequest, begin, parse_attempt_of

    job, restart = parse_attempt_of(attempt_of)
    request = BeginRequest(
        run_dir=run_dir,
        config=config,
        world_size=world_size,
        lr=lr,
        lr_from=lr_from,
        job=job,
        restart=restart,
        max_restarts=max_restarts,
        overrides=tuple(overrides or ()),
    )
    for name, value in begin(request, os.environ, _say).items():
        typer.echo(f"{name}={value}")


def preflight_command(
    run_dir: RunDir,
    timeout_seconds: Annotated[
        float, typer.Option("--timeout-seconds", help="Longest duration of all checks together.")
    ] = 300.0,
    min_free_gb: Annotated[
        float | None,
        typer.Option("--min-free-gb", help="Free space for checkpoints; unset: two of them."),
    ] = None,
) -> None:
    """Check this rank's machine and its way to the others; one process per rank."""
    from megatron_mup.launching.preflight import PreflightLimits, preflight

    folder = existing_run_folder(run_dir)
    limits = PreflightLimits(seconds=timeout_seconds, free_gb=min_free_gb)
    attempt = current_attempt(folder, attempt_of_process())
    code = preflight(folder, attempt, limits, typer.echo)
    if code:
        raise typer.Exit(code)


def judge_command(
    run_dir: RunDir,
    nodes: Annotated[str, typer.Option("--nodes", help="Names of the nodes, with commas.")],
    tasks_per_node: Annotated[
        int, typer.Option("--tasks-per-node", help="Processes on each node.")
    ],
) -> None:
    """Name the nodes that did not pass the preflight; ends with 79 if there are any."""
    from megatron_mup.launching.judgement import judge_and_record

    names = [name.strip() for name in nodes.split(",") if name.strip()]
    if not names or tasks_per_node < 1:
        raise ConfigError(
            f"--nodes is '{nodes}', --tasks-per-node {tasks_per_node}; give names and a number"
        )
    folder = existing_run_folder(run_dir)
    attempt = current_attempt(folder, attempt_of_process())
    verdict = judge_and_record(folder, attempt, names, tasks_per_node)
    for line in verdict.lines:
        typer.echo(line)
    if verdict.exit_code:
        raise typer.Exit(verdict.exit_code)


def decide_command(
    run_dir: RunDir,
    exit_code: Annotated[
        int, typer.Option("--exit-code", help="Of the job step; 128 + signal if killed.")
    ],
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", help="Starts in a row without a newer checkpoint.")
    ],
    signalled: Annotated[
        bool, typer.Option("--signalled", help="The script was told to end by a signal.")
    ] = False,
    exclude_after: Annotated[
        int | None,
        typer.Option("--exclude-after", help="Failures after which a node is avoided."),
    ] = None,
) -> None:
    """Print what comes next: finished, stop REASON, requeue REASON or resubmit NODES REASON."""
    from megatron_mup.launching.decision import Limits, decide_and_record

    if max_restarts < 0 or (exclude_after is not None and exclude_after < 1):
        raise ConfigError(
            f"--max-restarts is {max_restarts}, --exclude-after {exclude_after}; the first must "
            "not be negative (MAX_RESTARTS), the second at least 1 (EXCLUDE_AFTER)"
        )
    folder = existing_run_folder(run_dir)
    decision = decide_and_record(
        folder,
        current_attempt(folder, attempt_of_process()),
        exit_code,
        signalled=signalled,
        limits=Limits(max_restarts=max_restarts, exclude_after=exclude_after),
        environment=os.environ,
        say=_say,
    )
    typer.echo(decision.line)


app.command("begin", cls=PlainCommand)(begin_command)
app.command("preflight", cls=PlainCommand)(preflight_command)
app.command("judge", cls=PlainCommand)(judge_command)
app.command("decide", cls=PlainCommand)(decide_command)
