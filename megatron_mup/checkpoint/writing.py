"""Write this rank's files of a checkpoint: planned by Megatron, written by a forked process.

Fork makes the writer's copy of the weights: the kernel gives it this instant's memory, so training
can change the weights at once. GPU tensors are copied to host memory before. The writer touches
neither CUDA nor the process groups, and dies with its rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import queue
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_mup.checkpoint.integrity import FileDigest, digest_files

_DIE_WITH_PARENT = 1
"""prctl's PR_SET_PDEATHSIG (linux/prctl.h)."""
_NICENESS = 10
"""How far the writer stands back behind training; as upstream's persistent writer."""
_FIRST_WARNING_SECONDS = 60.0
"""Long for a rank's part of a checkpoint, and early enough to look at the disk (assumption)."""


@dataclass(frozen=True)
class Plan:
    """What this rank is to write.

    Attributes:
        folder: the temporary folder.
        writer: Megatron's, with this rank's tensors.
        metadata: the whole checkpoint's, on rank 0 only.
        problem: why this rank's part could not be staged, in words; None if it was.
    """

    folder: Path
    writer: Any
    metadata: Any
    problem: str | None = None


@dataclass(frozen=True)
class Written:
    """What this rank wrote.

    Attributes:
        results: torch's WriteResult of each item.
        digests: of each file, read back from it.
    """

    results: list[Any]
    digests: dict[str, FileDigest]


class _PlannedSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's strategy up to its plan.

    Its own second half (0.19.2) hangs the other ranks when rank 0 cannot write ``.metadata``, and
    loses the reason of a failed write.
    """

    writer: Any = None
    metadata: Any = None

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: Any, async_strategy: str
    ) -> Any:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, async_strategy)


def plan_writing(tree: dict[str, Any], folder: Path) -> Plan:
    """Divide a sharded state dict among ranks and stage this rank's part in host memory.

    Every rank must call it. On a CPU the staged tensors are the live ones. Too little host memory
    is told by the plan's ``problem``, and by its writer's outcome.

    Args:
        tree: from ``contents.saved_tree``.
        folder: an empty folder that all ranks see.
    """
    # 0.19.2's queue lives in a process of its own, which is spawned (it imports the main script
    # again, 10 s) and outlives a killed rank. The results come back another way here.
    filesystem_async._results_queue = queue.SimpleQueue()
    strategy = _PlannedSave()
    # The default strategy, nvrx, is a package of its own. An error in here is raised, not told: the
    # other ranks may be waiting in one of its collectives for this one.
    dist_checkpointing.save(
        tree, str(folder), strategy, async_sharded_save=True, async_strategy="mcore"
    )
    writer = strategy.writer
    problem = None
    try:
        writer.write_buckets = FileSystemWriterAsync.preload_tensors(writer.write_buckets)
    # torch tells of too little memory by RuntimeError.
    except (MemoryError, RuntimeError) as error:
        reason = str(error) or "out of memory"
        writer.write_buckets = []
        problem = f"cannot stage the weights of rank {dist.get_rank()} in host memory: {reason}"
    return Plan(folder, writer, strategy.metadata, problem)


def write_now(plan: Plan) -> Written | str:
    """Write and digest this rank's files.

    Returns:
        What was written, or in words why not, with the file's path.
    """
    transforms = [plan.writer.transforms]
    path, results, names = plan.folder, [], []
    try:
        for index, bucket in enumerate(plan.writer.write_buckets):
            path = Path(bucket[0])
            _, outcome = FileSystemWriterAsync.write_preloaded_data(
                transforms, index, bucket, None, None, use_fsync=True
            )
            if isinstance(outcome, Exception):
                raise outcome
            results += outcome
            names.append(path.name)
        return Written(results, digest_files(plan.folder, names))
    except Exception as error:
        return f"{path}: {_reason(error)}"


def _reason(error: BaseException) -> str:
    """The system's reason, which torch's own complaint about an unfinished file hides."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error)


class ForkedWriter:
    """``write_now`` in a process of its own.

    Args:
        plan: what to write; may be forgotten by the caller.
    """

    def __init__(self, plan: Plan) -> None:
        self._receiver, sender = Pipe(duplex=False)
        self._pid = -1
        self._refusal = plan.problem
        if self._refusal is None:
            self._fork(plan, sender)
        # Without a writer this ends the pipe, so ``done`` is true at once.
        sender.close()

    def _fork(self, plan: Plan, sender: Connection) -> None:
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        parent = os.getpid()
        with warnings.catch_warnings():
            # Python 3.12 warns of locks that other threads hold. The writer takes none of theirs:
            # it imports nothing, logs nothing and runs torch on one thread.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                self._pid = os.fork()
            except OSError as error:
                # Too many processes, or too little memory: told like any other failure to write.
                self._refusal = f"cannot start a writing process: {error.strerror or error}"
        if self._pid == 0:
            _write_and_exit(plan, sender, parent, prctl)

    def done(self) -> bool:
        """Whether the writer has ended, well or not; never waits."""
        return self._receiver.poll()

    def outcome(self) -> Written | str:
        """Wait for the writer's answer; see ``write_now``."""
        if self._refusal is not None:
            self._receiver.close()
            return self._refusal
        answer: Written | str | None = None
        with contextlib.suppress(EOFError, OSError):
            answer = self._receiver.recv()
        status = self._reap()
        return f"the writing process ended with exit status {status}" if answer is None else answer

    def stop(self) -> None:
        """Kill the writer and leave its files incomplete."""
        if self._refusal is not None:
            self._receiver.close()
            return
        os.kill(self._pid, signal.SIGKILL)
        self._reap()

    def _reap(self) -> int:
        self._receiver.close()
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


class SlowWait:
    """Tells when a wait has become long: after a minute and whenever it has doubled.

    Args:
        clock: seconds that never go back; the wait begins now.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._start = clock, clock()
        self._next = _FIRST_WARNING_SECONDS

    def due(self) -> float | None:
        """Seconds waited so far if it is time to tell of them, else None."""
        seconds = self._clock() - self._start
        if seconds < self._next:
            return None
        self._next = 2 * seconds
        return seconds


def _write_and_exit(plan: Plan, sender: Connection, parent: int, prctl: Any) -> NoReturn:
    """Life of the writing process."""
    status = 1
    try:
        if prctl is not None:
            prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() == parent:
            # Schedulers signal all processes of a job; whether to go on is the rank's decision.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
            # Collecting a CUDA tensor would touch the parent's context; OpenMP's threads are gone.
            gc.disable()
            torch.set_num_threads(1)
            os.nice(_NICENESS)
            sender.send(write_now(plan))
            status = 0
    finally:
        os._exit(status)
