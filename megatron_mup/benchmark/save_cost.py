"""How long a checkpoint holds training up: saved in the background, and at once, by turns.

The training loop runs as a user runs it and saves its real state; only the moments of saving are
chosen here: the next save begins some steps after the last one was published, so that steps beside
a writing process and steps without one are seen in the same run. Uses the saver's public methods
only.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_mup.benchmark.loop_cost import WARMUP_STEPS, RandomTokens
from megatron_mup.checkpoint.save import CheckpointSaver
from megatron_mup.config import RunConfig
from megatron_mup.errors import CheckpointError
from megatron_mup.training import loop
from megatron_mup.training.exit_requests import ExitReason, ExitRequests
from megatron_mup.training.preparation import TrainData
from megatron_mup.training.processes import Launch
from megatron_mup.training.state import TrainState
from megatron_mup.training.step import train_step

LIMIT = 1.0
"""Steps for which a background save may stop training at the most, which ``make bench`` checks."""


@dataclass(frozen=True)
class Times:
    """Seconds of wall clock of something that was done several times."""

    median: float
    worst: float


def times(seconds: Sequence[float]) -> Times:
    """Median and worst of at least one measurement, seconds."""
    return Times(statistics.median(seconds), max(seconds))


@dataclass(frozen=True, kw_only=True)
class SaveCost:
    """What saving costs a run of one size.

    Attributes:
        model: its size in words.
        saves: saves of each kind.
        step: a training step with no writing process beside it.
        beside: a training step that began beside one.
        start: staging and forking, for a background save.
        publishing: all of its polls, the publication in the last one included.
        stopped: all time between steps from its start until the step after its publication.
        slowed: what the steps beside its writing process took longer, added up.
        at_once: a save that training waits for.
        limit: number of steps that ``stopped`` must stay under.
    """

    model: str
    saves: int
    step: Times
    beside: Times
    start: Times
    publishing: Times
    stopped: Times
    slowed: Times
    at_once: Times
    limit: float

    @property
    def stopped_steps(self) -> float:
        """The longest stop, in median steps."""
        return self.stopped.worst / self.step.median

    @property
    def met(self) -> bool:
        """Whether every background save stopped training for less than the limit."""
        return self.stopped_steps < self.limit


@dataclass
class _Background:
    """Seconds that one background save took from training."""

    start: float = 0.0
    publishing: float = 0.0
    stopped: float = 0.0
    steps: list[float] = field(default_factory=list)


class Course:
    """What was measured so far, and what is due next.

    Args:
        saves: how many of each kind.
        clock: seconds that never go back.
    """

    def __init__(self, saves: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.quiet: list[float] = []
        self.background: list[_Background] = []
        self.at_once: list[float] = []
        self.under_way: _Background | None = None
        self._saves = saves
        # The first save waits for the warm-up, the others for one quiet step between two.
        self._steps_to_wait = WARMUP_STEPS + 1
        self._edge = 0.0

    @property
    def over(self) -> bool:
        """Whether all saves are measured, the stop for the last one included."""
        return len(self.at_once) == self._saves and self.under_way is None

    def due(self) -> bool:
        """Whether the next save begins now."""
        return self.under_way is None and not self.over and self._steps_to_wait <= 0

    def step_begins(self, *, writing: bool) -> None:
        """Between two steps nothing else is done: all of it is the stop of the save under way."""
        now = self.clock()
        if self.under_way is not None:
            self.under_way.stopped += now - self._edge
            if not writing:
                self.under_way = None
        self._edge = now

    def step_ends(self) -> None:
        """Book the step."""
        now = self.clock()
        if self.under_way is None:
            self.quiet.append(now - self._edge)
            self._steps_to_wait -= 1
        else:
            self.under_way.steps.append(now - self._edge)
        self._edge = now

    def save(self, in_background: Callable[[], None], at_once: Callable[[], None]) -> None:
        """Save in the way whose turn it is."""
        self._steps_to_wait = 1
        began = self.clock()
        if len(self.background) > len(self.at_once):
            at_once()
            self.at_once.append(self.clock() - began)
            return
        self.under_way = _Background()
        self.background.append(self.under_way)
        in_background()
        self.under_way.start = self.clock() - began

    def poll(self, poll: Callable[[], None]) -> None:
        """Ask for the background save."""
        began = self.clock()
        poll()
        if self.under_way is not None:
            self.under_way.publishing += self.clock() - began

    def summary(self, model: str) -> SaveCost:
        """The whole measurement."""
        step = times(self.quiet[WARMUP_STEPS:])
        slowed = [sum(save.steps) - len(save.steps) * step.median for save in self.background]
        return SaveCost(
            model=model,
            saves=len(self.background),
            step=step,
            beside=times([seconds for save in self.background for seconds in save.steps]),
            start=times([save.start for save in self.background]),
            publishing=times([save.publishing for save in self.background]),
            stopped=times([save.stopped for save in self.background]),
            slowed=times(slowed),
            at_once=times(self.at_once),
            limit=LIMIT,
        )


class _TurnSaver:
    """Stands where the loop's saver stands: is asked after every step, and saves when it is due."""

    def __init__(self, course: Course, run: RunConfig, **options: Any) -> None:
        self._course = course
        self._background, self._at_once = (
            CheckpointSaver(
                dataclasses.replace(
                    run, checkpoint=dataclasses.replace(run.checkpoint, async_save=in_background)
                ),
                **options,
            )
            for in_background in (True, False)
        )

    @property
    def in_flight(self) -> bool:
        return self._background.in_flight

    @property
    def failed(self) -> str | None:
        return self._background.failed or self._at_once.failed

    def start(self, state: TrainState) -> None:
        if self._course.due():
            self._course.save(
                partial(self._background.start, state), partial(self._at_once.start, state)
            )
            self._check()

    def poll(self) -> None:
        self._course.poll(self._background.poll)
        self._check()

    def wait(self) -> None:
        self._background.wait()

    def close(self) -> None:
        self._background.close()
        self._at_once.close()

    def _check(self) -> None:
        """A save that failed measures nothing."""
        if self.failed is not None:
            raise CheckpointError(
                f"saving cannot be measured: {self.failed}; give a folder with room by TMPDIR"
            )


@contextmanager
def _measured(course: Course) -> Iterator[None]:
    """Put the measurement into the loop for a while."""
    agreed = ExitRequests.agreed
    savers: list[_TurnSaver] = []

    def turn_saver(run: RunConfig, **options: Any) -> _TurnSaver:
        savers.append(_TurnSaver(course, run, **options))
        return savers[0]

    def timed_step(*args: Any, **kwargs: Any) -> Any:
        course.step_begins(writing=savers[0].in_flight)
        report = train_step(*args, **kwargs)
        course.step_ends()
        return report

    def agreed_or_over(exits: ExitRequests, *, lease_lost: bool = False) -> ExitReason | None:
        reason = agreed(exits, lease_lost=lease_lost)
        return ExitReason.TIME_LIMIT if reason is None and course.over else reason

    with (
        mock.patch.object(loop, "CheckpointSaver", turn_saver),
        mock.patch.object(loop, "train_step", timed_step),
        mock.patch.object(ExitRequests, "agreed", agreed_or_over),
    ):
        yield


def save_cost(run: RunConfig, model: str, folder: Path, *, saves: int) -> SaveCost:
    """Train with saves in both ways, by turns, and measure how long they hold training up.

    Args:
        run: what to train; its checkpoint options are set here, its length ends with the last save.
        model: its size in words.
        folder: receives the checkpoints, one at a time.
        saves: saves of each kind.

    Raises:
        CheckpointError: a checkpoint cannot be saved, or the run was told to stop before the end.
    """
    checkpoint = dataclasses.replace(
        # The loop offers a save after every step; which ones are taken is decided here.
        run.checkpoint,
        save=str(folder / model),
        save_interval=1,
        keep_last=1,
    )
    run = dataclasses.replace(run, checkpoint=checkpoint)
    course = Course(saves)
    with _measured(course):
        loop.train(run, data=TrainData(RandomTokens(run)), launch=Launch(), echo=_silent)
    if not course.over:
        raise CheckpointError(
            f"the measurement of saving ended after {len(course.at_once)} of {saves} rounds, "
            "because the run was told to stop; start it again"
        )
    return course.summary(model)


def _silent(_line: str) -> None:
    """The loop's lines are not the benchmark's."""
