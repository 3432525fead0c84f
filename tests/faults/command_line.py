"""Run ``megatron-mup`` in a process of its own, quickly, and hurt it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tests.distributed.spawn import ROOT, free_port

PATIENCE_SECONDS = 120
"""Longest wait for anything that must happen."""


def pause(seconds: float) -> None:
    """Let all processes go on for a while."""
    time.sleep(seconds)


class Process:
    """One running command."""

    def __init__(self, starter: Starter, pid: int, output: Path) -> None:
        self._starter = starter
        self.pid = pid
        self.output = output

    def kill(self) -> int:
        """SIGKILL to the process and everything that it started; returns the exit code."""
        os.killpg(self.pid, signal.SIGKILL)
        return self.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process alone."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Exit code; negative for the signal that ended it."""
        return self._starter.ask({"wait": self.pid})

    def wait_for(self, path: Path, text: str = "") -> None:
        """Wait until a file exists and holds a text.

        Raises:
            AssertionError: it does not come.
        """

        def holds() -> bool:
            return path.exists() and text in (path.read_text(errors="replace") if text else "")

        self.wait_until(holds, f"{path} with '{text}'")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds.

        Raises:
            AssertionError: it does not come true.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if condition():
                return
            time.sleep(0.005)
        raise AssertionError(f"no {what}:\n{self.text[-3000:]}")

    @property
    def text(self) -> str:
        """What it printed."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


class Starter:
    """Holds the zygote and starts commands through it."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._zygote.kill()
        self._zygote.communicate()

    def _read(self) -> str:
        assert self._zygote.stdout is not None
        return self._zygote.stdout.readline().strip()

    def ask(self, job: dict[str, Any]) -> int:
        """Send one line, read one number."""
        assert self._zygote.stdin is not None
        self._zygote.stdin.write(json.dumps(job) + "\n")
        self._zygote.stdin.flush()
        return int(self._read())

    def start(self, *arguments: str, output: Path, **job: Any) -> Process:
        """Start ``megatron-mup ARGUMENTS``; its output is appended to a file."""
        pid = self.ask({"arguments": list(arguments), "output": str(output), **job})
        return Process(self, pid, output)

    def start_ranks(self, *arguments: str, folder: Path, ranks: int) -> list[Process]:
        """Start one process for each rank of a job on this machine."""
        port = str(free_port())
        return [
            self.start(
                *arguments,
                output=folder / f"rank{rank}.log",
                environment={
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                },
            )
            for rank in range(ranks)
        ]
