"""Peak memory of a command and of all processes below it, seen from outside.

Read from /proc, so on Linux only. What is added up is resident memory: pages that several processes
share (libraries) count in each of them, so that the sum is an upper bound.
"""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mup.errors import DataError

SAMPLE_SECONDS = 0.1
"""Time between two looks."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a command took."""

    peak_bytes: int
    """The largest sum of resident memory over the processes."""

    wall_seconds: float


def footprint(command: Sequence[str]) -> Footprint:
    """Run a command and watch the memory of its process tree.

    Args:
        command: The program and its arguments.

    Raises:
        DataError: It failed; with the end of what it wrote to standard error.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = 0
    while True:
        peak = max(peak, sum(map(_resident_bytes, _tree(process.pid))))
        try:
            output, _ = process.communicate(timeout=SAMPLE_SECONDS)
            break
        except subprocess.TimeoutExpired:
            continue
    wall_seconds = time.perf_counter() - began
    if process.returncode:
        raise DataError(f"{' '.join(command)} ended with {process.returncode}: {output[-2000:]}")
    return Footprint(peak_bytes=peak, wall_seconds=wall_seconds)


def _tree(root: int) -> list[int]:
    """The process and all below it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            children.setdefault(_parent(folder), []).append(int(folder.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def _parent(folder: Path) -> int:
    try:
        # The name in parentheses may hold spaces and parentheses itself.
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _resident_bytes(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize()
