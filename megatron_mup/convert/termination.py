"""The end of a command at SIGTERM: as at Ctrl-C, what it has begun is removed.

A scheduler or a service manager asks this way first; Python alone would end at once and leave the
hidden folder of an output. Owns the handler for as long as a command runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

EXIT_TERMINATED = 128 + signal.SIGTERM
"""What a shell reports of a process that SIGTERM has ended."""

_MESSAGE = b"stopped by SIGTERM; an output that is not finished is removed\n"


@contextlib.contextmanager
def ends_at_sigterm() -> Iterator[None]:
    """Make SIGTERM raise SystemExit(``EXIT_TERMINATED``) in a block, so that it cleans up."""
    if threading.current_thread() is not threading.main_thread():
        # Only there may handlers be set; whoever calls from elsewhere has its own.
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    # A second one must not cut the cleaning up short; who cannot wait has SIGKILL.
    signal.signal(number, signal.SIG_IGN)
    # Not through sys.stderr, which may be in the middle of a write.
    with contextlib.suppress(OSError):
        os.write(2, _MESSAGE)
    sys.exit(EXIT_TERMINATED)
