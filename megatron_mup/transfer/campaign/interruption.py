"""Requests to stop, while no sweep or training loop listens for them itself."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1, which batch systems send, do what Ctrl-C does.

    Signals can only be listened to in the main thread; elsewhere nothing changes.

    Raises:
        KeyboardInterrupt: one of them came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # A handler that was not installed by Python reads as None.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
