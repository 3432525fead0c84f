"""What the operating system says of processes (is one there, how old, its end) and the processor.

Reads Linux's /proc and nothing else; where it is missing, the answer is None or "just started".
Must not import anything of the package.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

_PROC = Path("/proc")
_STATE, _START = 0, 19
"""Places in /proc/PID/stat after the command name, man 5 proc: fields 3 and 22."""


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; with the pid it names one process.

    Returns:
        None if there is no such process, or only its zombie.
    """
    try:
        stat = (_PROC / str(pid) / "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # The command name, in parentheses, may itself hold spaces and parentheses.
    fields = stat.rpartition(")")[2].split()
    return None if fields[_STATE] in ("Z", "X") else int(fields[_START])


def seconds_since_start() -> float:
    """Age of this process in seconds; 0 where the system does not tell."""
    started = process_start(os.getpid())
    if started is None:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK"))


def processor_name() -> str:
    """Model of the processor; the kind of machine where the system does not tell."""
    try:
        lines = (_PROC / "cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    # One line per core, and none at all on some ARM machines.
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine_identity() -> str | None:
    """Where a pid means the same process: one boot of one kernel, one pid namespace.

    Containers on one machine can share its host name and still number their processes alike.

    Returns:
        None where the system does not tell.
    """
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return None


def is_one_of_several_ranks(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or srun started this process with others.

    Args:
        environment: ``os.environ`` or a stand-in.
    """
    sizes = (environment.get(name, "1") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    return any(size != "1" for size in sizes)


def end_now(code: int) -> NoReturn:
    """End this process without its usual farewell, which can wait for ranks that are gone.

    Left out are ``atexit`` (multiprocessing joins its children there), destructors and threads;
    output streams are flushed.

    Args:
        code: exit code.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        # Whoever read the output may be gone, too.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
