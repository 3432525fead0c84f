"""The worker's own duties: progress, requests that come too early, a parent that is gone."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from megatron_mup.training.exit_requests import ExitReason, ExitRequests
from megatron_mup.training.outcome import TrainResult
from megatron_mup.transfer.sweep import worker
from megatron_mup.transfer.sweep.worker import Watch


def test_a_request_that_came_before_the_loop_listens_is_not_lost() -> None:
    state: Any = None
    with ExitRequests() as exits, Watch(lambda _iteration: None, lambda: True).opened(state):
        assert exits.agreed() is ExitReason.SIGUSR1
    with ExitRequests() as exits, Watch(lambda _iteration: None, lambda: False).opened(state):
        assert exits.agreed() is None


def test_progress_is_reported_about_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(worker.time, "monotonic", lambda: now)
    reports: list[int] = []
    watch = Watch(reports.append, lambda: False)
    for iteration in range(1, 11):
        now += 0.4
        assert not watch.due(iteration)
    assert reports == [3, 6, 9]


@pytest.mark.parametrize(
    ("result", "early", "end"),
    [
        (TrainResult(), False, "finished"),
        (TrainResult(stopped=ExitReason.SIGTERM), False, "stopped"),
        (TrainResult(stopped=ExitReason.SIGUSR1), True, "stopped_early"),
        # A request of the user that comes with the decision changes nothing.
        (TrainResult(stopped=ExitReason.SIGTERM), True, "stopped_early"),
        # The decision came with the last step.
        (TrainResult(), True, "finished"),
        (TrainResult(diverged=True, stopped=ExitReason.SIGUSR1), True, "diverged"),
    ],
)
def test_how_a_run_ended(result: TrainResult, early: bool, end: str) -> None:
    watch = Watch(lambda _iteration: None, lambda: False)
    watch.stopped_early = early
    assert worker._end(result, watch) == end


def test_a_worker_ends_when_its_parent_is_gone() -> None:
    command = [sys.executable, "-m", "megatron_mup.transfer.sweep.worker"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    assert done.returncode == 0
