"""What the training loop itself costs: everything in a step but schedule and optimizer.

The loop runs as a user runs it (its own log lines, metrics file, checks for signals), on random
tokens, and clocks run inside it: the whole step, Megatron's pipeline schedule, and Megatron's
optimizer step. What is left over is the loop's, and so is reading the batches, although it happens
inside the schedule.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_mup.benchmark.contestants import random_batches
from megatron_mup.config import RunConfig
from megatron_mup.training import loop, step
from megatron_mup.training.batches import Batch, micro_batches
from megatron_mup.training.preparation import TrainData
from megatron_mup.training.processes import Launch
from megatron_mup.training.state import build_state
from megatron_mup.training.step import train_step

LIMIT = 0.02
"""Largest share of a step that the loop may take, which ``make bench`` checks."""

WARMUP_STEPS = 3
"""Steps that are not counted: first allocations and optimizer state."""


@dataclass(frozen=True)
class LoopCost:
    """Seconds of wall clock per step, medians.

    Attributes:
        model: its size in words.
        step_seconds: from the start of a step to the start of the next.
        engine_seconds: of them, in Megatron's schedule and optimizer.
        share: median over steps of the rest's share of the step.
        steps: how many steps were measured.
        limit: largest share that is accepted.
    """

    model: str
    step_seconds: float
    engine_seconds: float
    share: float
    steps: int
    limit: float

    @property
    def met(self) -> bool:
        """Whether the loop keeps its limit."""
        return self.share <= self.limit


class RandomTokens:
    """Samples of random tokens, made once."""

    def __init__(self, run: RunConfig, batches: int = 8) -> None:
        self._rows = [
            {key: values[row] for key, values in batch.items()}
            for batch in random_batches(run, batches)
            for row in range(run.training.micro_batch_size)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        return self._rows[index]


class _Stopwatch:
    """Seconds inside the engine, step by step."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.engine: list[float] = []

    def step_begins(self) -> None:
        self.starts.append(time.perf_counter())
        self.engine.append(0.0)

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted as the engine's."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.engine[-1] += time.perf_counter() - start

        return call

    def charged_to_loop(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; reading them is no work of the schedule that asks for them."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.engine[-1] -= time.perf_counter() - start
            if batch is None:
                return
            yield batch


@contextmanager
def _clocks(watch: _Stopwatch) -> Iterator[None]:
    """Put the stopwatch into the step for a while."""

    def counted_step(*args: Any, **kwargs: Any) -> Any:
        watch.step_begins()
        return train_step(*args, **kwargs)

    def timed_schedule() -> Callable[..., Any]:
        return watch.timed(get_forward_backward_func())

    def timed_state(run: RunConfig) -> Any:
        state = build_state(run)
        state.optimizer.step = watch.timed(state.optimizer.step)
        return state

    def charged_batches(*args: Any, **kwargs: Any) -> Iterator[Batch]:
        return watch.charged_to_loop(micro_batches(*args, **kwargs))

    with (
        mock.patch.object(loop, "micro_batches", charged_batches),
        mock.patch.object(loop, "train_step", counted_step),
        mock.patch.object(loop, "build_state", timed_state),
        mock.patch.object(step, "get_forward_backward_func", timed_schedule),
    ):
        yield


def loop_cost(run: RunConfig, model: str, folder: Path, *, steps: int) -> LoopCost:
    """Train for a few steps and measure the loop's share.

    Args:
        run: what to train; length and metrics file are set here.
        model: its size in words.
        folder: receives the metrics file.
        steps: steps to measure.
    """
    total = WARMUP_STEPS + steps + 1
    run = dataclasses.replace(
        run,
        training=dataclasses.replace(run.training, train_iters=total),
        logging=dataclasses.replace(run.logging, metrics_path=str(folder / f"{model}.jsonl")),
    )
    watch = _Stopwatch()
    with _clocks(watch):
        loop.train(run, data=TrainData(RandomTokens(run)), launch=Launch(), echo=_silent)
    spans = [
        (end - start, engine)
        for start, end, engine in zip(watch.starts, watch.starts[1:], watch.engine, strict=False)
    ][WARMUP_STEPS:]
    return LoopCost(
        model=model,
        step_seconds=statistics.median(span for span, _ in spans),
        engine_seconds=statistics.median(engine for _, engine in spans),
        share=statistics.median((span - engine) / span for span, engine in spans),
        steps=len(spans),
        limit=LIMIT,
    )


def _silent(_line: str) -> None:
    """The loop's lines are not the benchmark's."""
