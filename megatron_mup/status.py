"""``status.json``: what a run says of itself, for people and monitors that look at its save folder.

The loop's first rank rewrites it at every log line and change of state; ``status_report`` reads it.
Reading trusts nothing: a damaged file is a sentence, never a traceback. Failing to write costs the
report, never the run. Must not import torch or megatron, so that looking is quick.
"""

from __future__ import annotations

import json
import logging
import math
import os
import reprlib
import socket
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_mup.config import RunConfig
from megatron_mup.data.publication import temporary_name
from megatron_mup.revision import revision

logger = logging.getLogger(__name__)

STATUS = "status.json"
LONGEST_TEXT = 2000
"""Characters of any text in the file; a longer reason is cut."""
REMEMBERED_LOSSES = 20
"""Logged losses that are kept for the trend."""
SECONDS_BETWEEN_REPORTS = 1.0
"""Log lines that follow each other faster are not all reported: a report costs milliseconds."""


class RunState(StrEnum):
    """What a run is doing, or how it ended."""

    STARTING = "starting"
    TRAINING = "training"
    EVALUATING = "evaluating"
    SAVING = "saving"
    FINISHED = "finished"
    STOPPED = "stopped"
    DIVERGED = "diverged"
    FAILED = "failed"

    @property
    def active(self) -> bool:
        """Whether a process is behind it."""
        return self in (self.STARTING, self.TRAINING, self.EVALUATING, self.SAVING)


@dataclass(frozen=True, kw_only=True)
class Status:
    """One report.

    Attributes:
        state: what the run does, or how it ended.
        iteration: last finished iteration.
        train_iters: iterations of the whole run.
        log_interval: iterations between reports.
        lease_timeout_seconds: silence after which the process counts as dead.
        world_size: processes of the run.
        host: of the first rank.
        pid: process of the first rank.
        job_id: of the scheduler; None without one.
        revision: version and commit of this package.
        started: start of the process, seconds since 1970.
        updated: time of this report, seconds since 1970.
        seconds_per_iteration: mean, saving and evaluation included; None before the first report.
        metrics: last logged value of each metric; NaN is null in the file.
        losses: (iteration, loss) of the last logged losses.
        last_checkpoint: iteration of the newest published checkpoint of this process.
        skipped_steps: steps of the run whose update was left out.
        exit_reason: why the run ended, in words.
    """

    state: RunState
    iteration: int
    train_iters: int
    log_interval: int
    lease_timeout_seconds: float
    world_size: int
    host: str
    pid: int
    job_id: str | None
    revision: str
    started: float
    updated: float
    seconds_per_iteration: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    losses: tuple[tuple[int, float], ...] = ()
    last_checkpoint: int | None = None
    skipped_steps: int = 0
    exit_reason: str | None = None


def write_status(folder: Path, status: Status) -> None:
    """Replace the status file at once: a reader sees the old report or the new one.

    Args:
        folder: the save folder.
        status: what to report.

    Raises:
        OSError: the folder cannot be written.
    """
    data = asdict(status)
    data["metrics"] = {name: _finite(value) for name, value in status.metrics.items()}
    data["losses"] = [[iteration, _finite(loss)] for iteration, loss in status.losses]
    temporary = temporary_name(folder / STATUS)
    try:
        # Not synced to disk: that can wait for seconds behind a checkpoint's bytes, and training
        # with it. After a power cut the file may be damaged, which readers expect.
        temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, folder / STATUS)
    finally:
        temporary.unlink(missing_ok=True)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class StatusWriter:
    """The loop's side: keeps the last report and rewrites the file at each change.

    Args:
        folder: the save folder; None reports nothing (other ranks, runs that save nothing).
        run: the run's configuration.
        iteration: at which this process starts.
        world_size: processes of the run.
        job_id: of the scheduler; None without one.
        lost: whether another job has taken the folder over; nothing is written then.
    """

    def __init__(
        self,
        folder: Path | None,
        run: RunConfig,
        *,
        iteration: int = 0,
        world_size: int = 1,
        job_id: str | None = None,
        lost: Callable[[], bool] | None = None,
    ) -> None:
        self._folder = folder
        self._lost = lost
        self._failing = False
        self._written = -math.inf
        self._status = Status(
            state=RunState.STARTING,
            iteration=iteration,
            train_iters=run.training.train_iters,
            log_interval=run.logging.log_interval,
            lease_timeout_seconds=run.faults.lease_timeout_seconds,
            world_size=world_size,
            host=socket.gethostname(),
            pid=os.getpid(),
            job_id=job_id,
            revision="" if folder is None else revision(),
            started=time.time(),
            updated=time.time(),
        )
        self._write()

    def enter(self, state: RunState, *, exit_reason: str | None = None) -> None:
        """Report a change of state; ``exit_reason`` says in words why the run ended."""
        reason = None if exit_reason is None else exit_reason[:LONGEST_TEXT]
        self._status = replace(self._status, state=state, exit_reason=reason)
        self._write()

    def logged(
        self,
        iteration: int,
        metrics: Mapping[str, float],
        *,
        seconds_per_iteration: float,
        skipped_steps: int = 0,
    ) -> None:
        """Report a log line.

        Args:
            iteration: last finished iteration.
            metrics: those of the log line.
            seconds_per_iteration: mean, saving and evaluation included.
            skipped_steps: steps of the run whose update was left out.
        """
        losses = self._status.losses
        if "lm loss" in metrics:
            losses = (*losses, (iteration, metrics["lm loss"]))[-REMEMBERED_LOSSES:]
        self._status = replace(
            self._status,
            iteration=iteration,
            # A log line of an evaluation has no speed: the last known one stays.
            metrics={**self._status.metrics, **metrics},
            losses=losses,
            seconds_per_iteration=seconds_per_iteration,
            skipped_steps=skipped_steps,
        )
        if time.monotonic() - self._written >= SECONDS_BETWEEN_REPORTS:
            self._write()

    def saved(self, iteration: int) -> None:
        """Report a checkpoint that is published."""
        # A stop between two log lines is told by the checkpoint that it leaves.
        reached = max(self._status.iteration, iteration)
        self._status = replace(self._status, last_checkpoint=iteration, iteration=reached)
        self._write()

    def _write(self) -> None:
        if self._folder is None or (self._lost is not None and self._lost()):
            return
        self._status = replace(self._status, updated=time.time())
        self._written = time.monotonic()
        try:
            write_status(self._folder, self._status)
            self._failing = False
        except OSError as error:
            if not self._failing:
                logger.warning("cannot write %s: %s", self._folder / STATUS, error)
            self._failing = True


def read_small_file(path: Path, limit_bytes: int) -> str:
    """Text of a file that strangers may have written.

    Args:
        path: the file.
        limit_bytes: largest size that is read.

    Raises:
        FileNotFoundError: there is none.
        ValueError: in words: unreadable, too large, not a file, not text.
    """
    try:
        # Without blocking: a pipe of that name would never answer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("is not a file")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(limit_bytes + 1)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    if len(data) > limit_bytes:
        raise ValueError(f"is larger than {limit_bytes} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("is not text") from error


def read_json(path: Path, limit_bytes: int) -> dict[str, Any]:
    """JSON object in a file that strangers may have written.

    Raises:
        FileNotFoundError: there is none.
        ValueError: in words.
    """
    text = read_small_file(path, limit_bytes)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("is not JSON") from error
    if not isinstance(data, dict):
        raise ValueError("does not hold a JSON object")
    return data


def read_status(folder: Path) -> Status:
    """The report in a save folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: in words: what is wrong with it.
    """
    data = read_json(folder / STATUS, limit_bytes=1_000_000)
    for name, fits in _FITS.items():
        if name not in data or not fits(data[name]):
            held = reprlib.repr(data[name]) if name in data else "nothing"
            raise ValueError(f"holds {held} as '{name}'")
    # Fields that a later version adds are passed over.
    known = {item.name: data[item.name] for item in fields(Status)}
    known["state"] = RunState(data["state"])
    known["metrics"] = {name: _or_nan(value) for name, value in data["metrics"].items()}
    known["losses"] = tuple((iteration, _or_nan(loss)) for iteration, loss in data["losses"])
    return Status(**known)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def is_count(value: object) -> bool:
    """Whether a value read from a file is a number of iterations, processes or the like."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_seconds(value: object) -> bool:
    return _is_number(value) and 0 <= float(value) < 1e11  # type: ignore[arg-type]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def _is_metrics(value: object) -> bool:
    return isinstance(value, dict) and all(_or_none(_is_number)(item) for item in value.values())


def _is_losses(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and is_count(pair[0])
        and _or_none(_is_number)(pair[1])
        for pair in value
    )


def _or_none(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or fits(value)


_FITS: dict[str, Callable[[object], bool]] = {
    "state": lambda value: isinstance(value, str) and value in list(RunState),
    "iteration": is_count,
    "train_iters": lambda value: is_count(value) and value != 0,
    "log_interval": lambda value: is_count(value) and value != 0,
    "lease_timeout_seconds": _is_seconds,
    "world_size": is_count,
    "host": _is_text,
    "pid": is_count,
    "job_id": _or_none(_is_text),
    "revision": _is_text,
    "started": _is_seconds,
    "updated": _is_seconds,
    "seconds_per_iteration": _or_none(_is_seconds),
    "metrics": _is_metrics,
    "losses": _is_losses,
    "last_checkpoint": _or_none(is_count),
    "skipped_steps": is_count,
    "exit_reason": _or_none(_is_text),
}
