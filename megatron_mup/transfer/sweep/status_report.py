"""``megatron-mup sweep status``: what the table and the state file say, as JSON and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_mup.transfer.runs import Row, Status
from megatron_mup.transfer.sweep.cells import Cell, make_cells
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.progress import Progress, Saved, duration, saved_early
from megatron_mup.transfer.sweep.refinement import decisions_of, strategy_of

_COLUMNS = ("ended", "running", "diverged", "failed", "lowest loss", "at log2 LR")


def sweep_status(folder: SweepFolder) -> dict[str, Any]:
    """State of a sweep's folder, as plain data.

    Args:
        folder: that ``sweep run`` writes, running or not.

    Raises:
        MupError: it is no sweep's folder.
    """
    sweep = folder.read_sweep()
    cells = make_cells(sweep, folder.data)
    rows = {row.cell: row for row in folder.rows()}
    # A state that nobody owns tells what ran when its command ended.
    states = [(writer.owner(), writer.read_state()) for writer in folder.writers()]
    owner = "; ".join(owner for owner, _ in states if owner) or None
    running = [item for owner, state in states if owner for item in state.get("running", [])]
    strategy = strategy_of(sweep, cells)
    progress = Progress(strategy, rows, selected=None)
    everything = list({cell.id: cell for cell in (*cells, *strategy.wanted(rows))}.values())
    ids = {cell.id for cell in everything}
    saved = saved_early(row for row in rows.values() if row.cell in ids)
    return {
        "sweep": sweep.name,
        "axis": sweep.axis,
        "owner": owner,
        "updated": max(filter(None, (state.get("updated") for _, state in states)), default=None),
        **progress.summary(len(running)),
        "rows_of_other_cells": sum(cell_id not in ids for cell_id in rows),
        "running": running,
        "stop_early": None if saved is None else asdict(saved),
        "curves": _curves(everything, rows, [item["cell"] for item in running]),
        "refinement": [
            {**decision.record, "words": decision.words}
            for decision in decisions_of(strategy, rows)
        ],
    }


def _curves(
    cells: Sequence[Cell], rows: Mapping[str, Row], running: Sequence[str]
) -> list[dict[str, Any]]:
    """For each arm, size and setting: what ran, and the lowest loss so far."""
    groups: dict[object, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.curve, []).append(cell)
    curves = []
    for group in groups.values():
        done = [rows[cell.id] for cell in group if cell.id in rows]
        finished = [row for row in done if row.status is Status.FINISHED]
        best = min(finished, key=lambda row: row.validation_loss, default=None)
        curves.append(
            {
                "arm": group[0].arm,
                "size": group[0].size,
                "settings": dict(group[0].settings),
                "ended": len(done),
                "running": sum(cell.id in running for cell in group),
                "diverged": sum(row.status is Status.DIVERGED for row in done),
                "failed": sum(row.status is Status.FAILED for row in done),
                "lowest_loss": None if best is None else best.validation_loss,
                "at_log2_lr": None if best is None else best.log2_lr,
            }
        )
    return curves


def render_status(status: Mapping[str, Any]) -> str:
    """The status as text."""
    counts = ", ".join(f"{count} {name}" for name, count in status["counts"].items() if count)
    total = str(status["total"])
    if status["undecided"]:
        total += f" to {status['total'] + status['undecided']}"
    lines = [
        f"sweep {status['sweep']}: {status['done']} of {total} runs ended ({counts or 'none yet'})",
        f"running: {status['owner']}" if status["owner"] else "not running",
    ]
    left, running = status["worker_seconds_left"], status["running_cells"]
    if left:
        at_once = f", {duration(left / running)} with {running} at a time" if running > 1 else ""
        lines.append(f"left: about {duration(left)} of one worker{at_once}")
    if status["stop_early"] is not None:
        lines.append(Saved(**status["stop_early"]).words)
    if status["rows_of_other_cells"]:
        lines.append(f"{status['rows_of_other_cells']} runs in the table belong to no cell of it")
    lines += [
        f"  {item['words']}: iteration {item['iteration']} of {item['train_iters']}, "
        f"{duration(item['seconds'])}"
        for item in status["running"]
    ]
    lines += [
        "",
        f"| arm | {status['axis']} | {' | '.join(_COLUMNS)} |",
        "|" + " ---: |" * (2 + len(_COLUMNS)),
        *map(_curve_line, status["curves"]),
    ]
    if status["refinement"]:
        lines += ["", *(f"refine {decision['words']}" for decision in status["refinement"])]
    return "\n".join(lines)


def _curve_line(curve: Mapping[str, Any]) -> str:
    loss = "-" if curve["lowest_loss"] is None else f"{curve['lowest_loss']:.4f}"
    rate = "-" if curve["at_log2_lr"] is None else f"{curve['at_log2_lr']:g}"
    further = "".join(f" {key}={value}" for key, value in curve["settings"].items())
    return (
        f"| {curve['arm']}{further} | {curve['size']:g} | {curve['ended']} | {curve['running']} | "
        f"{curve['diverged']} | {curve['failed']} | {loss} | {rate} |"
    )
