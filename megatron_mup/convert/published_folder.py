"""A folder that appears under its name only when it is complete and approved.

It is made beside its final place under a hidden name, synced file by file, and renamed last: a
process that is killed, or a full disk, leaves nothing that looks finished. What its approval turns
down keeps its contents and is named ``NAME.rejected``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_mup.data.publication import sync_folder
from megatron_mup.errors import CheckpointError

logger = logging.getLogger(__name__)

REJECTED = ".rejected"
"""Ending of an output that was not approved; a number follows where the name is taken."""

_REJECTED_NAME = re.compile(rf".+{re.escape(REJECTED)}(\.[0-9]+)?")
_HIDDEN_ENDING = r"[0-9]+\.[0-9a-f]{8}\.tmp"
"""Of a hidden folder: process number and a random number."""

_SMALL_FILES_BYTES = 2**20


def is_rejected(path: Path) -> bool:
    """Whether a folder's name says that it was not approved."""
    return _REJECTED_NAME.fullmatch(path.name) is not None


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where an output shall be, and what may be replaced for it.

    Attributes:
        folder: the final place.
        ours: whether an existing folder is the output of an earlier conversion; any other is never
            replaced.
        overwrite: whether an existing one of ours may be replaced.
        source: what is read; the output may neither replace it nor lie in it.
    """

    folder: Path
    ours: Callable[[Path], bool]
    overwrite: bool = False
    source: Path | None = None

    def check(self) -> None:
        """Refuse a folder that could not be published, before any expensive work.

        An earlier output whose replacement was killed between its two renames gets its name back.

        Raises:
            CheckpointError: it exists, is something else, or is or holds the source.
        """
        try:
            self._check_source()
            _restore_replaced(self.folder)
            self._check_existing()
        except OSError as error:
            raise _cannot_write(self.folder, error) from error

    def _check_source(self) -> None:
        if self.source is None or not self.source.exists():
            return
        source, folder = self.source.resolve(), self.folder.resolve()
        if folder == source:
            problem = f"{self.folder} is the folder that is read ({self.source})"
        elif folder.is_relative_to(source):
            problem = f"{self.folder} lies inside {self.source}, which is read"
        elif source.is_relative_to(folder):
            problem = f"{self.source}, which is read, lies inside {self.folder}"
        else:
            return
        raise CheckpointError(f"{problem}; pass a folder beside it")

    def _check_existing(self) -> None:
        folder = self.folder
        # lexists, so that a broken link counts.
        if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
            return
        if not self.overwrite:
            raise CheckpointError(f"{folder} exists; pass --overwrite or another folder")
        if not (folder.is_dir() and self.ours(folder)):
            raise CheckpointError(
                f"{folder} is not the output of an earlier conversion, so it is not replaced; "
                "remove it yourself or pass another folder"
            )


@dataclass
class Output:
    """A folder on its way to its name.

    Attributes:
        hidden: the folder to write into.
        folder: after the block, where it lies.
    """

    hidden: Path
    folder: Path


@contextlib.contextmanager
def published_folder(
    target: Target, *, approve: Callable[[Path], bool] | None = None
) -> Iterator[Output]:
    """Make a folder that appears when the block succeeds.

    Args:
        target: final place; its parents are made.
        approve: called with the hidden folder when all of it is on the disk. False gives it the
            name ``NAME.rejected``, and an earlier output stays; unset means True.

    Yields:
        What to write into. The block syncs its own large files; all others are synced here.

    Raises:
        CheckpointError: the disk is full, the folder cannot be written, or another one has taken
            its name meanwhile.
    """
    target.check()
    with contextlib.ExitStack() as held:
        try:
            if not target.folder.parent.exists():
                target.folder.parent.mkdir(parents=True)
                held.callback(_remove_empty, target.folder.parent)
            _remove_abandoned(target.folder)
            output = Output(held.enter_context(_hidden_folder(target.folder)), target.folder)
            yield output
            _sync_all(output.hidden)
            if approve is not None and not approve(output.hidden):
                _sync_all(output.hidden)
                output.folder = _rename_rejected(output.hidden, target.folder)
            else:
                # The approval may have added its report.
                _sync_all(output.hidden)
                _rename(output.hidden, target)
            sync_folder(target.folder.parent)
        except OSError as error:
            raise _cannot_write(target.folder, error) from error


def check_room(hidden: Path, needed: int, *, folder: Path, advice: str) -> None:
    """Refuse an output that its disk has no room for.

    Args:
        hidden: a folder on that disk.
        needed: bytes still to be written, without small files.
        folder: the output, for the message.
        advice: what to do, for the message.

    Raises:
        CheckpointError: there is less room.
    """
    free = shutil.disk_usage(hidden).free
    if needed + _SMALL_FILES_BYTES > free:
        raise CheckpointError(
            f"{folder} needs {needed:,} bytes and its disk has {free:,} free; {advice}"
        )


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _cannot_write(folder: Path, error: OSError) -> CheckpointError:
    place = error.filename or folder
    cure = "; raise the limit of a file's size (ulimit -f)" if error.errno == errno.EFBIG else ""
    return CheckpointError(
        f"cannot write {place}: {error.strerror or error}; {folder} was not made{cure}"
    )


@contextlib.contextmanager
def _hidden_folder(target: Path) -> Iterator[Path]:
    """A new folder beside the target, locked for as long as somebody writes into it."""
    hidden = target.with_name(f"{_prefix(target)}{os.getpid()}.{secrets.token_hex(4)}.tmp")
    hidden.mkdir()
    # Where there are no locks it is written without, and never taken for abandoned.
    with _locked(hidden):
        try:
            yield hidden
        finally:
            # After the rename there is nothing left under this name.
            shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder; says whether it could be had. The kernel frees a killed one's."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except OSError:
            mine = False
        yield mine
    finally:
        os.close(descriptor)


def _prefix(target: Path) -> str:
    # Locks of another machine may not be seen here, so each looks after its own folders.
    return f".{target.name}.{platform.node()}."


def _sync_all(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(folder)


def _rename(hidden: Path, target: Target) -> None:
    """Put the folder into place; an old one goes only when the new one has its name."""
    folder = target.folder
    # Hours have passed since the first look.
    target.check()
    if not target.overwrite or not os.path.lexists(folder):
        # Fails where something but an empty folder has appeared since.
        os.rename(hidden, folder)
        return
    old = _replaced(folder)
    os.rename(folder, old)
    try:
        os.rename(hidden, folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.rename(old, folder)
        raise
    sync_folder(folder.parent)
    _remove(old)


def _rename_rejected(hidden: Path, target: Path) -> Path:
    number = 1
    while True:
        ending = REJECTED if number == 1 else f"{REJECTED}.{number}"
        rejected = target.with_name(target.name + ending)
        if not os.path.lexists(rejected):
            os.rename(hidden, rejected)
            return rejected
        number += 1


def _replaced(target: Path) -> Path:
    """Where an output lies between the two renames that replace it."""
    return target.with_name(f".{target.name}.replaced")


def _restore_replaced(target: Path) -> None:
    """Give an output its name back, or remove it if its replacement has the name."""
    old = _replaced(target)
    if not os.path.lexists(old):
        return
    if os.path.lexists(target):
        _remove(old)
    else:
        os.rename(old, target)


def _remove_abandoned(target: Path) -> None:
    """Remove what killed processes of this machine have left, which may be large.

    What a process of another machine left, or still writes, is told and stays.
    """
    own = re.compile(re.escape(_prefix(target)) + _HIDDEN_ENDING)
    any_machine = re.compile(rf"{re.escape(f'.{target.name}.')}(.+)\.{_HIDDEN_ENDING}")
    for path in target.parent.iterdir():
        if own.fullmatch(path.name) is None:
            other = any_machine.fullmatch(path.name)
            # Of this machine, it belongs to an output whose name begins with this one's.
            if other is not None and not other[1].endswith(f".{platform.node()}"):
                logger.warning(
                    "%s is of a process of the machine %s; remove it if that has ended",
                    path,
                    other[1],
                )
            continue
        # A process number says nothing of a process in another container; its lock does.
        with contextlib.suppress(OSError), _locked(path) as abandoned:
            if abandoned:
                shutil.rmtree(path, ignore_errors=True)
                logger.warning("removed %s, which a killed process had left", path)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
