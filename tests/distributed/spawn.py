"""Start the ranks of a job on this machine and wait for all of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _given_folders() -> list[str]:
    """Where the caller's Python looks for packages besides its own."""
    return [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]


def run_ranks(module: str, job: dict[str, Any], folder: Path, *, timeout: float = 240) -> None:
    """Run ``python -m module JOB RANK`` for every rank.

    Raises:
        AssertionError: a rank failed, with the end of its output.
    """
    job = {"port": free_port(), "output": str(folder), **job}
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *_given_folders()]),
        "PYTHONWARNINGS": "ignore",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(path), str(rank)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(job["world_size"])
    ]
    outputs = []
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    failed = [
        output[-3000:] for process, output in zip(ranks, outputs, strict=True) if process.returncode
    ]
    assert not failed, "\n".join(failed)
