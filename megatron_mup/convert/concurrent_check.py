"""A check of what a conversion reads, beside the conversion instead of before it.

Digesting a large source takes a good part of the time that the disk needs for the output. What is
made meanwhile counts for nothing until the check has passed: whoever uses this asks for the result
before the output gets its name. Knows no formats.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from megatron_mup.errors import CheckpointError


@contextlib.contextmanager
def checked_meanwhile(check: Callable[[], None] | None) -> Iterator[Callable[[], None]]:
    """Run a check while a block works.

    A ``CheckpointError`` of the block may come from what the check would find: then the check's own
    error is raised, which names the cause.

    Args:
        check: raises if something is wrong; None if nothing is to be checked.

    Yields:
        A function that waits for the check and raises its error; to be called before the output of
        the block is published. It may be called again.

    Raises:
        CheckpointError: as the check.
    """
    running = None if check is None else _Running(check)

    def finish() -> None:
        if running is not None:
            running.finish()

    try:
        yield finish
    except CheckpointError:
        finish()
        raise


class _Running:
    """A check in a thread that an interrupted process does not wait for."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="check", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._check()
        except BaseException as error:
            self._error = error

    def finish(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error
