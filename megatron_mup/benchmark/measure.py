"""Alternating measurement of two training steps, and the ratio of their times.

The two steps of a pair run one after the other on the same batch, and the order turns round from
pair to pair, so that drift of the machine and effects of the neighbour cancel. On a CPU the clock
is that of all threads of the process (``time.process_time``), which does not count time taken by
other processes; on a GPU it is wall time between two moments at which the GPU has nothing to do.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_mup.benchmark.contestants import TrainStep
from megatron_mup.errors import ConfigError
from megatron_mup.training.batches import Batch

Row = NDArray[np.float64]

WARMUP_STEPS = 3
"""Steps of each contestant before the clock starts: first allocations and optimizer state."""

BOOTSTRAP_SAMPLES = 4000
"""Resamples behind an interval; its ends then move by less than a tenth of its width."""


@dataclass(frozen=True)
class Pairs:
    """Seconds per step of both contestants, pair by pair."""

    first: tuple[float, ...]
    second: tuple[float, ...]


@dataclass(frozen=True)
class Ratio:
    """How many times the second's time the first needs.

    Attributes:
        value: geometric mean over pairs, of the middle 80%.
        low: lower end of the 95% interval.
        high: upper end of the 95% interval.
        first_seconds: median seconds per step of the first.
        second_seconds: median seconds per step of the second.
        pairs: how many pairs were measured, or steps of each where they were not paired.
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
    with _no_collection():
        for pair in range(pairs):
            batch = batches[pair % len(batches)]
            for step in (first, second) if pair % 2 == 0 else (second, first):
                seconds[step].append(_timed(step, batch, clock))
    return Pairs(tuple(seconds[first]), tuple(seconds[second]))


def alone(
    step: TrainStep,
    batches: Sequence[Batch],
    *,
    steps: int,
    clock: Callable[[], float] = time.process_time,
) -> tuple[float, ...]:
    """Seconds of each of ``steps`` steps of one contestant, after its warmup."""
    for _ in range(WARMUP_STEPS):
        step(batches[0])
    with _no_collection():
        return tuple(_timed(step, batches[n % len(batches)], clock) for n in range(steps))


def _timed(step: TrainStep, batch: Batch, clock: Callable[[], float]) -> float:
    start = clock()
    step(batch)
    return clock() - start


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def idle_gpu_seconds() -> float:
    """Wall time in seconds, read when the GPU has finished all it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def _trimmed_mean(sorted_rows: Row) -> list[float]:
    """Mean of the middle 80% of each sorted row."""
    # Nothing is cut from fewer than ten pairs: a mean of what is there.
    cut = sorted_rows.shape[1] // 10
    kept = sorted_rows[:, cut : sorted_rows.shape[1] - cut]
    return [float(mean) for mean in kept.mean(axis=1)]


def ratio(pairs: Pairs) -> Ratio:
    """Ratio of times with its 95% percentile bootstrap interval over pairs.

    The log ratios of the pairs are averaged without the outer tenths, because a burst of foreign
    work on a shared machine costs cache and therefore CPU time as well.
    """
    # Logarithms, so that swapping the contestants gives the reciprocal ratio.
    logs = np.log(np.array(pairs.first) / np.array(pairs.second))
    return _ratio(pairs, _resampled(logs, seed=0), _middle(logs))


def unpaired_ratio(pairs: Pairs) -> Ratio:
    """The same of steps that were not measured side by side, so that drift does not cancel."""
    first, second = np.log(np.array(pairs.first)), np.log(np.array(pairs.second))
    means = _resampled(first, seed=0) - _resampled(second, seed=1)
    return _ratio(pairs, means, _middle(first) - _middle(second))


def _middle(logs: Row) -> float:
    (value,) = _trimmed_mean(np.sort(logs)[None, :])
    return value


def _resampled(logs: Row, *, seed: int) -> Row:
    """Trimmed means of the bootstrap's samples."""
    # A fixed seed: the same times give the same interval whenever they are looked at.
    picks = np.random.default_rng(seed).integers(len(logs), size=(BOOTSTRAP_SAMPLES, len(logs)))
    return np.array(_trimmed_mean(np.sort(logs[picks], axis=1)))


def _ratio(pairs: Pairs, means: Row, value: float) -> Ratio:
    low, high = np.quantile(means, [0.025, 0.975])
    return Ratio(
        value=math.exp(value),
        low=math.exp(low),
        high=math.exp(high),
        first_seconds=statistics.median(pairs.first),
        second_seconds=statistics.median(pairs.second),
        pairs=len(pairs.first),
    )
