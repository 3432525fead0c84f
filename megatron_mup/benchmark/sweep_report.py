"""What was measured of sweeps, judged, as a section of the page of benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MARK = "<!-- sweep: written by python -m megatron_mup.benchmark.sweep -->"
"""First line of the section."""

LEAST_GAIN = 0.85
"""Least throughput of each worker, as a share of one at a time: 1.7 times for two workers."""

MOST_OVERHEAD_SECONDS = 2.0
"""Most that a run may cost beside its steps, once a worker has started."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Sweeps of one width.

    Attributes:
        width: hidden size.
        workers: side by side.
        cells: runs of a sweep.
        steps: of each run.
        alone: seconds a run with one at a time and the threads of a worker, one for each round.
        all_cores: seconds a run with one at a time and all cores as threads.
        together: seconds a run with workers side by side, one for each round.
        overhead: seconds a run of one step.
    """

    width: int
    workers: int
    cells: int
    steps: int
    alone: tuple[float, ...]
    all_cores: tuple[float, ...]
    together: tuple[float, ...]
    overhead: float

    @property
    def gains(self) -> list[float]:
        """Throughput side by side over that of one at a time, round by round."""
        return [one / many for one, many in zip(self.alone, self.together, strict=True)]

    @property
    def gain(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.gains)

    @property
    def least_gain(self) -> float:
        """That is demanded."""
        return LEAST_GAIN * self.workers


def missed(measured: Sequence[Measured]) -> list[str]:
    """One line for each limit that was not kept."""
    lines = [
        f"width {one.width}: {one.workers} workers give {one.gain:.2f} times the throughput, less "
        f"than {one.least_gain:.2f}"
        for one in measured
        if one.gain < one.least_gain
    ]
    return lines + [
        f"width {one.width}: a run of one step takes {one.overhead:.2f} s, not less than "
        f"{MOST_OVERHEAD_SECONDS:g}"
        for one in measured
        if one.overhead >= MOST_OVERHEAD_SECONDS
    ]


def table(measured: Sequence[Measured]) -> str:
    """One row a width, Markdown."""
    rows = [
        "| width | workers | runs of | rounds | s a run, one at a time | the same, all cores "
        "| s a run, side by side | throughput | least to most | at least | met "
        "| s a run of one step | below | met |",
        "|" + " ---: |" * 14,
    ]
    for one in measured:
        gains = one.gains
        cells = [
            str(one.width),
            str(one.workers),
            f"{one.steps} steps",
            str(len(gains)),
            f"{statistics.median(one.alone):.2f}",
            f"{statistics.median(one.all_cores):.2f}",
            f"{statistics.median(one.together):.2f}",
            f"{one.gain:.2f}",
            f"{min(gains):.2f} to {max(gains):.2f}",
            f"{one.least_gain:.2f}",
            _verdict(one.gain >= one.least_gain),
            f"{one.overhead:.2f}",
            f"{MOST_OVERHEAD_SECONDS:.2f}",
            _verdict(one.overhead < MOST_OVERHEAD_SECONDS),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _verdict(met: bool) -> str:
    return "yes" if met else "NO"


def section(measured: Sequence[Measured], circumstances: Mapping[str, str]) -> str:
    """The whole section, Markdown.

    Args:
        measured: one entry a width.
        circumstances: machine, versions, commit, date and command, by name.
    """
    facts = "\n".join(f"| {name} | {value} |" for name, value in circumstances.items())
    parts = [
        MARK,
        "# Throughput of sweeps",
        table(measured),
        f"| | |\n|---|---|\n{facts}",
        _METHOD,
    ]
    return "\n\n".join(parts)


# A constant, so that no measurement's number can slip into what does not depend on it.
_METHOD = """\
## What is measured of sweeps

`megatron-mup sweep run` on installed Python text: 2 layers, 16 dimensions a head, 1,024 tokens,
sequences of 128, 16 a batch, one learning rate a run, an evaluation of one batch.

- **side by side**: the cores divided between the workers; **one at a time**: one such worker, which
  computes the same losses; **all cores**: one worker with all cores as threads. All three run the
  same sweep anew in each round, and which comes first turns from round to round.
- **s a run**: wall clock from the end of the first run (side by side: of the first run of each
  worker) to the end of the last, for each run in between. The start of the workers does not count.
- **throughput**: side by side over one at a time in one round; the median of the rounds is judged.
- **a run of one step**: the same with one worker and runs of one step: building the model and the
  data, one step, an evaluation of one batch and the row; all that a run costs beside its steps.
"""
