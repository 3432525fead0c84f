"""Who has a folder: locks that the system gives back when their process dies.

Locks are of ``flock``, which NFS (from version 4, or version 3 with its lock service) and Lustre
(mounted with ``flock``) carry from machine to machine. Where a file system has none, a warning is
all there is. Must not import torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_mup.errors import ConfigError

LOCK = ".lock"

_PATIENCE_SECONDS = 2.0
"""A lock that is refused may be another's question who has it, which is over at once."""

_POLL_SECONDS = 0.05

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def held(folder: Path, name: str, *, by: str, together: bool = False) -> Iterator[None]:
    """Hold a folder, or a part of it, by a file in it.

    Args:
        folder: the folder; made if missing.
        name: of the file, from the folder; made if missing.
        by: what a command that holds it is called, for the message.
        together: others may hold it in this way at the same time.

    Raises:
        ConfigError: another process holds it in a way that excludes this one.
    """
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as lock:
        try:
            _take(lock, fcntl.LOCK_SH if together else fcntl.LOCK_EX)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"{folder} is in use by another {by} ({lock.read().strip()}); wait for it, "
                "stop it, or choose another --out"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "the file system of %s has no locks: do not start a %s twice in it", folder, by
            )
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield


def _take(lock: IO[str], kind: int) -> None:
    """Lock a file; raises BlockingIOError if another holds it for longer than a question takes."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_POLL_SECONDS)


def owner_of(path: Path) -> str | None:
    """Who holds a folder by this file alone, in words; None if nobody does."""
    try:
        with path.open("r", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read().strip()
    except OSError:
        return None
    return None
