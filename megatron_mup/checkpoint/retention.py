"""Which checkpoints are deleted, and how: nothing half deleted ever looks like a checkpoint.

A folder loses its name before it loses its first file. One rank calls all this, and only while its
run owns the ``save`` folder. Training does not wait for the files to go.
"""

from __future__ import annotations

import itertools
import logging
import queue
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from megatron_mup.checkpoint.folders import REPLACED
from megatron_mup.checkpoint.integrity import iteration_of, was_completed
from megatron_mup.data.publication import sync_folder

logger = logging.getLogger(__name__)

TEMPORARY = ".tmp"
"""A checkpoint that waits for its successor of the same name."""


def iterations_to_delete(
    iterations: Iterable[int], *, keep_last: int | None, retain_interval: int | None
) -> list[int]:
    """Choose the checkpoints that are no longer needed.

    Args:
        iterations: saved iterations.
        keep_last: how many newest ones stay; None keeps all.
        retain_interval: multiples of this iteration stay as well.

    Returns:
        Iterations to delete, oldest first.
    """
    if keep_last is None:
        return []
    older = sorted(set(iterations))[:-keep_last]
    return [i for i in older if retain_interval is None or i % retain_interval != 0]


class Remover:
    """Deletes folders one after another on a thread of its own.

    A folder loses its name at once, so a kill at any moment leaves only what ``remove_leftovers``
    removes. Not thread-safe: one thread calls all methods.
    """

    def __init__(self) -> None:
        self._doomed: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._pending = 0

    def remove(self, folder: Path) -> None:
        """Take a folder's name away and have its files deleted; never raises OSError.

        Args:
            folder: a missing one is no error; one that cannot be renamed is logged and stays.
        """
        self.report()
        try:
            doomed = _free_name(folder)
            folder.rename(doomed)
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("cannot delete %s: %s", folder, error)
            return
        self._pending += 1
        self._doomed.put(doomed)
        self._start()

    def report(self) -> None:
        """Log what could not be deleted since the last call; never waits."""
        while not self._answers.empty():
            self._take(self._answers.get())

    def wait(self, seconds: float) -> None:
        """Wait until everything is deleted, but not for longer than some seconds."""
        end = time.monotonic() + seconds
        while self._pending and self._thread is not None:
            try:
                answer = self._answers.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                logger.warning(
                    "%d old checkpoint folders (.iter_*%s) are still being deleted after %.0f s; "
                    "the next start removes what is left of them",
                    self._pending,
                    TEMPORARY,
                    seconds,
                )
                return
            self._take(answer)

    def close(self) -> None:
        """Let the thread end when it is done, and do not wait for it."""
        if self._thread is not None:
            self._doomed.put(None)
            self._thread = None

    def _start(self) -> None:
        if self._thread is not None:
            return
        # Does not keep the process: a folder that is left half deleted has no name any more.
        thread = threading.Thread(
            target=_delete_until_closed,
            args=(self._doomed, self._answers),
            name="remover",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as error:
            logger.warning("cannot delete old checkpoints now: %s", error)
        else:
            self._thread = thread

    def _take(self, problem: str | None) -> None:
        self._pending -= 1
        if problem is not None:
            logger.warning("%s; the next start tries again", problem)


def _free_name(folder: Path) -> Path:
    """A name for a folder on its way out; earlier ones of that name may still be on theirs."""
    names = (f".{folder.name}.deleted.{number}{TEMPORARY}" for number in itertools.count())
    return next(path for path in map(folder.with_name, names) if not path.exists())


def _delete_until_closed(
    doomed: queue.SimpleQueue[Path | None], answers: queue.SimpleQueue[str | None]
) -> None:
    """Life of the deleting thread.

    Checkpoint writers are forked while it runs, and would wait for ever for a lock that it held
    then: it imports nothing and logs nothing.
    """
    while (folder := doomed.get()) is not None:
        problem = None
        try:
            # Otherwise a crash could bring back the old name with some of the files.
            sync_folder(folder.parent)
            shutil.rmtree(folder)
        # Whatever it is: the end of the run waits for an answer.
        except Exception as error:
            problem = f"cannot delete {folder}: {error}"
        answers.put(problem)


def remove_leftovers(root: Path) -> list[str]:
    """Remove what a killed run left; to be called before anything is loaded or saved.

    A checkpoint that had been moved aside for its successor is replaced by it now if the successor
    is complete, and gets its name back if not.

    Args:
        root: the ``save`` folder; may be missing.

    Returns:
        Names of what was removed, for the log.
    """
    if not root.is_dir():
        return []
    needed: set[Path] = set()
    for aside in sorted(root.glob(f"iter_*{REPLACED}")):
        needed.update(_finish_replacement(aside))
    removed = []
    for path in sorted(root.iterdir()):
        if path.is_symlink() or path in needed or not _is_leftover(path):
            continue
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(path.name)
        except OSError as error:
            logger.warning("cannot remove %s, left by a killed run: %s", path, error)
    return removed


def _finish_replacement(aside: Path) -> list[Path]:
    """Give a checkpoint's name to the new or else to the old one, if neither has it.

    Returns:
        Folders that must stay because that failed.
    """
    final = aside.with_name(aside.name.removesuffix(REPLACED))
    successor = final.with_name(final.name + TEMPORARY)
    if aside.is_symlink() or not aside.is_dir() or iteration_of(final) is None or final.exists():
        return []
    try:
        if successor.is_dir() and not successor.is_symlink() and was_completed(successor):
            successor.rename(final)
            logger.warning("%s was interrupted while being replaced and is the new one", final)
        else:
            aside.rename(final)
            logger.warning("%s was interrupted while being replaced and is back", final)
        # Before the other one is deleted, for a crash could undo the rename.
        sync_folder(final.parent)
    except OSError as error:
        logger.warning("cannot rename to %s what a killed run left: %s", final, error)
        return [aside, successor]
    return []


def _is_leftover(path: Path) -> bool:
    """A checkpoint's folder without its final name, or a small file that was not renamed yet."""
    if not path.name.endswith(TEMPORARY):
        return False
    if path.is_dir():
        return path.name.startswith(("iter_", ".iter_"))
    # Not the lease's: another job may be about to take it.
    return path.name.startswith((".latest_", ".status.json.", ".wandb_run_id."))
