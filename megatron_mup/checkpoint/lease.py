"""One writer per save folder: ``lease.json``, held by the first rank while its job runs.

The file says who writes; its modification time is the heartbeat, set by the file server's clock.
All times are compared on that clock, so hosts need not agree on theirs. What is atomic here is
atomic on NFS too: ``link`` for taking a free name, ``rename`` for replacing a dead owner's file.

Only who holds the hard link ``.lease.json.taken.TOKEN`` may replace the lease with that token, so
of many takers one wins. A lease is never rewritten by its owner: the heartbeat goes through the
open file, and so can never hit the file of a new owner.

A process that is stopped for longer than the timeout and then wakes up is seen by ``confirm``, to
be called before a checkpoint gets its name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_mup.errors import CheckpointError
from megatron_mup.os_processes import machine_identity, process_start

logger = logging.getLogger(__name__)

LEASE = "lease.json"
_BEATS_PER_TIMEOUT = 6
_LARGEST_FILE = 64 * 1024
"""Bytes; a lease is far smaller, anything larger is not one."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a lease; the content of ``lease.json``.

    Attributes:
        token: unique name of this acquisition.
        job_id: Slurm's; None outside Slurm.
        restart_count: how often Slurm has requeued the job.
        host: host name of the first rank.
        pid: its process.
        process_start: clock ticks since boot; None where the system does not tell.
        machine: where the pid means this process; see ``machine_identity``.
        acquired: local wall clock, for people.
    """

    token: str
    job_id: str | None
    restart_count: int
    host: str
    pid: int
    process_start: int | None
    machine: str | None
    acquired: str

    @classmethod
    def this_process(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """This process, with a new token."""
        return cls(
            token=uuid.uuid4().hex,
            job_id=environment.get("SLURM_JOB_ID"),
            restart_count=int(environment.get("SLURM_RESTART_COUNT", "0")),
            host=socket.gethostname(),
            pid=os.getpid(),
            process_start=process_start(os.getpid()),
            machine=machine_identity(),
            acquired=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        )

    @classmethod
    def parse(cls, text: bytes) -> Self | None:
        """Read the content of a lease; None if it is damaged."""
        try:
            values = json.loads(text)
            kept = {field.name: values[field.name] for field in fields(cls)}
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        kinds: dict[str, tuple[type, ...]] = {
            "restart_count": (int,),
            "pid": (int,),
            "process_start": (int, type(None)),
            "job_id": (str, type(None)),
            "machine": (str, type(None)),
        }
        fit = all(isinstance(value, kinds.get(name, (str,))) for name, value in kept.items())
        # The token becomes part of a file name.
        return cls(**kept) if fit and str(kept["token"]).isalnum() else None

    def is_alive(self, me: Owner) -> bool | None:
        """Whether this owner runs; None where only its heartbeat can tell."""
        # Slurm ends all processes of a job before it starts it again.
        same_job = self.job_id is not None and self.job_id == me.job_id
        if same_job and self.restart_count < me.restart_count:
            return False
        if self.machine is None or self.machine != me.machine or self.process_start is None:
            return None
        return process_start(self.pid) == self.process_start


@dataclass(frozen=True)
class _Seen:
    """A lease file as it was found.

    Attributes:
        owner: its content; None if damaged.
        token: the owner's, or a name for a damaged file.
        beat: modification time in nanoseconds, file server's clock.
        age: seconds since then, on the same clock.
    """

    owner: Owner | None
    token: str
    beat: int
    age: float

    @property
    def who(self) -> str:
        """The owner in words."""
        if self.owner is None:
            return "an unknown job (the lease is damaged)"
        owner = self.owner
        job = "" if owner.job_id is None else f"Slurm job {owner.job_id}, "
        return f"{job}host {owner.host}, process {owner.pid} (since {owner.acquired})"


def _open_plainly(path: str, flags: int) -> int:
    """Open without following a link and without waiting at a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _look(path: Path, now: int) -> _Seen | None:
    """Read a lease file; None if there is none.

    Opening, and not only stat, makes an NFS client ask the server instead of its cache.
    """
    try:
        with open(path, "rb", opener=_open_plainly) as stream:
            status = os.fstat(stream.fileno())
            owner = Owner.parse(stream.read(_LARGEST_FILE))
    except FileNotFoundError:
        return None
    token = f"damaged{status.st_ino}" if owner is None else owner.token
    age = max(0.0, (now - status.st_mtime_ns) / 1e9)
    return _Seen(owner, token, status.st_mtime_ns, age)


def owner_is_gone(folder: Path) -> bool:
    """Whether the process that holds a folder is known to have ended.

    Args:
        folder: ``checkpoint.save`` of a run.

    Returns:
        False where nobody holds it, or where only the heartbeat could tell.
    """
    seen = _look(folder / LEASE, now=0)
    owner = None if seen is None else seen.owner
    return owner is not None and owner.is_alive(Owner.this_process()) is False


class Lease:
    """Context manager that holds the lease of a save folder; for the first rank only.

    Args:
        folder: the ``save`` folder; made if missing.
        timeout_seconds: an owner without a heartbeat for so long counts as dead.
        owner: this process, or a stand-in.
    """

    def __init__(self, folder: Path, *, timeout_seconds: float, owner: Owner | None = None) -> None:
        self._folder = folder
        self._path = folder / LEASE
        self._timeout = timeout_seconds
        self._owner = Owner.this_process() if owner is None else owner
        self._own = folder / f".{LEASE}.{self._owner.token}.tmp"
        self._pid = os.getpid()
        self._file: int | None = None
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._lock = threading.Lock()
        self._last_beat = 0.0

    def __enter__(self) -> Self:
        """Take the lease.

        Raises:
            CheckpointError: another job holds it and is alive, or the folder cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            self._clean_up()
            raise CheckpointError(
                f"cannot write {LEASE} in checkpoint.save '{self._folder}' "
                f"({error.strerror or error}); checkpoint.save must be a folder that this user may "
                "write to, on a file system with hard links"
            ) from error
        except BaseException:
            self._clean_up()
            raise
        threading.Thread(target=self._beat_until_stopped, name="lease", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the lease back, if it is still this process's."""
        if os.getpid() != self._pid:
            # A forked child that leaves the block must not give its parent's lease away.
            return
        self._stop.set()
        if self.confirm():
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._clean_up()

    def lost(self) -> bool:
        """Whether another job has taken over; nothing may be written then. Costs no disk access.

        A process that was stopped for longer than the timeout looks at the disk first.
        """
        if time.monotonic() - self._last_beat > self._timeout:
            self._beat()
        return self._lost.is_set()

    def confirm(self) -> bool:
        """Look at the disk now: whether the lease is still this process's."""
        self._beat()
        return not self._lost.is_set()

    def _acquire(self) -> None:
        descriptor = os.open(self._own, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._file = descriptor
        os.write(descriptor, json.dumps(asdict(self._owner), indent=1).encode())
        os.fsync(descriptor)
        self._take(self._path)
        self._own.unlink(missing_ok=True)

    def _take(self, path: Path) -> None:
        """Make ``path`` this process's: when it is free, or its owner is dead.

        Raises:
            CheckpointError: its owner is alive.
        """
        while not self._link(path):
            seen = _look(path, self._server_now())
            if seen is None:
                continue
            self._wait_for_its_end(path, seen)
            # Whoever died while taking over left his claim, which is then taken in the same way.
            claim = self._folder / f".{LEASE}.taken.{seen.token}"
            self._take(claim)
            now_held = _look(path, self._server_now())
            if now_held is not None and now_held.token == seen.token:
                self._replace(path)
                claim.unlink(missing_ok=True)
                logger.warning("%s: taken over from %s", path, seen.who)
                return
            claim.unlink(missing_ok=True)

    def _link(self, path: Path) -> bool:
        """Give the own file the name ``path`` as well, if that is free."""
        self._renew()
        try:
            os.link(self._own, path)
        except FileExistsError:
            # On NFS a link can be made and its answer be lost; the second try then finds it.
            with contextlib.suppress(FileNotFoundError):
                return os.path.samefile(self._own, path)
            return False
        return True

    def _replace(self, path: Path) -> None:
        """Put the own file in the place of a dead owner's."""
        second = self._own.with_suffix(".second.tmp")
        os.link(self._own, second)
        os.replace(second, path)

    def _wait_for_its_end(self, path: Path, seen: _Seen) -> None:
        """Return when the owner is known to be dead.

        A silent owner on another host may have died just now: it is watched until its heartbeat
        moves or the timeout is over, so that a restart is not refused because it came early.

        Raises:
            CheckpointError: the owner is alive.
        """
        alive = None if seen.owner is None else seen.owner.is_alive(self._owner)
        if alive:
            # Even without a heartbeat: a process that hangs can still wake up and write.
            raise self._refusal(seen)
        if alive is False or seen.age > self._timeout:
            return
        wait = self._timeout - seen.age
        logger.warning("%s: waiting up to %.0f s for a sign of life of %s", path, wait, seen.who)
        # The own clock ends the wait should the heartbeat lie in the file server's future.
        end = time.monotonic() + wait
        while time.monotonic() <= end:
            time.sleep(min(1.0, self._timeout / (4 * _BEATS_PER_TIMEOUT)))
            later = _look(path, self._server_now())
            if later is None or later.token != seen.token:
                return
            if later.beat != seen.beat:
                raise self._refusal(later)

    def _refusal(self, seen: _Seen) -> CheckpointError:
        return CheckpointError(
            f"checkpoint.save '{self._folder}' is being written by {seen.who}, last heartbeat "
            f"{seen.age:.0f} s ago; stop that job, or save elsewhere with checkpoint.save. A dead "
            f"job's folder is taken over after faults.lease_timeout_seconds={self._timeout:g}"
        )

    def _server_now(self) -> int:
        """Nanoseconds on the file server's clock, which stamps the heartbeats too.

        Making a file also drops what an NFS client remembers of the folder.
        """
        probe = self._folder / f".{LEASE}.{self._owner.token}.now.tmp"
        try:
            probe.touch()
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink(missing_ok=True)

    def _beat_until_stopped(self) -> None:
        while not self._stop.wait(self._timeout / _BEATS_PER_TIMEOUT) and not self._lost.is_set():
            self._beat()

    def _beat(self) -> None:
        """Renew the modification time and see whether the lease is still ours."""
        with self._lock:
            if self._file is None:
                return
            try:
                with contextlib.suppress(OSError):
                    # Only refreshes the NFS cache; a full disk must not cost the lease.
                    self._server_now()
                seen = _look(self._path, 0)
                if seen is None or seen.token != self._owner.token:
                    self._lost.set()
                    return
                self._renew()
            except OSError as error:
                # A file server that does not answer lets nobody else in either.
                logger.warning("no heartbeat in %s: %s", self._path, error)

    def _renew(self) -> None:
        """Set the own file's modification time, by the file server's clock."""
        if self._file is not None:
            os.utime(self._file)
            self._last_beat = time.monotonic()

    def _clean_up(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._file is not None:
                os.close(self._file)
                self._file = None
            self._own.unlink(missing_ok=True)
