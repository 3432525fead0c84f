"""Sweeps that refine themselves, on losses with known optima: how often their intervals hold.

The rule that adds runs looks at the intervals, so that coverage is measured with it at work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_mup.transfer.fits import Minimum, fit_minima
from megatron_mup.transfer.report.study import curves_of
from megatron_mup.transfer.runs import Row
from megatron_mup.transfer.sweep.refinement import decisions_of, strategy_of
from tests.transfer.sweep.sweeps import cells_of, row_of, sweep_of

WIDTHS = (32, 64, 128)
# Nats: curvature per octave^2, sd of one run, sd of a seed's level; octaves about the middle rate.
CURVATURE, NOISE, SEED_EFFECT, REACH = 0.04, 0.015, 0.02, 0.5
GRID = {"log2_min": -9, "log2_max": -3, "step": 1}
MIDDLE = -6.0

DESIGNS: dict[str, dict[str, Any]] = {
    "1 seed, not refined": {"seeds": [1]},
    "1 seed, refined": {"seeds": [1], "refine": {}},
    "3 seeds, not refined": {"seeds": [1, 2, 3]},
    "3 seeds, refined": {"seeds": [1, 2, 3], "refine": {}},
}


@dataclass
class Held:
    """Optima of many sweeps.

    Attributes:
        sweeps: number of them.
        runs: of all sweeps.
        given: optima with an interval that has both ends.
        held: of these, those whose interval holds the truth.
        narrow: of those given, those whose refinement ended as narrow enough.
        narrow_held: of these, those whose interval holds the truth.
    """

    sweeps: int = 0
    runs: int = 0
    given: int = 0
    held: int = 0
    narrow: int = 0
    narrow_held: int = 0

    def table_row(self, name: str) -> str:
        """A line of the Markdown table."""
        narrow = f"{100 * self.narrow / (len(WIDTHS) * self.sweeps):.0f}%" if self.narrow else "-"
        of_these = f"{100 * self.narrow_held / self.narrow:.0f}%" if self.narrow else "-"
        optimum = f"{100 * self.held / self.given:.0f}%"
        return f"| {name} | {self.runs / self.sweeps:.0f} | {optimum} | {narrow} | {of_these} |"


HEADER = (
    "| sweep of 3 widths x 7 rates | runs | optimum | narrow enough | optimum of these |",
    "|---|---|---|---|---|",
)


def measure_refined(design: dict[str, Any], replications: int, *, seed: int = 20240406) -> Held:
    """Run many sweeps of one design to their end, refinement included."""
    options = {**design, "scale": {"axis": "width", "values": list(WIDTHS)}, "learning_rate": GRID}
    cells, rng, held = cells_of(**options), np.random.default_rng(seed), Held()
    sweep = sweep_of(**options)
    for _ in range(replications):
        optima = {float(width): MIDDLE + rng.uniform(-REACH, REACH) for width in WIDTHS}
        strategy = strategy_of(sweep, cells)
        rows: dict[str, Row] = {}
        levels: dict[tuple[float, int], float] = {}
        while missing := [cell for cell in strategy.wanted(rows) if cell.id not in rows]:
            for cell in missing:
                level = levels.setdefault((cell.size, cell.seed), rng.normal(3.0, SEED_EFFECT))
                loss = level + CURVATURE / 2 * (cell.log2_lr - optima[cell.size]) ** 2
                rows[cell.id] = row_of(cell, float(loss + rng.normal(0.0, NOISE)))
        narrow = {
            decision.size
            for decision in decisions_of(strategy, rows)
            if decision.reason.startswith("narrow enough")
        }
        held.sweeps += 1
        held.runs += len(rows)
        for minimum in fit_minima(curves_of(list(rows.values()))):
            _count(held, minimum, optima[minimum.size], narrow=minimum.size in narrow)
    return held


def _count(held: Held, minimum: Minimum, optimum: float, *, narrow: bool) -> None:
    low, high = minimum.log2_lr.low, minimum.log2_lr.high
    if low is None or high is None:
        return
    holds = low <= optimum <= high
    held.given += 1
    held.held += holds
    held.narrow += narrow
    held.narrow_held += holds and narrow
