"""Which runs of a curve the fit may use: those around the lowest loss, bounded by divergence.

Owns the choice of the window and the grid's mean losses; fits nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_mup.transfer.fits.types import Curve

# Octaves on each side of the lowest loss: wide enough for 5 points one octave apart, narrow enough
# for the terms beyond the third order to stay below the noise (docs/transfer_statistics.md).
WIDE = 2.0
NARROW = 1.0
# Learning rates are written with few decimals; a window's end must not be lost to rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Grid:
    """A curve by learning rate.

    Attributes:
        log2_lrs: learning rates at which every run ended well, increasing.
        means: mean loss over seeds there; where seeds are missing, corrected for the seeds' levels.
        counts: runs there.
        diverged: learning rates at which a run diverged, increasing.
        lost: (diverged runs, runs) at each of them.
        all_diverged: those at which every run did.
        diverged_runs: number of runs that diverged.
    """

    log2_lrs: tuple[float, ...]
    means: tuple[float, ...]
    counts: tuple[int, ...]
    diverged: tuple[float, ...]
    lost: tuple[tuple[int, int], ...]
    all_diverged: tuple[float, ...]
    diverged_runs: int

    @property
    def best(self) -> int:
        """Index of the lowest mean loss."""
        return int(np.argmin(self.means))

    def joined(self, left: int, right: int) -> bool:
        """Whether no run diverged between two neighbouring learning rates."""
        return not any(self.log2_lrs[left] < x < self.log2_lrs[right] for x in self.diverged)

    def diverged_at(self, log2_lr: float) -> str:
        """How many runs diverged at one of ``diverged``, such as "1 of 3"."""
        count, runs = self.lost[self.diverged.index(log2_lr)]
        return f"{count} of {runs}"

    @property
    def edge(self) -> Literal["low", "high"] | None:
        """End of the grid at which the lowest loss lies."""
        best, last = self.best, len(self.log2_lrs) - 1
        if best == last or not self.joined(best, best + 1):
            return "high"
        if best == 0 or not self.joined(best - 1, best):
            return "low"
        return None


def read_grid(curve: Curve) -> Grid:
    """Sort a curve's runs by learning rate."""
    runs = list(zip(curve.log2_lrs, curve.losses, curve.seeds, strict=True))
    diverged = sorted({x for x, loss, _ in runs if not math.isfinite(loss)})
    ended = {x for x, loss, _ in runs if math.isfinite(loss)}
    usable = sorted(ended - set(diverged))
    kept = [run for run in runs if run[0] in set(usable)]
    return Grid(
        log2_lrs=tuple(usable),
        means=_means(usable, kept),
        counts=tuple(sum(run[0] == x for run in kept) for x in usable),
        diverged=tuple(diverged),
        lost=tuple(_lost([loss for at, loss, _ in runs if at == x]) for x in diverged),
        all_diverged=tuple(x for x in diverged if x not in ended),
        diverged_runs=sum(not math.isfinite(loss) for _, loss, _ in runs),
    )


def _lost(losses: list[float]) -> tuple[int, int]:
    return sum(not math.isfinite(loss) for loss in losses), len(losses)


def _means(usable: list[float], runs: list[tuple[float, float, int]]) -> tuple[float, ...]:
    """Mean loss by learning rate of the additive model learning rate + seed."""
    seeds = sorted({seed for _, _, seed in runs})
    whole = len({(at, seed) for at, _, seed in runs}) == len(usable) * len(seeds)
    if whole or not _seeds_meet(runs):
        # Every seed's level is in every mean; or none can be told from a learning rate's loss.
        return tuple(float(np.mean([loss for at, loss, _ in runs if at == x])) for x in usable)
    columns = np.array(
        [
            [float(at == x) for x in usable] + [float(seed == s) for s in seeds]
            for at, _, seed in runs
        ]
    )
    solution = np.linalg.lstsq(columns, np.array([loss for _, loss, _ in runs]), rcond=None)[0]
    level = float(solution[len(usable) :].mean())
    return tuple(float(value) + level for value in solution[: len(usable)])


def _seeds_meet(runs: list[tuple[float, float, int]]) -> bool:
    """Whether each seed shares a learning rate with another one, and so on to all of them."""
    at_rate: dict[float, set[int]] = {}
    for log2_lr, _, seed in runs:
        at_rate.setdefault(log2_lr, set()).add(seed)
    groups: list[set[int]] = []
    for seeds in at_rate.values():
        touched = [group for group in groups if group & seeds]
        groups = [group for group in groups if not group & seeds]
        groups.append(seeds.union(*touched))
    return len(groups) <= 1


def choose_window(grid: Grid, octaves: float) -> tuple[float, ...]:
    """Learning rates around the lowest loss: within ``octaves``, and its neighbours in any case.

    A diverged run ends the window. Empty where the lowest loss lies at an edge.
    """
    if not grid.log2_lrs or grid.edge is not None:
        return ()
    best = grid.best
    first = last = best
    while first > 0 and grid.joined(first - 1, first) and _near(grid, first - 1, octaves):
        first -= 1
    end = len(grid.log2_lrs) - 1
    while last < end and grid.joined(last, last + 1) and _near(grid, last + 1, octaves):
        last += 1
    return grid.log2_lrs[first : last + 1]


def _near(grid: Grid, index: int, octaves: float) -> bool:
    distance = abs(grid.log2_lrs[index] - grid.log2_lrs[grid.best])
    return distance <= octaves + _ROUNDING or abs(index - grid.best) == 1
