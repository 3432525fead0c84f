"""``attempts.jsonl``: what happened to a run, one event a line, appended and never rewritten.

A line is written by one call and synced, so a crash can cut only the last one; readers pass over
what is no event, and the next writer starts a new line. An attempt's number is claimed by making
its folder, which one of two racing processes wins, on NFS too. Must not import torch or megatron.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_mup.errors import ConfigError
from megatron_mup.launching.run_folder import RunFolder

Event = dict[str, Any]

BEGIN, JUDGE, DECIDE = "begin", "judge", "decide"
"""Values of an event's ``event``."""

_LARGEST_LIST_BYTES = 50_000_000
_MOST_ATTEMPTS = 9999


def claim_attempt(folder: RunFolder) -> int:
    """Take the next free number.

    Returns:
        The attempt's number, from 1.

    Raises:
        ConfigError: the run folder cannot be written.
    """
    number = max((event["attempt"] for event in read_events(folder)), default=0) + 1
    try:
        folder.preflight(number).parent.mkdir(parents=True, exist_ok=True)
        while number <= _MOST_ATTEMPTS:
            try:
                folder.preflight(number).mkdir()
            except FileExistsError:
                number += 1
                continue
            # NCCL's traces go there, and torch makes no folder for them.
            folder.outcomes(number).mkdir(parents=True, exist_ok=True)
            return number
    except OSError as error:
        raise ConfigError(
            f"cannot write to --run-dir '{folder.root}': {error.strerror or error}; give a folder "
            "that can be written"
        ) from error
    raise ConfigError(f"'{folder.root}' holds {_MOST_ATTEMPTS} attempts; use another --run-dir")


def append_event(folder: RunFolder, event: str, attempt: int, **facts: Any) -> None:
    """Add one event and wait until the disk holds it.

    Args:
        folder: of the run.
        event: ``BEGIN``, ``JUDGE`` or ``DECIDE``.
        attempt: its number.
        facts: plain data.

    Raises:
        OSError: the list cannot be written.
    """
    line = json.dumps({"event": event, "attempt": attempt, "time": time.time(), **facts})
    descriptor = os.open(folder.attempts, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        # An earlier writer may have been cut in the middle of its line.
        size = os.fstat(descriptor).st_size
        start = "" if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n" else "\n"
        os.write(descriptor, f"{start}{line}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_events(folder: RunFolder) -> list[Event]:
    """All events, oldest first; lines that are no event are passed over.

    Args:
        folder: of the run; nothing may have begun there.
    """
    try:
        with folder.attempts.open("rb") as stream:
            lines = stream.read(_LARGEST_LIST_BYTES).splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"cannot read {folder.attempts}: {error.strerror}") from error
    return [event for event in map(_event, lines) if event is not None]


def _event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("attempt"), int):
        return None
    return event if event.get("event") in (BEGIN, JUDGE, DECIDE) else None


def beginnings(events: Iterable[Event]) -> list[Event]:
    """The attempts' beginnings, oldest first."""
    return [event for event in events if event["event"] == BEGIN]


def beginnings_without_progress(events: Sequence[Event], iteration: int | None) -> list[Event]:
    """Beginnings in a row, newest first, at the checkpoint that is still the newest.

    Args:
        events: of the run.
        iteration: of the newest whole checkpoint now.
    """
    newest = -1 if iteration is None else iteration
    found = []
    for event in reversed(beginnings(events)):
        begun_at = event.get("iteration")
        if newest > (begun_at if isinstance(begun_at, int) else -1):
            break
        found.append(event)
    return found


def signalled_attempts(events: Iterable[Event]) -> set[int]:
    """Attempts whose batch script was told to end: a time limit, a preemption."""
    return {
        event["attempt"] for event in events if event["event"] == DECIDE and event.get("signalled")
    }


def current_attempt(folder: RunFolder, named: int | None) -> int:
    """The attempt that a command is about: the named one, else the latest.

    Args:
        folder: of the run.
        named: from ``attempt_of_process``.

    Raises:
        ConfigError: nothing has begun.
    """
    if named is not None:
        return named
    begun = beginnings(read_events(folder))
    if not begun:
        raise ConfigError(
            f"{folder.attempts} names no attempt; run 'megatron-mup launch begin' first"
        )
    return int(begun[-1]["attempt"])


def read_path(path: Path) -> str:
    """Text of a file that an option names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read '{path}': {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not text") from error
