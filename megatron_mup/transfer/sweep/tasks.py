"""A sweep's runs shared out between the tasks of an array of jobs. Must not import torch.

A task's share follows from the YAML alone, so that tasks need not talk to each other and one that
starts again has the same share. Each appends to a table of its own; ``merge_tables`` makes one of
them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_mup.data.publication import published
from megatron_mup.errors import ConfigError
from megatron_mup.transfer.runs import Row, table_text, write_parquet
from megatron_mup.transfer.sweep.cells import Cell
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.order import ended, grid_of
from megatron_mup.transfer.sweep.spec import Sweep


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of an array.

    Attributes:
        number: from 1.
        count: of tasks.
    """

    number: int
    count: int


def task_from_text(text: str) -> Task:
    """``2/8`` as a task.

    Raises:
        ConfigError: it is no task.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--task is '{text}'; give I/N with I from 1 to N, such as 2/8")
    return Task(number=int(found[1]), count=int(found[2]))


def share_of(cells: Sequence[Cell], task: Task) -> frozenset[str]:
    """Ids of the cells that a task runs.

    First seeds and further seeds are dealt out separately, the most expensive ones first, so that
    each task gets about the same of both.

    Args:
        cells: of the sweep, in the order of the YAML.
        task: which one.
    """
    first_seed = cells[0].seed
    ordered = sorted(cells, key=lambda cell: -cell.flops)
    parts = (
        [cell for cell in ordered if cell.seed == first_seed],
        [cell for cell in ordered if cell.seed != first_seed],
    )
    return frozenset(cell.id for part in parts for cell in part[task.number - 1 :: task.count])


class Everywhere:
    """Every cell, whatever the others show: what a task runs that does not see their rows.

    Args:
        cells: all cells that there can be.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._cells = sorted(cells, key=lambda cell: (cell.seed != cells[0].seed, -cell.flops))

    def wanted(self, _rows: Mapping[str, Row]) -> list[Cell]:
        """See ``Strategy``."""
        return self._cells

    def undecided(self, _rows: Mapping[str, Row]) -> list[Cell]:
        """See ``Strategy``."""
        return []


def merge_tables(folder: SweepFolder) -> int:
    """Write ``runs.csv`` and ``runs.parquet`` anew from it and the tables of all tasks.

    Args:
        folder: of the sweep; no command but tasks may be writing to it.

    Returns:
        Number of rows.
    """
    rows = folder.rows()
    with published(folder.table) as stream:
        stream.write(table_text(rows).encode())
    write_parquet(folder.parquet, rows)
    return len(rows)


def lacking(sweep: Sweep, cells: Sequence[Cell], rows: Mapping[str, Row]) -> list[Cell]:
    """Runs that tasks have left undone: failed, or without a row.

    Args:
        sweep: the sweep; what it refines is no task's.
        cells: all cells of its grid.
        rows: cell id -> row, of everything on record.
    """
    grid = grid_of(sweep, cells)
    wanted = grid.wanted(rows)
    if sweep.seeds_within_octaves is None:
        # Tasks run all of them at once: a share does not wait for another one's losses.
        wanted += grid.undecided(rows)
    return [cell for cell in wanted if not ended(rows.get(cell.id))]
