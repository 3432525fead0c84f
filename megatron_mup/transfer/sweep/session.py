"""One ``megatron-mup sweep run``: checks, data, missing runs, table."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mup import exit_codes
from megatron_mup.errors import ConfigError
from megatron_mup.transfer.runs import Row, Status, write_parquet
from megatron_mup.transfer.sweep.base import check_base
from megatron_mup.transfer.sweep.cells import Cell, make_cells
from megatron_mup.transfer.sweep.data_checks import (
    check_same_data,
    check_source,
    check_text_options,
    prepare_data,
)
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.order import Strategy, ended, grid_of, in_starting_order
from megatron_mup.transfer.sweep.pool import Share
from megatron_mup.transfer.sweep.progress import saved_early
from megatron_mup.transfer.sweep.refinement import DecisionLog, added_cells, strategy_of
from megatron_mup.transfer.sweep.remarks import remarks
from megatron_mup.transfer.sweep.results import origin_of
from megatron_mup.transfer.sweep.runner import Ending, Limits, run_cells
from megatron_mup.transfer.sweep.spec import Sweep, load_sweep
from megatron_mup.transfer.sweep.tasks import Everywhere, Task, lacking, merge_tables, share_of

_NAMED = 10
"""Runs that are named one by one before the rest is counted."""

Print = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What the command line says.

    Attributes:
        config: the sweep's YAML.
        out: the sweep's folder.
        text: files for tokenizer and shards; empty: the folder's own shards, or installed Python
            sources where it has none.
        share: processes to use.
        only: ``ARM`` or ``ARM/SIZE``; empty: all.
        max_cells: start no more than so many; None: no limit.
        task: run a share of the cells, beside other tasks; None: all of them.
    """

    config: Path
    out: Path
    text: tuple[Path, ...]
    share: Share
    only: tuple[str, ...] = ()
    max_cells: int | None = None
    task: Task | None = None


def run_sweep(request: RunRequest, echo: Print) -> int:
    """Run what the folder has no row of.

    Args:
        request: what to run and where.
        echo: receives progress lines.

    Returns:
        The process's exit code: 0 if all is there, 1 if cells failed, 75 after a request to stop.

    Raises:
        MupError: before anything runs, if the YAML, a configuration or the data do not fit.
    """
    folder = SweepFolder(request.out, None if request.task is None else request.task.number)
    sweep = _load(request.config, folder)
    cells = make_cells(sweep, folder.data)
    limits = Limits(
        only=_chosen(cells, request),
        max_cells=request.max_cells,
        checkpoint_fraction=sweep.checkpoint_fraction,
        keep_checkpoints=sweep.keep_checkpoints,
        stop_early=sweep.stop_early,
    )
    check_text_options(sweep, cells, request.text)
    check_source(sweep, cells, folder, request.text)
    if limits.only == frozenset():
        echo("this task has no runs: there are fewer runs than tasks")
    for line in remarks(sweep, cells):
        echo(line)
    with folder.locked():
        prepare_data(sweep, cells, folder=folder, text=request.text, echo=echo)
        ending = _run_locked(sweep, cells, folder, limits=limits, share=request.share, echo=echo)
    return _end(ending, folder, echo)


def _load(config: Path, folder: SweepFolder) -> Sweep:
    """A sweep whose base says nothing that the sweep says otherwise."""
    sweep = load_sweep(config)
    # The folder's own YAML may hold what an earlier version took from a file.
    if config.absolute() != folder.sweep_yaml.absolute():
        check_base(sweep)
    return sweep


def _run_locked(
    sweep: Sweep,
    cells: Sequence[Cell],
    folder: SweepFolder,
    *,
    limits: Limits,
    share: Share,
    echo: Print,
) -> Ending:
    """Compare with what is on record, and run the rest; the folder is held and has its data."""
    origin = origin_of(sweep.name, cells[0].run)
    if folder.task is None and len(folder.writers()) > 1:
        merge_tables(folder)
    rows = {row.cell: row for row in folder.rows()}
    strategy = _strategy(sweep, cells, folder)
    everything = list({cell.id: cell for cell in (*cells, *strategy.wanted(rows))}.values())
    check_same_data(everything, rows, origin.data_sha256)
    folder.write_sweep(sweep)
    for line in record_lines(everything, rows):
        echo(line)
    log = DecisionLog(folder, strategy, echo)
    log.update(rows)
    try:
        return run_cells(
            strategy,
            rows,
            folder=folder,
            origin=origin,
            share=share,
            limits=limits,
            echo=echo,
            recorded=log.update,
        )
    finally:
        shutil.rmtree(folder.cache, ignore_errors=True)
        if folder.task is None:
            write_parquet(folder.parquet, folder.rows())


def _strategy(sweep: Sweep, cells: Sequence[Cell], folder: SweepFolder) -> Strategy:
    if folder.task is None:
        return strategy_of(sweep, cells)
    if sweep.seeds_within_octaves is None:
        # A task sees no row of another that is made meanwhile, and needs none.
        return Everywhere(in_starting_order(sweep, cells))
    # What refines asks for rows of all tasks; a command without --task does so afterwards.
    return grid_of(sweep, cells)


def _chosen(cells: Sequence[Cell], request: RunRequest) -> frozenset[str] | None:
    """Ids of what the command line names; None: all."""
    named = selected_ids(cells, request.only) if request.only else None
    if request.task is None:
        return named
    return share_of([cell for cell in cells if named is None or cell.id in named], request.task)


def prepare_sweep(
    config: Path, out: Path, *, text: Sequence[Path], echo: Callable[[str], None]
) -> None:
    """Check a sweep and make its shards, so that the tasks of an array can begin.

    Args:
        config: the sweep's YAML.
        out: the sweep's folder.
        text: files for tokenizer and shards; empty: the folder's own shards, or installed Python
            sources where it has none.
        echo: receives progress lines.

    Raises:
        MupError: the YAML, a configuration or the data do not fit.
    """
    folder = SweepFolder(out)
    sweep = _load(config, folder)
    cells = make_cells(sweep, folder.data)
    check_text_options(sweep, cells, text)
    check_source(sweep, cells, folder, text)
    for line in remarks(sweep, cells):
        echo(line)
    with folder.locked():
        prepare_data(sweep, cells, folder=folder, text=text, echo=echo)
        rows = {row.cell: row for row in folder.rows()}
        check_same_data(cells, rows, origin_of(sweep.name, cells[0].run).data_sha256)
        folder.write_sweep(sweep)
    echo(f"{folder.path} is ready for tasks: up to {len(cells)} runs")
    if sweep.refine is not None:
        echo(
            "refine: tasks leave it out; 'megatron-mup sweep run' without --task does it afterwards"
        )


def merge_sweep(folder: SweepFolder, *, only: Sequence[str], echo: Print) -> int:
    """Make one table of those of all tasks, and say what they have left undone.

    Args:
        folder: of the sweep; tasks may be writing to it.
        only: ``ARM`` or ``ARM/SIZE`` of what tasks were to run; empty: all.
        echo: receives lines.

    Returns:
        The process's exit code: 0 if all these runs of the grid are there, otherwise 1; what
        refinement asks for besides is said and changes nothing of it.

    Raises:
        MupError: this is no sweep's folder, or a command that is no task holds it.
    """
    sweep = folder.read_sweep()
    everything = make_cells(sweep, folder.data)
    chosen = selected_ids(everything, only) if only else None
    cells = [cell for cell in everything if chosen is None or cell.id in chosen]
    with folder.shared():
        merge_tables(folder)
        rows = {row.cell: row for row in folder.rows()}
    left = lacking(sweep, cells, rows)
    echo(f"{len(rows)} runs in {folder.table}")
    for line in [*_waiting(sweep, cells, rows), *_refine_lines(sweep, everything, rows, folder)]:
        echo(line)
    if not left:
        return exit_codes.FINISHED
    failed = sum(cell.id in rows for cell in left)
    echo(f"{failed} runs failed and {len(left) - failed} are missing:")
    for cell in left[:_NAMED]:
        echo(f"  {cell.words}: {'failed' if cell.id in rows else 'missing'}")
    if len(left) > _NAMED:
        echo(f"  and {len(left) - _NAMED} more")
    echo("start the tasks again, or 'megatron-mup sweep run': what is done is not done again")
    return exit_codes.INCOMPLETE


def _waiting(sweep: Sweep, cells: Sequence[Cell], rows: Mapping[str, Row]) -> list[str]:
    """Further seeds of which it is not decided yet whether they run, in words."""
    undecided = grid_of(sweep, cells).undecided(rows)
    if sweep.seeds_within_octaves is None or not undecided:
        return []
    return [
        f"up to {len(undecided)} runs of further seeds wait for the first seed's losses "
        "(seeds_within_octaves)"
    ]


def _refine_lines(
    sweep: Sweep, cells: Sequence[Cell], rows: Mapping[str, Row], folder: SweepFolder
) -> list[str]:
    """What refinement asks for that no task runs, in words."""
    added = added_cells(strategy_of(sweep, cells), rows)
    missing = [cell for cell in added if not ended(rows.get(cell.id))]
    if not missing:
        return []
    curves = len({cell.curve for cell in missing})
    return [
        f"refine: {curves} curves want {len(missing)} more runs: run 'megatron-mup sweep run "
        f"{folder.sweep_yaml} --out {folder.path}'"
    ]


def _end(ending: Ending, folder: SweepFolder, echo: Print) -> int:
    made = [ending.rows[cell_id] for cell_id in ending.made]
    counts = {status: sum(row.status is status for row in made) for status in Status}
    told = ", ".join(f"{count} {status.value}" for status, count in counts.items() if count)
    echo(f"{len(made)} runs ended ({told or 'nothing was missing'}); table: {folder.table}")
    saved = saved_early(made)
    if saved is not None:
        echo(saved.words)
    if ending.interrupted:
        echo("interrupted; the same command goes on from here")
        return exit_codes.STOPPED_SAVED
    if counts[Status.FAILED]:
        echo(f"failed runs are tried again by the same command; logs: {folder.workers}")
        return exit_codes.INCOMPLETE
    return exit_codes.FINISHED


def selected_ids(cells: Sequence[Cell], only: Sequence[str]) -> frozenset[str]:
    """Ids of the cells that ``--only`` names.

    Args:
        cells: of the sweep.
        only: ``ARM`` or ``ARM/SIZE``.

    Raises:
        ConfigError: a name that no cell has.
    """
    chosen: set[str] = set()
    for name in only:
        found = {cell.id for cell in cells if name in (cell.arm, f"{cell.arm}/{cell.size:g}")}
        if not found:
            known = dict.fromkeys(f"{cell.arm}/{cell.size:g}" for cell in cells)
            raise ConfigError(f"--only {name} names no cell; use an arm or one of {list(known)}")
        chosen |= found
    return frozenset(chosen)


def record_lines(cells: Sequence[Cell], rows: Mapping[str, Row]) -> list[str]:
    """What is on record already, in words."""
    ids = {cell.id for cell in cells}
    own = sum(cell_id in ids for cell_id in rows)
    lines = [f"{own} of up to {len(cells)} runs are on record"] if own else []
    if len(rows) > own:
        lines.append(
            f"{len(rows) - own} runs on record belong to no cell of this YAML; they stay in the "
            "table"
        )
    return lines
