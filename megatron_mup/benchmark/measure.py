"""Alternating measurement of two training steps, and the ratio of their CPU times.

The two steps of a pair run one after the other on the same batch, and the order turns round from
pair to pair, so that drift of the machine and effects of the neighbour cancel. CPU-seconds of all
threads of the process (``time.process_time``) do not count time taken by other processes.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mup.benchmark.contestants import TrainStep
from megatron_mup.errors import ConfigError
from megatron_mup.training.batches import Batch

WARMUP_STEPS = 3
"""Steps of each contestant before the clock starts: first allocations and optimizer state."""

BOOTSTRAP_SAMPLES = 4000
"""Resamples behind an interval; its ends then move by less than a tenth of its width."""


@dataclass(frozen=True)
class Pairs:
    """CPU-seconds per step of both contestants, pair by pair."""

    first: tuple[float, ...]
    second: tuple[float, ...]


@dataclass(frozen=True)
class Ratio:
    """How many times the second's CPU time the first needs.

    Attributes:
        value: geometric mean over pairs, of the middle 80%.
        low: lower end of the 95% interval.
        high: upper end of the 95% interval.
        first_seconds: median CPU-seconds per step of the first.
        second_seconds: median CPU-seconds per step of the second.
        pairs: how many pairs were measured.
    """

    value: float
    low: float
    high: float
    first_seconds: float
    second_seconds: float
    pairs: int


def alternate(
    first: TrainStep,
    second: TrainStep,
    batches: Sequence[Batch],
    *,
    pairs: int,
    clock: Callable[[], float] = time.process_time,
) -> Pairs:
    """Time both steps ``pairs`` times, in the order A B, B A, A B, ...

    Args:
        first: one contestant.
        second: the other.
        batches: used in turn; both steps of a pair get the same.
        pairs: at least 2.
        clock: seconds; CPU time of the process unless a test says otherwise.

    Raises:
        ConfigError: fewer than two pairs, from which no interval follows.
    """
    if pairs < 2:
        raise ConfigError(f"--pairs is {pairs}; an interval needs at least 2")
    for step in (first, second):
        for _ in range(WARMUP_STEPS):
            step(batches[0])
    seconds: dict[TrainStep, list[float]] = {first: [], second: []}
    # Garbage collection of one contestant's cycles must not fall into the other's step.
    gc.collect()
    gc.disable()
    try:
        for pair in range(pairs):
            batch = batches[pair % len(batches)]
            for step in (first, second) if pair % 2 == 0 else (second, first):
                start = clock()
                step(batch)
                seconds[step].append(clock() - start)
    finally:
        gc.enable()
    return Pairs(tuple(seconds[first]), tuple(seconds[second]))


def _trimmed_mean(sorted_rows: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> list[float]:
    """Mean of the middle 80% of each sorted row."""
    # Nothing is cut from fewer than ten pairs: a mean of what is there.
    cut = sorted_rows.shape[1] // 10
    kept = sorted_rows[:, cut : sorted_rows.shape[1] - cut]
    return [float(mean) for mean in kept.mean(axis=1)]


def ratio(pairs: Pairs) -> Ratio:
    """Ratio of CPU times with its 95% percentile bootstrap interval over pairs.

    The log ratios of the pairs are averaged without the outer tenths, because a burst of foreign
    work on a shared machine costs cache and therefore CPU time as well.
    """
    # Logarithms, so that swapping the contestants gives the reciprocal ratio.
    logs = np.log(np.array(pairs.first) / np.array(pairs.second))
    # A fixed seed: the same times give the same interval whenever they are looked at.
    picks = np.random.default_rng(0).integers(len(logs), size=(BOOTSTRAP_SAMPLES, len(logs)))
    means = _trimmed_mean(np.sort(logs[picks], axis=1))
    (value,) = _trimmed_mean(np.sort(logs)[None, :])
    low, high = np.quantile(means, [0.025, 0.975])
    return Ratio(
        value=math.exp(value),
        low=math.exp(low),
        high=math.exp(high),
        first_seconds=statistics.median(pairs.first),
        second_seconds=statistics.median(pairs.second),
        pairs=len(logs),
    )
