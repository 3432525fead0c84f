"""Which rows of a sweep's table are of its runs: a table keeps those of earlier YAMLs too.

Pure: no files, no printing.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mup.transfer.runs import Row
from megatron_mup.transfer.sweep.cells import Cell, with_rate_and_seed


def own_rows(rows: Sequence[Row], cells: Sequence[Cell]) -> list[Row]:
    """Rows of a sweep's runs, those that a refinement added included.

    Args:
        rows: of the sweep's table.
        cells: of the sweep, or of some of its arms.
    """
    curves = {cell.curve: cell for cell in cells}
    ids = {cell.id for cell in cells}
    return [row for row in rows if row.cell in ids or _is_added(row, curves.get(_curve(row)))]


def _curve(row: Row) -> tuple[str, float, tuple[tuple[str, str], ...]]:
    return row.arm, row.size, tuple(sorted(row.settings.items()))


def _is_added(row: Row, cell: Cell | None) -> bool:
    """Whether a row is of the curve of a cell at another learning rate or seed."""
    if cell is None:
        return False
    return with_rate_and_seed(cell, log2_lr=row.log2_lr, seed=row.seed).id == row.cell


def on_last_data(rows: Sequence[Row]) -> list[Row]:
    """Rows on the shards that the run read which started last.

    Args:
        rows: of one sweep, whose runs all read the same shards as long as nobody changes them.
    """
    if not rows:
        return []
    last = max(rows, key=lambda row: row.started).data_sha256
    return [row for row in rows if row.data_sha256 == last]
