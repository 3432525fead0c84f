"""Starts the command line many times without importing torch each time.

``python -m tests.faults.zygote`` imports everything once and then forks one process for each JSON
line on its standard input: ``{"arguments": [...], "environment": {...}, "output": path}``. It
answers with the child's pid, and to ``{"wait": pid}`` with its exit code, negative for a signal.
Each child leads a process group of its own, so that its writers can be killed with it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any


def _become(job: dict[str, Any]) -> None:
    """Turn this forked process into ``megatron-mup ARGUMENTS``; never returns."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job.get("environment", {}))
    if "file_size_limit" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size_limit"],) * 2)
    from megatron_mup import cli

    sys.argv = ["megatron-mup", *job["arguments"]]
    code: Any = 1
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not os._exit: what the interpreter does on its way out is part of what is tested.
    sys.exit(code or 0)


def _answer(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def main() -> None:
    """Import, say so, and serve until standard input closes."""
    import torch

    torch.set_num_threads(1)
    import megatron_mup.cli
    import megatron_mup.training.loop  # noqa: F401  imported for the children

    _answer("ready")
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            _, status = os.waitpid(job["wait"], 0)
            _answer(os.waitstatus_to_exitcode(status))
            continue
        pid = os.fork()
        if pid == 0:
            _become(job)
        _answer(pid)


if __name__ == "__main__":
    main()
