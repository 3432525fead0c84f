"""The work folder of a preprocessing job: ``PREFIX.work``, beside the shards to come.

Owns the plan that a later run of the same command must agree with, the locks that keep two runs
from doing the same work, and the record of an engine that was found wrong. The units lie in
``units/``, the shards in the making in ``shards/``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_mup.data.plan_difference import plan_difference
from megatron_mup.data.publication import publish_text
from megatron_mup.errors import DataError

_PLAN = "plan.json"
_REJECTED = "engine-rejected.json"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkFolder:
    """Where a job keeps what is not finished."""

    path: Path

    @property
    def units(self) -> Path:
        """Folder of the unit files."""
        return self.path / "units"

    @property
    def _removed(self) -> Path:
        return self.path.with_name(f".{self.path.name}.removed")

    def open(self, plan: dict[str, Any]) -> None:
        """Make the folder, or check that it belongs to the same job.

        Args:
            plan: All that decides the output; JSON values.

        Raises:
            DataError: It belongs to another job, or cannot be made.
        """
        try:
            self.units.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self._removed, ignore_errors=True)
        except OSError as error:
            raise DataError(
                f"cannot make the work folder {self.path}: {error.strerror or error}; pass an "
                "--output-prefix in a writable folder"
            ) from error
        found = self._read(_PLAN)
        if found is None:
            publish_text(self.path / _PLAN, json.dumps(plan, indent=2) + "\n")
        elif found != plan:
            raise DataError(
                f"{self.path} holds the unfinished work of another job: "
                f"{plan_difference(found, plan)}; run that job's command again to finish it, pass "
                "--overwrite (without --part) to throw its work away, or another --output-prefix"
            )

    def remove(self) -> None:
        """Delete the folder."""
        # In one step out of the way: half a folder would be taken for an unfinished job.
        shutil.rmtree(self._removed, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.path, self._removed)
        shutil.rmtree(self._removed, ignore_errors=True)

    def remove_if_unused(self) -> None:
        """Delete the folder unless it holds what is worth keeping; for who holds the whole job."""
        if self.rejected_engine() is None and not any(self.units.glob("*.unit")):
            self.remove()

    def rejected_engine(self) -> str | None:
        """The engine whose ids were found wrong in this job; None if there is none."""
        record = self._read(_REJECTED)
        return None if record is None else str(record["engine"])

    def reject_engine(self, engine: str, place: str) -> None:
        """Record, for the other parts and later runs, that an engine's ids are wrong."""
        record = {"engine": engine, "place": place}
        publish_text(self.path / _REJECTED, json.dumps(record, indent=2) + "\n")

    @contextlib.contextmanager
    def locked(self, part: str | None) -> Iterator[None]:
        """Hold the job, or one part of it, so that no other process works on the same.

        Args:
            part: Name of the part; None for the whole job, which waits for no part.

        Raises:
            DataError: Another process holds it.
        """
        with contextlib.ExitStack() as stack:
            whole = stack.enter_context((self.path / "lock").open("a+b"))
            if part is None:
                self._lock(whole, fcntl.LOCK_EX, "the job or a part of it")
            else:
                self._lock(whole, fcntl.LOCK_SH, "the whole job")
                own = stack.enter_context((self.path / f"lock-{part}").open("a+b"))
                self._lock(own, fcntl.LOCK_EX, f"part {part}")
            self._check_still_there(whole)
            yield

    def _lock(self, stream: BinaryIO, kind: int, what: str) -> None:
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another process is working on {what} in {self.path}; wait until it ends"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "the file system of %s has no locks: do not start a job twice at a time", self.path
            )

    def _check_still_there(self, lock: BinaryIO) -> None:
        """A lock on a file that another process has just removed holds nothing."""
        try:
            same = os.path.samestat(os.fstat(lock.fileno()), (self.path / "lock").stat())
        except FileNotFoundError:
            same = False
        if not same:
            raise DataError(
                f"another process has just removed {self.path}; run the same command again"
            )

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DataError(
                f"{path} is damaged ({error}); pass --overwrite to throw the unfinished work away"
            ) from error
        return record
