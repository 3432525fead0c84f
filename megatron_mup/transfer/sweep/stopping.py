"""Ends a run whose learning rate is surely not the best before its time (our rule).

At the given part of the run, and at every further tenth, the mean loss of the last twentieth of
the steps is compared with that of the other learning rates of the same arm, size and seed at the
same step. A run ends when the lowest of those means

    lies below its own by more than ``margin`` times the scatter of one step's loss, and
    belongs to a learning rate that is not near: a fit of the minimum would not use the run if the
    lowest loss came to lie there, or at a neighbour on the grid.

A loss in the middle of a run says little of learning rates side by side, because the higher one
gains more when the learning rate decays; of those far apart it does. The lowest loss may therefore
still move to a neighbour. ``contest`` is the parent's part, ``Contest`` the worker's. Must not
import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_mup.errors import DataError
from megatron_mup.transfer.sweep.cells import Cell
from megatron_mup.transfer.sweep.curves import losses_by_step, read_curve
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.spec import StopEarly

SMOOTHED = 0.05
"""Part of a run whose mean loss is compared (ours)."""

SCATTERED = 0.2
"""Part of a run from which the scatter of one step is taken (ours): more steps, as it is steady."""

FEWEST_DIFFERENCES = 10
"""Differences of neighbouring steps below which their scatter is not known (ours)."""

_EVERY = 0.1
_ROUNDING = 1e-6


def looks(after: float, planned: int) -> list[int]:
    """Steps after which a run is compared with the others.

    Args:
        after: part of the run before the first time.
        planned: steps of the whole run.
    """
    count = math.ceil((1 - after) / _EVERY)
    steps = {round(planned * (after + _EVERY * number)) for number in range(count)}
    return sorted(step for step in steps if 0 < step < planned)


def smoothed(losses: Sequence[float], step: int, planned: int) -> float:
    """Mean loss of the last twentieth of a run's steps before a step; NaN if it has none there.

    Args:
        losses: nats per token, one a step.
        step: counted from 1; the last one that counts.
        planned: steps of the whole run.
    """
    if len(losses) < step:
        return math.nan
    finite = _window(losses, step, math.ceil(SMOOTHED * planned))
    return sum(finite) / len(finite) if finite else math.nan


def scatter(losses: Sequence[float], step: int, planned: int) -> float:
    """Standard deviation of one step's loss about its trend, from differences of neighbours.

    Source: von Neumann et al. 1941 (Ann. Math. Stat. 12), the mean square successive difference.

    Args:
        losses: nats per token, one a step.
        step: counted from 1; the last one that counts.
        planned: steps of the whole run.

    Returns:
        Nats per token; NaN with fewer than ``FEWEST_DIFFERENCES``.
    """
    finite = _window(losses, step, math.ceil(SCATTERED * planned))
    squares = [(right - left) ** 2 for left, right in pairwise(finite)]
    if len(squares) < FEWEST_DIFFERENCES:
        return math.nan
    return math.sqrt(sum(squares) / len(squares) / 2)


def _window(losses: Sequence[float], step: int, width: int) -> list[float]:
    return [loss for loss in losses[max(0, step - width) : step] if math.isfinite(loss)]


def surely_worse(
    own: Sequence[float],
    rivals: Mapping[float, Sequence[float]],
    *,
    near: Sequence[float],
    step: int,
    planned: int,
    margin: float,
) -> bool:
    """Whether a run ends here; see the module.

    Args:
        own: its losses, nats per token, one a step.
        rivals: log2 learning rate -> losses, of the other runs.
        near: learning rates that it does not end for.
        step: counted from 1; the last one that counts.
        planned: steps of a whole run.
        margin: in standard deviations of one step.
    """
    means = {rate: smoothed(losses, step, planned) for rate, losses in rivals.items()}
    known = {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
    if not known:
        return False
    best = min(known, key=lambda rate: known[rate])
    if best in near:
        return False
    gap = smoothed(own, step, planned) - known[best]
    # False where the scatter is not known.
    return gap > margin * scatter(rivals[best], step, planned)


def near_rates(log2_lr: float, rates: Sequence[float], octaves: float) -> list[float]:
    """Those of some learning rates that one of them is not ended for.

    Were the lowest loss of the whole curve at one of these, or at a neighbour of it on the grid, a
    fit of the minimum would use the run: it is within the octaves or a neighbour.

    Args:
        log2_lr: the one, which is among them.
        rates: log2 learning rates of a curve.
        octaves: that a fit uses on each side of the lowest loss.
    """
    ordered = sorted(set(rates))
    at = ordered.index(log2_lr)
    used_by = [
        index
        for index, rate in enumerate(ordered)
        if abs(index - at) <= 1 or abs(rate - log2_lr) <= octaves + _ROUNDING
    ]
    return ordered[max(0, used_by[0] - 1) : used_by[-1] + 2]


def contest(
    cell: Cell, wanted: Sequence[Cell], *, rule: StopEarly, folder: SweepFolder
) -> dict[str, Any]:
    """What a worker has to know to end a cell early, as plain data.

    Args:
        cell: that it trains.
        wanted: cells of the sweep.
        rule: what the sweep asks for.
        folder: where the losses of the others lie or will lie.
    """
    # Imports scipy, which a sweep that ends nothing early need not wait for.
    from megatron_mup.transfer.fits.window import WIDE

    rivals = [
        other
        for other in wanted
        if (other.curve, other.seed) == (cell.curve, cell.seed) and other.log2_lr != cell.log2_lr
    ]
    rates = [cell.log2_lr, *(rival.log2_lr for rival in rivals)]
    return {
        "looks": looks(rule.after, cell.run.training.train_iters),
        "planned": cell.run.training.train_iters,
        "margin": rule.margin,
        "near": near_rates(cell.log2_lr, rates, WIDE),
        "own": str(folder.metrics(cell.id)),
        "rivals": [[rival.log2_lr, _files(folder, rival)] for rival in rivals],
    }


def _files(folder: SweepFolder, cell: Cell) -> list[str]:
    return [str(folder.curve(cell.id)), str(folder.metrics(cell.id))]


class Contest:
    """A running cell beside the others.

    Args:
        data: what ``contest`` gave.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data
        self._looks = frozenset(data["looks"])

    def ends_after(self, step: int) -> bool:
        """Whether the cell ends after this step; reads files at a few steps only.

        Args:
            step: that was made last, counted from 1.
        """
        if step not in self._looks:
            return False
        data = self._data
        return surely_worse(
            _losses([(_losses_so_far, data["own"])]),
            {rate: _losses_of_rival(*files) for rate, files in data["rivals"]},
            near=data["near"],
            step=step,
            planned=data["planned"],
            margin=data["margin"],
        )


def _losses_of_rival(curve: str, metrics: str) -> list[float]:
    """Losses of a cell that is through, runs or was interrupted; none of another."""
    # One that ends meanwhile leaves its curve before its metrics go.
    return _losses([(_losses_so_far, metrics), (read_curve, curve)])


def _losses(places: Sequence[tuple[Callable[[Path], list[float]], str]]) -> list[float]:
    """What the first place gives that can be read; a cell without losses decides nothing."""
    for read, path in places:
        with suppress(DataError):
            return read(Path(path))
    return []


def _losses_so_far(metrics: Path) -> list[float]:
    from megatron_mup.training.metrics import read_metrics

    return losses_by_step(read_metrics(metrics))
