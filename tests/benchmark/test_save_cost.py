"""The time for which a save holds training up is seen, whole, and booked to the right save."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_mup.benchmark import save_cost as module
from megatron_mup.benchmark.contestants import benchmark_run
from megatron_mup.benchmark.save_cost import Course, SaveCost, Times, save_cost, times
from megatron_mup.checkpoint.save import CheckpointSaver
from megatron_mup.errors import CheckpointError
from megatron_mup.training.state import TrainState

TINY = benchmark_run(hidden_size=64, num_layers=1, seq_length=16, batch_size=2)


def work_for(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


class SlowToStart(CheckpointSaver):
    """Stages for long, in the background saves only."""

    def __init__(self, run: object, **options: object) -> None:
        super().__init__(run, **options)  # type: ignore[arg-type]
        self.slow = run.checkpoint.async_save  # type: ignore[attr-defined]

    def start(self, state: TrainState) -> None:
        if self.slow:
            work_for(0.7)
        super().start(state)


class SlowToPublish(CheckpointSaver):
    """Holds training up when it is asked whether the writer is done."""

    def poll(self) -> None:
        work_for(0.7)
        super().poll()


class Clock:
    """Seconds that only the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


def steps(course: Course, clock: Clock, *seconds: float, writing: bool = False) -> None:
    for one in seconds:
        course.step_begins(writing=writing)
        clock.passes(one)
        course.step_ends()


def measured_round(course: Course, clock: Clock, stop: float) -> Iterator[str]:
    """One save in the background, beside two steps of 3 s, and one at once; yields in between."""
    course.save(lambda: clock.passes(stop), lambda: clock.passes(1000.0))
    yield "begun"
    clock.passes(0.125)
    steps(course, clock, 3.0, writing=True)
    course.poll(lambda: clock.passes(0.25))
    steps(course, clock, 3.0, writing=True)
    course.poll(lambda: clock.passes(0.5))
    clock.passes(0.125)
    yield "published"
    steps(course, clock, 1.0)
    yield "quiet"
    course.save(lambda: clock.passes(1000.0), lambda: clock.passes(4.0 * stop))
    steps(course, clock, 2.0)


def test_every_second_between_steps_is_booked_to_the_save_that_is_under_way() -> None:
    clock = Clock()
    course = Course(2, clock)
    # Warm-up is not counted, nor is a save due in it.
    for slow in (50.0, 60.0, 70.0):
        assert not course.due()
        steps(course, clock, slow)
    steps(course, clock, 1.5)
    for stop in (1.0, 2.0):
        due = [course.due() for _ in measured_round(course, clock, stop)]
        assert due == [False, False, True]
    assert course.over
    cost = course.summary("3M")
    assert (cost.model, cost.saves) == ("3M", 2)
    assert cost.step == Times(1.5, 2.0)
    assert cost.beside == Times(3.0, 3.0)
    assert cost.start == Times(1.5, 2.0)
    assert cost.publishing == Times(0.75, 0.75)
    assert cost.stopped == Times(2.5, 3.0)
    assert cost.slowed == Times(3.0, 3.0)
    assert cost.at_once == Times(6.0, 8.0)


def test_a_save_is_measured_only_when_the_step_after_it_has_begun() -> None:
    clock = Clock()
    course = Course(1, clock)
    steps(course, clock, 1.0, 1.0, 1.0, 1.0)
    course.save(lambda: clock.passes(1.0), lambda: None)
    assert not course.due()
    course.step_begins(writing=True)
    assert course.under_way is not None
    course.step_ends()
    course.poll(lambda: None)
    assert course.under_way is not None
    course.step_begins(writing=False)
    assert course.under_way is None
    assert not course.over


def test_a_stop_of_a_whole_step_is_not_met() -> None:
    second = Times(1.0, 1.0)
    cost = SaveCost(
        model="3M",
        saves=2,
        step=Times(1.0, 9.0),
        beside=second,
        start=second,
        publishing=second,
        stopped=Times(0.5, 1.0),
        slowed=second,
        at_once=second,
        limit=1.0,
    )
    assert not cost.met
    assert dataclasses.replace(cost, stopped=Times(0.5, 0.99)).met


def test_times_are_median_and_worst() -> None:
    assert times([5.0, 1.0, 2.0]) == Times(2.0, 5.0)


def test_a_slow_start_and_a_slow_poll_are_seen_and_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = save_cost(TINY, "usual", tmp_path, saves=2)
    assert usual.saves == 2
    assert 0 < usual.start.median < 0.7
    assert usual.stopped.worst >= usual.start.worst
    # One checkpoint stays: a measurement must not fill the disk.
    assert len(list((tmp_path / "usual").glob("iter_*"))) == 1

    monkeypatch.setattr(module, "CheckpointSaver", SlowToStart)
    slow = save_cost(TINY, "start", tmp_path, saves=2)
    assert slow.start.median >= 0.7
    assert slow.stopped.median >= 0.7
    assert slow.publishing.median < 0.7
    assert not slow.met

    monkeypatch.setattr(module, "CheckpointSaver", SlowToPublish)
    slow = save_cost(TINY, "poll", tmp_path, saves=1)
    assert slow.publishing.median >= 0.7
    assert slow.stopped.median >= slow.publishing.median
    assert slow.start.median < 0.7
    # Training waits for a save that is made at once, so its poll is the save's.
    assert slow.at_once.median >= 0.7


def test_a_save_that_fails_ends_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_fork)
    with pytest.raises(CheckpointError, match=r"saving cannot be measured: .*unavailable"):
        save_cost(TINY, "tiny", tmp_path, saves=1)


def test_a_save_at_once_that_fails_ends_the_measurement_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(SlowToStart):
        def start(self, state: TrainState) -> None:
            if self.slow:
                CheckpointSaver.start(self, state)
            else:
                self.failed = "the disk is full"

    monkeypatch.setattr(module, "CheckpointSaver", Full)
    with pytest.raises(CheckpointError, match="saving cannot be measured: the disk is full"):
        save_cost(TINY, "tiny", tmp_path, saves=1)


def test_a_run_that_is_told_to_stop_gives_no_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(CheckpointSaver):
        def start(self, state: TrainState) -> None:
            signal.raise_signal(signal.SIGUSR1)
            super().start(state)

    monkeypatch.setattr(module, "CheckpointSaver", Interrupted)
    with pytest.raises(CheckpointError, match="ended after 0 of 2 rounds"):
        save_cost(TINY, "tiny", tmp_path, saves=2)
