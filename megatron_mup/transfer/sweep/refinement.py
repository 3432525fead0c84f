"""Adds runs around each minimum, in rounds, until its interval is narrow enough.

A strategy on top of another one. All sizes of one arm, and one value of every further axis, make
their rounds together: noise and shape of their curves are fitted together, as the report does.
Nothing is remembered: what is decided follows from the rows alone, so that a sweep that was
stopped decides the same when it goes on. Must not import torch; scipy only to fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from megatron_mup.data.publication import publish_text
from megatron_mup.transfer.runs import Row, Status
from megatron_mup.transfer.sweep.cells import Cell, with_rate_and_seed
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.order import SeedsNearMinimum, Strategy, ended, grid_of
from megatron_mup.transfer.sweep.refinement_rule import Choice, Tried, choose
from megatron_mup.transfer.sweep.spec import Refine, Sweep

if TYPE_CHECKING:
    from megatron_mup.transfer.fits import Minimum

_Group = tuple[str, tuple[tuple[str, str], ...]]
_Curve = tuple[str, float, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided for one curve in one round.

    Attributes:
        arm: name of the variant.
        size: value on the scaled axis.
        settings: values on further axes, option -> value.
        round: counted from 1.
        action: "extend", "halve", "seeds" or "stop".
        runs: (log2 learning rate, seed) that are added.
        log2_lr: the optimum as fitted; None: not identifiable.
        low: lower end of its 90% interval; None: unbounded.
        high: upper end.
        reason: in words.
    """

    arm: str
    size: float
    settings: Mapping[str, str]
    round: int
    action: str
    runs: tuple[tuple[float, int], ...]
    log2_lr: float | None
    low: float | None
    high: float | None
    reason: str

    @property
    def words(self) -> str:
        """The decision for a progress line."""
        further = "".join(f" {key.split('.')[-1]}={text}" for key, text in self.settings.items())
        # What adds no runs is no round, but how the one before it ended.
        when, added = f"round {self.round}", f"{len(self.runs)} more runs"
        if not self.runs:
            before = f"round {self.round - 1}" if self.round > 1 else "the grid"
            when, added = f"after {before}", "no more runs"
        return f"{self.arm} {self.size:g}{further}, {when}: {added}, {self.reason}"

    @property
    def record(self) -> dict[str, Any]:
        """As plain data."""
        return {
            **asdict(self),
            "settings": dict(self.settings),
            "runs": [list(run) for run in self.runs],
        }


class Refinement:
    """See the module.

    Args:
        cells: all cells of the grid.
        grid: decides which of those run.
        refine: what the sweep asks for.
        seeds: of the sweep, the first one first.
    """

    def __init__(
        self, cells: Sequence[Cell], grid: Strategy, *, refine: Refine, seeds: Sequence[int]
    ) -> None:
        self._grid, self._refine, self._seeds = grid, refine, tuple(seeds)
        self._any_cell: dict[_Curve, Cell] = {}
        for cell in cells:
            self._any_cell.setdefault(cell.curve, cell)
        self._groups = list(dict.fromkeys(map(_group, cells)))
        self._cells = {(cell.curve, cell.log2_lr, cell.seed): cell for cell in cells}
        self._fitted: dict[tuple[_Group, int], tuple[object, dict[_Curve, Minimum]]] = {}

    def wanted(self, rows: Mapping[str, Row]) -> list[Cell]:
        """See ``Strategy``."""
        return [*self._grid.wanted(rows), *self.added(rows)]

    def added(self, rows: Mapping[str, Row]) -> list[Cell]:
        """Those of ``wanted`` that the rounds so far have added, whether they ran or not."""
        added = [cell for _, cells in self._replayed(rows) for cell in cells]
        return sorted(added, key=lambda cell: -cell.flops)

    def undecided(self, rows: Mapping[str, Row]) -> list[Cell]:
        """See ``Strategy``; what further rounds will add cannot be told."""
        return self._grid.undecided(rows)

    def decisions(self, rows: Mapping[str, Row]) -> list[Decision]:
        """All decisions that follow from the rows, arm by arm, round by round."""
        return [decision for decisions, _ in self._replayed(rows) for decision in decisions]

    def _replayed(self, rows: Mapping[str, Row]) -> list[tuple[list[Decision], list[Cell]]]:
        wanted = self._grid.wanted(rows)
        return [
            self._replay(group, [cell for cell in wanted if _group(cell) == group], rows)
            for group in self._groups
        ]

    def _replay(
        self, group: _Group, known: list[Cell], rows: Mapping[str, Row]
    ) -> tuple[list[Decision], list[Cell]]:
        """All rounds of one group for which there are rows."""
        rounds = _Rounds(known, self._refine, self._seeds)
        if self._refine.max_cells is not None:
            rounds.left = self._refine.max_cells // len(self._groups)
        # One round more than may add runs: it says how it ended.
        for number in range(1, self._refine.max_rounds + 2):
            cells = [*known, *rounds.added]
            # Further seeds of the grid are wanted when its first one is through. A failed run is
            # tried again; what it gives may change what is decided.
            if not rounds.open or not all(ended(rows.get(cell.id)) for cell in cells):
                break
            minima = self._minima((group, number), cells, rows)
            stopped = _stopped(cells, rows)
            for curve in list(rounds.open):
                added = rounds.decide(curve, number, minima[curve], stopped=stopped[curve])
                for rate, seed in added:
                    rounds.added.append(self._cell(curve, rate, seed))
        return rounds.decisions, rounds.added

    def _cell(self, curve: _Curve, log2_lr: float, seed: int) -> Cell:
        key = curve, log2_lr, seed
        if key not in self._cells:
            first = self._any_cell[curve]
            self._cells[key] = with_rate_and_seed(first, log2_lr=log2_lr, seed=seed)
        return self._cells[key]

    def _minima(
        self, key: tuple[_Group, int], cells: Sequence[Cell], rows: Mapping[str, Row]
    ) -> dict[_Curve, Minimum]:
        """Minimum of each curve of a group; fitted once, as the question is asked all the time."""
        runs = [(cell, rows[cell.id]) for cell in cells]
        signature = [(row.cell, row.status, repr(row.validation_loss)) for _, row in runs]
        known = self._fitted.get(key)
        if known is None or known[0] != signature:
            self._fitted[key] = (signature, _fit(runs))
        return self._fitted[key][1]


class _Rounds:
    """What is decided of one group, from round to round.

    Args:
        known: cells of the grid.
        refine: what the sweep asks for.
        seeds: of the sweep.
    """

    def __init__(self, known: Sequence[Cell], refine: Refine, seeds: tuple[int, ...]) -> None:
        self._refine, self._seeds = refine, seeds
        self._runs: dict[_Curve, set[tuple[float, int]]] = {}
        for cell in known:
            self._runs.setdefault(cell.curve, set()).add((cell.log2_lr, cell.seed))
        self._coarse = {curve: {rate for rate, _ in runs} for curve, runs in self._runs.items()}
        # Where runs are limited, the largest sizes matter most to what is predicted beyond them.
        self.open = sorted(self._runs, key=lambda curve: -curve[1])
        self.left = math.inf
        self.added: list[Cell] = []
        self.decisions: list[Decision] = []

    def decide(
        self, curve: _Curve, number: int, minimum: Minimum, *, stopped: frozenset[float]
    ) -> list[tuple[float, int]]:
        """Decide for one curve; returns what it is given."""
        tried = Tried(
            minimum=minimum,
            coarse=tuple(sorted(self._coarse[curve])),
            runs=frozenset(self._runs[curve]),
            seeds=self._seeds,
            stopped=stopped,
        )
        choice = self._limited(choose(tried, self._refine), number)
        self.decisions.append(_decision(curve, number, choice, minimum))
        if choice.action == "stop":
            self.open.remove(curve)
        if choice.action == "extend":
            self._coarse[curve] |= {rate for rate, _ in choice.runs}
        self._runs[curve] |= set(choice.runs)
        self.left -= len(choice.runs)
        return list(choice.runs)

    def _limited(self, choice: Choice, number: int) -> Choice:
        """The choice, as far as the limits of the sweep allow it."""
        if choice.action == "stop":
            return choice
        if number > self._refine.max_rounds:
            limit = f"refine.max_rounds {self._refine.max_rounds} is used up"
            return Choice(action="stop", reason=f"{limit}; {choice.reason}")
        if len(choice.runs) <= self.left:
            return choice
        limit = f"refine.max_cells {self._refine.max_cells} leaves {self.left:g} runs here"
        runs = choice.runs[: int(self.left)]
        action = choice.action if runs else "stop"
        return Choice(action=action, runs=runs, reason=f"{limit}; {choice.reason}")


def _group(cell: Cell) -> _Group:
    arm, _, settings = cell.curve
    return arm, settings


def _fit(runs: Sequence[tuple[Cell, Row]]) -> dict[_Curve, Minimum]:
    """Fit all curves of a group together; runs that were stopped early have no final loss."""
    # Imports scipy, which a sweep without refinement need not wait for.
    from megatron_mup.transfer.fits import Curve, fit_minima

    curves: dict[_Curve, list[tuple[Cell, float]]] = {}
    for cell, row in runs:
        kept = curves.setdefault(cell.curve, [])
        if row.status in (Status.FINISHED, Status.DIVERGED):
            kept.append((cell, row.validation_loss))
    minima = fit_minima(
        [
            # The rate as the sweep writes it now: an older row may differ in the last digit.
            Curve(
                size=curve[1],
                log2_lrs=tuple(cell.log2_lr for cell, _ in kept),
                losses=tuple(loss for _, loss in kept),
                seeds=tuple(cell.seed for cell, _ in kept),
            )
            for curve, kept in curves.items()
        ]
    )
    return dict(zip(curves, minima, strict=True))


def _stopped(cells: Sequence[Cell], rows: Mapping[str, Row]) -> dict[_Curve, frozenset[float]]:
    """Learning rates of each curve at which every run was stopped early."""
    statuses: dict[_Curve, dict[float, set[Status]]] = {}
    for cell in cells:
        of_curve = statuses.setdefault(cell.curve, {})
        of_curve.setdefault(cell.log2_lr, set()).add(rows[cell.id].status)
    return {
        curve: frozenset(rate for rate, found in rates.items() if found == {Status.STOPPED_EARLY})
        for curve, rates in statuses.items()
    }


def _decision(curve: _Curve, number: int, choice: Choice, minimum: Minimum) -> Decision:
    arm, size, settings = curve
    return Decision(
        arm=arm,
        size=size,
        settings=dict(settings),
        round=number,
        action=choice.action,
        runs=choice.runs,
        log2_lr=minimum.log2_lr.value,
        low=minimum.log2_lr.low,
        high=minimum.log2_lr.high,
        reason=choice.reason,
    )


def strategy_of(sweep: Sweep, cells: Sequence[Cell]) -> SeedsNearMinimum | Refinement:
    """What decides which cells run.

    Args:
        sweep: as asked for.
        cells: all cells of its grid.
    """
    grid = grid_of(sweep, cells)
    if sweep.refine is None:
        return grid
    return Refinement(cells, grid, refine=sweep.refine, seeds=sweep.seeds)


def decisions_of(strategy: Strategy, rows: Mapping[str, Row]) -> list[Decision]:
    """Decisions of a strategy that refines; of another one none."""
    return strategy.decisions(rows) if isinstance(strategy, Refinement) else []


def added_cells(strategy: Strategy, rows: Mapping[str, Row]) -> list[Cell]:
    """Cells that a strategy has added to those of its grid; of one that does not refine none."""
    return strategy.added(rows) if isinstance(strategy, Refinement) else []


class DecisionLog:
    """Keeps ``refinement.jsonl`` and tells what is not in it yet.

    Args:
        folder: of the sweep, locked by this process.
        strategy: that decides.
        echo: receives a line for each new decision.
    """

    def __init__(
        self, folder: SweepFolder, strategy: Strategy, echo: Callable[[str], None]
    ) -> None:
        self._folder, self._strategy, self._echo = folder, strategy, echo
        path = folder.refinement
        self._kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def update(self, rows: Mapping[str, Row]) -> None:
        """Write all decisions anew if there are other ones than before.

        Args:
            rows: cell id -> row, of everything that ended.
        """
        if self._folder.task is not None:
            # Tasks do not refine, and share the file with a command that does.
            return
        decisions = decisions_of(self._strategy, rows)
        lines = [json.dumps(decision.record) for decision in decisions]
        if lines == self._kept:
            return
        publish_text(self._folder.refinement, "".join(f"{line}\n" for line in lines))
        for line, decision in zip(lines, decisions, strict=True):
            if line not in self._kept:
                self._echo(f"refine {decision.words}")
        self._kept = lines
