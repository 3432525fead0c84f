"""Requests to stop early: signals and the time limit, agreed on by all ranks.

A handler only notes that a signal came. The loop asks between two steps; one tiny all-reduce makes
every rank stop after the same step, so that all of them save the same iteration.
"""

from __future__ import annotations

import os
import signal
import threading
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from megatron_mup import platform
from megatron_mup.os_processes import seconds_since_start


class ExitReason(IntEnum):
    """Why all ranks stop; where ranks have different reasons, the largest counts."""

    TIME_LIMIT = 1
    SIGINT = 2
    SIGUSR1 = 3
    SIGTERM = 4
    LEASE_LOST = 5

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is written: not into a folder that another job has taken over."""
        return self is not ExitReason.LEASE_LOST

    @property
    def words(self) -> str:
        """The reason as a part of a sentence."""
        if self is ExitReason.TIME_LIMIT:
            return "faults.exit_duration_in_mins is over"
        if self is ExitReason.LEASE_LOST:
            return "another job has taken the save folder over"
        return f"{self.name} came"


_SIGNALS = {
    signal.SIGTERM: ExitReason.SIGTERM,
    signal.SIGUSR1: ExitReason.SIGUSR1,
    signal.SIGINT: ExitReason.SIGINT,
}


class ExitRequests:
    """Context manager that listens for requests to stop; enter it before anything slow.

    Signals can only be listened to in the main thread; elsewhere the time limit alone works.

    Args:
        exit_duration_in_mins: time limit, counted from the start of the process; None for none.
    """

    def __init__(self, exit_duration_in_mins: float | None = None) -> None:
        self._limit_seconds = None if exit_duration_in_mins is None else 60 * exit_duration_in_mins
        self._received = 0
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number in list(self._before):
            self._restore(number)

    def _restore(self, number: int) -> None:
        """Put back the handler from before, once: a signal may come while this runs."""
        before = self._before.pop(number, self)
        if before is not self:
            # A handler that was not installed by Python reads as None.
            signal.signal(number, signal.SIG_DFL if before is None else before)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked helper process inherits this handler, but must still end when told to,
            # also where the handler before this one ignored the signal.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._received = max(self._received, _SIGNALS[signal.Signals(number)])
        if number == signal.SIGINT:
            # The second Ctrl-C ends a run that does not get to the end of its step.
            self._restore(number)

    def _own_reason(self, lease_lost: bool) -> int:
        """This process's reason; 0 for none."""
        if lease_lost:
            return ExitReason.LEASE_LOST
        if self._received:
            return self._received
        limit = self._limit_seconds
        over = limit is not None and seconds_since_start() >= limit
        return ExitReason.TIME_LIMIT if over else 0

    def agreed(self, *, lease_lost: bool = False) -> ExitReason | None:
        """Whether all ranks stop now; every rank must ask after the same step.

        Args:
            lease_lost: this rank saw that another job has taken the save folder over.

        Returns:
            The reason, the same on every rank; None to go on.
        """
        reason = self._own_reason(lease_lost)
        if dist.is_initialized() and dist.get_world_size() > 1:
            largest = torch.tensor([reason], dtype=torch.int32, device=platform.device())
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            reason = int(largest.item())
        return ExitReason(reason) if reason else None
