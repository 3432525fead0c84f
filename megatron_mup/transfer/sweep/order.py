"""Which cell runs next: the seam where a strategy decides from the rows that are there.

The runner asks ``wanted`` whenever a worker is free, so a strategy may add cells as rows come. This
one runs the whole grid with the first seed, the most expensive runs first so that workers end
together, and each further seed where its curve's first seed has shown the minimum to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from megatron_mup.transfer.runs import Row, Status
from megatron_mup.transfer.sweep.cells import Cell
from megatron_mup.transfer.sweep.spec import Sweep


class Strategy(Protocol):
    """Decides which cells run, given what has ended."""

    def wanted(self, rows: Mapping[str, Row]) -> list[Cell]:
        """Cells that are to run or have run, in the order in which they should start.

        Args:
            rows: cell id -> row, of everything that ended.
        """
        ...

    def undecided(self, rows: Mapping[str, Row]) -> list[Cell]:
        """Cells that may become wanted, for estimates."""
        ...


def ended(row: Row | None) -> bool:
    """Whether a cell is through; a failed one is tried again by the next command."""
    return row is not None and row.status is not Status.FAILED


def middle_first(cells: Sequence[Cell]) -> list[Cell]:
    """The cells in an order that makes later ones comparable with what is probably the best.

    Args:
        cells: of the whole grid.

    Returns:
        The learning rates in the middle of each curve first, otherwise as given.
    """
    rates: dict[object, list[float]] = {}
    for cell in cells:
        rates.setdefault(cell.curve, []).append(cell.log2_lr)
    middles = {curve: (min(of_it) + max(of_it)) / 2 for curve, of_it in rates.items()}
    return sorted(cells, key=lambda cell: abs(cell.log2_lr - middles[cell.curve]))


class SeedsNearMinimum:
    """The first seed everywhere, further seeds near its lowest loss.

    Args:
        cells: all cells that there can be.
        within_octaves: how near in learning rate; None: everywhere.
    """

    def __init__(self, cells: Sequence[Cell], within_octaves: float | None) -> None:
        ordered = sorted(cells, key=lambda cell: -cell.flops)
        # By the order of the YAML: a list of seeds need not be sorted.
        first_seed = cells[0].seed if cells else 0
        self._first = [cell for cell in ordered if cell.seed == first_seed]
        self._further = [cell for cell in ordered if cell.seed != first_seed]
        self._within = within_octaves
        self._curves: dict[object, list[Cell]] = {}
        for cell in self._first:
            self._curves.setdefault(cell.curve, []).append(cell)

    def wanted(self, rows: Mapping[str, Row]) -> list[Cell]:
        """See ``Strategy``."""
        windows = {key: self._window(curve, rows) for key, curve in self._curves.items()}
        further = []
        for cell in self._further:
            window = windows.get(cell.curve)
            if window is not None and window[0] <= cell.log2_lr <= window[1]:
                further.append(cell)
        return [*self._first, *further]

    def undecided(self, rows: Mapping[str, Row]) -> list[Cell]:
        """See ``Strategy``."""
        return [
            cell
            for cell in self._further
            if any(row.id not in rows for row in self._curves.get(cell.curve, []))
        ]

    def _window(self, curve: Sequence[Cell], rows: Mapping[str, Row]) -> tuple[float, float] | None:
        """Learning rates of further seeds; None while the curve is not done or shows nothing."""
        if any(cell.id not in rows for cell in curve):
            return None
        results = [(rows[cell.id].validation_loss, cell.log2_lr) for cell in curve]
        finished = [item for item in results if item[0] == item[0]]
        if not finished:
            return None
        if self._within is None:
            return min(cell.log2_lr for cell in curve), max(cell.log2_lr for cell in curve)
        best = min(finished)[1]
        # A grid's steps may be no binary fractions.
        reach = self._within + 1e-9
        return best - reach, best + reach


def in_starting_order(sweep: Sweep, cells: Sequence[Cell]) -> Sequence[Cell]:
    """The grid's cells as they should start, those of equal cost in this order.

    Args:
        sweep: as asked for; only early stopping has a reason to change the order.
        cells: of the whole grid, as in the YAML.
    """
    return cells if sweep.stop_early is None else middle_first(cells)


def grid_of(sweep: Sweep, cells: Sequence[Cell]) -> SeedsNearMinimum:
    """What decides which cells of the grid run; what refinement adds is not in it.

    Args:
        sweep: as asked for.
        cells: of the whole grid, as in the YAML.
    """
    return SeedsNearMinimum(in_starting_order(sweep, cells), sweep.seeds_within_octaves)
