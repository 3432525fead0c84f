"""Worker processes: started with their share of cores and GPUs, replaced when they die.

One selector waits for all of them. A worker has one cell or none. Must not import torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mup.errors import ConfigError

_WORKER = "megatron_mup.transfer.sweep.worker"
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Share:
    """What each worker gets.

    Attributes:
        workers: processes.
        threads: of each.
        gpus: ids that the driver knows; empty without any.
        gpu_share: workers on one GPU.
    """

    workers: int
    threads: int
    gpus: tuple[str, ...] = ()
    gpu_share: int = 1

    def environment(self, slot: int) -> dict[str, str]:
        """Variables of the worker in a slot, counted from 0."""
        own = {"OMP_NUM_THREADS": str(self.threads)}
        if self.gpus:
            own["CUDA_VISIBLE_DEVICES"] = self.gpus[slot // self.gpu_share]
        return own


def divide_machine(
    *,
    workers: int | None,
    threads: int | None,
    gpu_share: int,
    cores: int,
    gpus: Sequence[str],
) -> Share:
    """Cores and GPUs for each worker.

    Args:
        workers: None: as many as GPUs times ``gpu_share``, or as cores without a GPU.
        threads: of each worker; None: the cores divided by the workers.
        gpu_share: workers on one GPU.
        cores: of the machine.
        gpus: ids of its GPUs.

    Raises:
        ConfigError: a number below 1, or more workers than places on the GPUs.
    """
    given = {"--workers": workers, "--threads": threads, "--gpu-share": gpu_share}
    for option, value in given.items():
        if value is not None and value < 1:
            raise ConfigError(f"{option} is {value}; give at least 1")
    places = len(gpus) * gpu_share
    if workers is None:
        workers = places or cores
    elif gpus and workers > places:
        raise ConfigError(
            f"--workers {workers} is more than {len(gpus)} GPU(s) x --gpu-share {gpu_share} = "
            f"{places}; raise --gpu-share"
        )
    threads = threads or max(1, cores // workers)
    return Share(workers=workers, threads=threads, gpus=tuple(gpus), gpu_share=gpu_share)


def share_of_machine(
    workers: int | None = None, threads: int | None = None, gpu_share: int = 1
) -> Share:
    """Divide this machine; see ``divide_machine``."""
    return divide_machine(
        workers=workers,
        threads=threads,
        gpu_share=gpu_share,
        cores=cores_of_machine(),
        gpus=gpus_of_machine(),
    )


def cores_of_machine() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gpus_of_machine(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Ids of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu not in ("", "-1")]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


class Worker:
    """One process and the pipe to it.

    Args:
        slot: its number, counted from 0; decides its cores and GPU.
        share: what it gets.
        log: file that its standard error is appended to.
    """

    def __init__(self, slot: int, share: Share, log: Path) -> None:
        self.slot = slot
        self.log = log
        self.ready = False
        self._unread = b""
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **share.environment(slot)},
                # Ctrl-C is for the parent alone, which passes it on.
                start_new_session=True,
            )

    @property
    def answers(self) -> int:
        """File descriptor of its answers."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def send(self, request: Mapping[str, Any]) -> None:
        """Give it a cell; a worker that is dead is noticed by its closed pipe."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def received(self) -> list[dict[str, Any]] | None:
        """Messages that have come; None when it is dead."""
        chunk = os.read(self.answers, _CHUNK_BYTES)
        if not chunk:
            return None
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def ask_to_stop(self) -> None:
        """Have it save and stop the cell that it trains."""
        self.process.send_signal(signal.SIGUSR1)

    def last_words(self) -> str:
        """Last line of its log, for a message."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no message")

    def close(self, *, kill: bool) -> int:
        """End it: by closing its pipe, or at once; returns its exit status."""
        if kill:
            self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        return self.process.wait()


class Pool:
    """The workers of one command.

    Args:
        share: how many, and what each gets.
        folder: of their logs.
    """

    def __init__(self, share: Share, folder: Path) -> None:
        self._share, self._folder = share, folder
        self._selector = selectors.DefaultSelector()
        self.workers: dict[int, Worker] = {}

    def start(self, slot: int) -> Worker:
        """Start the worker of a slot."""
        log = self._folder / f"worker-{slot}.log"
        worker = Worker(slot, self._share, log)
        self.workers[slot] = worker
        self._selector.register(worker.answers, selectors.EVENT_READ, worker)
        return worker

    def messages(self, seconds: float) -> Iterator[tuple[Worker, dict[str, Any] | None]]:
        """What has come, waiting for at most so long; None of a worker that died."""
        for key, _ in self._selector.select(seconds):
            worker: Worker = key.data
            # Closed by what its reader did with an earlier message.
            if self.workers.get(worker.slot) is not worker:
                continue
            received = worker.received()
            if received is None:
                yield worker, None
                continue
            for message in received:
                yield worker, message

    def remove(self, worker: Worker, *, kill: bool) -> int:
        """End a worker; returns its exit status, negative for a signal."""
        self._selector.unregister(worker.answers)
        del self.workers[worker.slot]
        return worker.close(kill=kill)

    def close(self, *, kill: bool) -> None:
        """End all workers."""
        for worker in list(self.workers.values()):
            self.remove(worker, kill=kill)
        self._selector.close()
