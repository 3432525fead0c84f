"""Requests to stop: signals, the time limit, and agreement between ranks."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.os_processes import seconds_since_start
from megatron_mup.training.exit_requests import ExitReason, ExitRequests
from tests.distributed.spawn import run_ranks


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_each_signal_is_a_request_with_its_name(name: str) -> None:
    with ExitRequests() as requests:
        assert requests.agreed() is None
        os.kill(os.getpid(), signal.Signals[name])
        assert requests.agreed() is ExitReason[name]
        assert requests.agreed() is ExitReason[name]
    assert ExitReason[name].words == f"{name} came"


def test_handlers_from_before_are_back_afterwards() -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with ExitRequests():
        inside = [signal.getsignal(number) for number in numbers]
    assert all(new != old for new, old in zip(inside, before, strict=True))
    assert [signal.getsignal(number) for number in numbers] == before


@contextmanager
def handled_by(number: signal.Signals, handler: Any) -> Iterator[None]:
    """A signal's handler for a while."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_the_second_interrupt_is_the_usual_one() -> None:
    # A shell starts background jobs with interrupts ignored; that is inherited.
    with (
        handled_by(signal.SIGINT, signal.default_int_handler),
        ExitRequests() as requests,
    ):
        # A signal that is sent to the process may wait for one of its other threads.
        signal.raise_signal(signal.SIGINT)
        assert requests.agreed() is ExitReason.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_time_limit_counts_from_the_start_of_the_process() -> None:
    age_in_minutes = seconds_since_start() / 60
    assert ExitRequests(age_in_minutes + 10).agreed() is None
    # This process is older than the object that asks, so the limit is over at once.
    assert age_in_minutes > 0
    assert ExitRequests(age_in_minutes).agreed() is ExitReason.TIME_LIMIT


def test_outside_the_main_thread_only_the_time_limit_works() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def ask() -> None:
        with ExitRequests(1e-9) as requests:
            found.extend([signal.getsignal(signal.SIGTERM), requests.agreed()])

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [before, ExitReason.TIME_LIMIT]


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_forked_helper_still_ends_when_it_is_told_to(before: signal.Handlers) -> None:
    ready, tell = os.pipe()
    with handled_by(signal.SIGTERM, before), ExitRequests():
        child = os.fork()
        if child == 0:
            # Python drops what comes during the fork itself, so the parent waits for this.
            os.write(tell, b"x")
            # Not signal.pause, which would miss a signal that comes just before it.
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                pass
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_a_lost_lease_stops_without_saving_and_all_else_saves() -> None:
    assert ExitRequests().agreed(lease_lost=True) is ExitReason.LEASE_LOST
    assert [reason for reason in ExitReason if not reason.saves] == [ExitReason.LEASE_LOST]


@pytest.mark.dist
def test_all_ranks_stop_after_the_same_step_for_the_same_reason(tmp_path: Path) -> None:
    run_ranks("tests.training.exit_worker", {"world_size": 1}, tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first == {
        "nothing": [6, None],
        "signal": [3, "SIGUSR1"],
        "different": [3, "SIGTERM"],
        "time": [1, "TIME_LIMIT"],
        "lease": [4, "LEASE_LOST"],
    }
