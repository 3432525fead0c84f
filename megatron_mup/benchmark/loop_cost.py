"""What the training loop itself costs: everything in a step but schedule and optimizer.

The loop runs as a user runs it (its own log lines, metrics file, checks for signals), on random
tokens, and a stopwatch inside it books every moment of a step to one part: Megatron's pipeline
schedule and optimizer step, or one of the loop's own. Reading the batches and judging the step are
the loop's, although they happen inside of the schedule and the optimizer.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_mup.benchmark.contestants import random_batches
from megatron_mup.config import RunConfig
from megatron_mup.status import StatusWriter
from megatron_mup.training import loop, step
from megatron_mup.training.bad_steps import BadSteps
from megatron_mup.training.batches import Batch, micro_batches
from megatron_mup.training.exit_requests import ExitRequests
from megatron_mup.training.interval import Interval
from megatron_mup.training.metrics import JsonLines, console_line
from megatron_mup.training.preparation import TrainData
from megatron_mup.training.processes import Launch
from megatron_mup.training.state import build_state
from megatron_mup.training.step import train_step

LIMIT = 0.02
"""Largest share of a step that the loop may take, which ``make bench`` checks."""

WARMUP_STEPS = 3
"""Steps that are not counted: first allocations and optimizer state."""


ENGINE = "schedule and optimizer"
ZEROING = "zeroing gradients"
BATCHES = "batches"
METRICS = "metrics and log"
GUARDS = "bad steps"
SIGNALS = "requests to stop"
REST = "the rest"
PARTS = (ENGINE, ZEROING, BATCHES, METRICS, GUARDS, SIGNALS, REST)
"""Parts of a step; all but the first are the loop's."""


@dataclass(frozen=True)
class LoopCost:
    """Seconds of wall clock per step, means over steps.

    Means, because log lines come with every tenth step only and a median would not see them.

    Attributes:
        model: its size in words.
        seconds: of each part of a step, from its start to the start of the next.
        steps: how many steps were measured.
        limit: largest share that is accepted.
    """

    model: str
    seconds: Mapping[str, float]
    steps: int
    limit: float

    @property
    def step_seconds(self) -> float:
        """A whole step."""
        return sum(self.seconds.values())

    @property
    def engine_seconds(self) -> float:
        """Of them, in Megatron's schedule and optimizer."""
        return self.seconds[ENGINE]

    @property
    def share(self) -> float:
        """The loop's share of a step."""
        return 1.0 - self.engine_seconds / self.step_seconds

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
    """Seconds of each part, step by step; a part within another one is not counted there.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.steps: list[dict[str, float]] = []
        self._clock = clock
        self._part = REST
        self._since = clock()

    def step_begins(self) -> None:
        """What follows belongs to the next step."""
        self._book()
        self.steps.append(dict.fromkeys(PARTS, 0.0))

    def _book(self) -> None:
        now = self._clock()
        if self.steps:
            self.steps[-1][self._part] += now - self._since
        self._since = now

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Count what happens inside as this part's."""
        self._book()
        outer, self._part = self._part, part
        try:
            yield
        finally:
            self._book()
            self._part = outer

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted as the part's."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.within(part):
                return function(*args, **kwargs)

        return call

    def charged_to_loop(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; reading them is no work of the schedule that asks for them."""
        while True:
            with self.within(BATCHES):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


_LOOP_METHODS: Sequence[tuple[type, str, str]] = (
    (Interval, "add", METRICS),
    (Interval, "close", METRICS),
    (JsonLines, "write", METRICS),
    (StatusWriter, "logged", METRICS),
    (BadSteps, "judge", GUARDS),
    (ExitRequests, "agreed", SIGNALS),
)
"""What the loop calls in a step: class, method, part."""


@contextmanager
def _clocks(watch: _Stopwatch) -> Iterator[None]:
    """Put the stopwatch into the step for a while."""

    def counted_step(*args: Any, **kwargs: Any) -> Any:
        watch.step_begins()
        return train_step(*args, **kwargs)

    def timed_schedule() -> Callable[..., Any]:
        return watch.timed(ENGINE, get_forward_backward_func())

    def timed_state(run: RunConfig) -> Any:
        state = build_state(run)
        state.optimizer.step = watch.timed(ENGINE, state.optimizer.step)
        state.optimizer.zero_grad = watch.timed(ZEROING, state.optimizer.zero_grad)
        for chunk in state.wrapped_chunks:
            chunk.zero_grad_buffer = watch.timed(ZEROING, chunk.zero_grad_buffer)
        return state

    def charged_batches(*args: Any, **kwargs: Any) -> Iterator[Batch]:
        return watch.charged_to_loop(micro_batches(*args, **kwargs))

    with ExitStack() as stack:
        for owner, name, replacement in (
            (loop, "micro_batches", charged_batches),
            (loop, "train_step", counted_step),
            (loop, "build_state", timed_state),
            (loop, "console_line", watch.timed(METRICS, console_line)),
            (step, "get_forward_backward_func", timed_schedule),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        for kind, name, part in _LOOP_METHODS:
            timed = watch.timed(part, getattr(kind, name))
            stack.enter_context(mock.patch.object(kind, name, timed))
        yield


def loop_cost(run: RunConfig, model: str, folder: Path, *, steps: int) -> LoopCost:
    """Train for a few steps and measure the loop's share.

    Args:
        run: what to train; length, metrics file and save folder are set here.
        model: its size in words.
        folder: receives the metrics file, the status file and the last checkpoint.
        steps: steps to measure.
    """
    total = WARMUP_STEPS + steps + 1
    run = dataclasses.replace(
        run,
        training=dataclasses.replace(run.training, train_iters=total),
        # With a lease and a status file, as every run that saves; nothing is saved before the end.
        checkpoint=dataclasses.replace(run.checkpoint, save=str(folder / f"{model} loop")),
        logging=dataclasses.replace(run.logging, metrics_path=str(folder / f"{model}.jsonl")),
    )
    watch = _Stopwatch()
    with _clocks(watch):
        loop.train(run, data=TrainData(RandomTokens(run)), launch=Launch(), echo=_silent)
    # The last step's end is the end of the run, with its checkpoint.
    measured = watch.steps[WARMUP_STEPS:-1]
    return LoopCost(
        model=model,
        seconds={part: statistics.fmean(booked[part] for booked in measured) for part in PARTS},
        steps=len(measured),
        limit=LIMIT,
    )


def _silent(_line: str) -> None:
    """The loop's lines are not the benchmark's."""
