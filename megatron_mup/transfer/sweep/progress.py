"""How far a sweep is and how long it will take: seconds per FLOP of runs that ended.

Pure: works on rows and cells. Must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mup.transfer.runs import Row, Status
from megatron_mup.transfer.sweep.cells import Cell
from megatron_mup.transfer.sweep.order import Strategy, ended


class Rates:
    """Seconds that cells take, from rows of cells that finished.

    A small model does less in a second than a large one, so that the nearest cost counts (ours).

    Args:
        cells: that rows may belong to.
        rows: cell id -> row.
    """

    def __init__(self, cells: Iterable[Cell], rows: Mapping[str, Row]) -> None:
        by_cost: dict[float, list[float]] = {}
        for cell in cells:
            row = rows.get(cell.id)
            if row is not None and row.status is Status.FINISHED:
                by_cost.setdefault(cell.flops, []).append(row.seconds)
        self._seconds = {flops: sum(times) / len(times) for flops, times in by_cost.items()}

    def seconds(self, cell: Cell) -> float | None:
        """Expected seconds of a cell; None while nothing has finished."""
        if not self._seconds:
            return None
        nearest = min(self._seconds, key=lambda flops: abs(math.log(flops / cell.flops)))
        return self._seconds[nearest] * cell.flops / nearest


class Progress:
    """Counts and estimates of a running command.

    Args:
        strategy: decides which cells run.
        rows: cell id -> row; the runner adds to it.
        selected: cell ids that the command is about; None: all.
    """

    def __init__(
        self, strategy: Strategy, rows: Mapping[str, Row], *, selected: Collection[str] | None
    ) -> None:
        self._strategy, self._rows, self._selected = strategy, rows, selected

    def _cells(self) -> tuple[list[Cell], list[Cell]]:
        """Wanted and undecided cells that the command is about."""
        kinds = (self._strategy.wanted(self._rows), self._strategy.undecided(self._rows))
        wanted, undecided = (
            [cell for cell in kind if self._selected is None or cell.id in self._selected]
            for kind in kinds
        )
        return wanted, undecided

    def summary(self, running: int) -> dict[str, Any]:
        """Numbers of a state file.

        Args:
            running: cells that run now.
        """
        wanted, undecided = self._cells()
        rows = [self._rows[cell.id] for cell in wanted if cell.id in self._rows]
        counts = {status.value: 0 for status in Status}
        for row in rows:
            counts[row.status.value] += 1
        left = [cell for cell in wanted if not ended(self._rows.get(cell.id))]
        rates = Rates(wanted, self._rows)
        times = [rates.seconds(cell) for cell in [*left, *undecided]]
        known = sum(seconds for seconds in times if seconds is not None)
        return {
            "counts": counts,
            "done": len(rows),
            "running_cells": running,
            "total": len(wanted),
            "undecided": len(undecided),
            "worker_seconds_left": None if None in times else round(known, 1),
        }

    def line(self, cell: Cell, row: Row, *, running: int, reason: str) -> str:
        """What is printed when a cell ends.

        Args:
            cell: that ended.
            row: its row.
            running: cells that still run.
            reason: why it failed; empty if it did not.
        """
        numbers = self.summary(running)
        total = f"{numbers['total']}"
        if numbers["undecided"]:
            total += f" to {numbers['total'] + numbers['undecided']}"
        left = numbers["worker_seconds_left"]
        about = ""
        if left:
            workers = max(1, running)
            about = f", about {duration(left / workers)} left with {workers} at a time"
        return (
            f"[{numbers['done']} done, {running} running, of {total}] {cell.words}: "
            f"{outcome_words(row)}{f' ({reason})' if reason else ''}, {row.seconds:.1f} s{about}"
        )


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What the early end of runs has saved.

    Attributes:
        runs: that ended early.
        ended: runs that are through, those included.
        steps: that were not made.
        planned_steps: of all that are through.
        seconds: that these steps would have taken at the pace of their runs.
    """

    runs: int
    ended: int
    steps: int
    planned_steps: int
    seconds: float

    @property
    def words(self) -> str:
        """For a line of text."""
        return (
            f"stop_early: {self.runs} of {self.ended} runs ended early, which saved {self.steps:,} "
            f"of {self.planned_steps:,} steps ({self.steps / self.planned_steps:.0%}), about "
            f"{duration(self.seconds)} of one worker"
        )


def saved_early(rows: Iterable[Row]) -> Saved | None:
    """What ``stop_early`` has saved; None where no run ended early.

    Args:
        rows: of a sweep; what failed does not count.
    """
    through = [row for row in rows if ended(row)]
    early = [row for row in through if row.status is Status.STOPPED_EARLY]
    if not early:
        return None
    left = [row.planned_steps - row.steps for row in early]
    return Saved(
        runs=len(early),
        ended=len(through),
        steps=sum(left),
        planned_steps=sum(row.planned_steps for row in through),
        # The start of a run is in its seconds: an estimate.
        seconds=sum(row.seconds * n / row.steps for row, n in zip(early, left, strict=True)),
    )


def outcome_words(row: Row) -> str:
    """How a run ended."""
    if row.status is Status.FINISHED:
        return f"loss {row.validation_loss:.4f}"
    if row.status in (Status.DIVERGED, Status.STOPPED_EARLY):
        return f"{row.status.value.replace('_', ' ')} at step {row.steps}"
    return row.status.value.replace("_", " ")


def duration(seconds: float) -> str:
    """Seconds in words: ``45 s``, ``12 min``, ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
