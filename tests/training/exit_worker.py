"""Two ranks that agree on when to stop; forked after the imports, which take most of the time.

Started as ``python -m tests.training.exit_worker JOB RANK`` with one process of ``run_ranks``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from megatron_mup.training.exit_requests import ExitRequests
from megatron_mup.training.processes import Launch
from tests.distributed.ranks import connected, write_result

STEPS = 6


def outcome(rank: int, case: str) -> tuple[int, str | None]:
    """Steps done and the reason, when ``case`` happens to one rank only."""
    limit = 0.0 if case == "time" and rank == 1 else None
    with ExitRequests(limit) as requests:
        reason = None
        step = 0
        while step < STEPS and reason is None:
            step += 1
            if step == 3 and case == "signal" and rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            if step == 3 and case == "different":
                os.kill(os.getpid(), signal.SIGTERM if rank == 0 else signal.SIGUSR1)
            reason = requests.agreed(lease_lost=case == "lease" and rank == 0 and step == 4)
    return step, None if reason is None else reason.name


def rank_main(rank: int, job: dict[str, Any]) -> None:
    """Run every case and write the outcomes."""
    cases = ("nothing", "signal", "different", "time", "lease")
    with connected(Launch(rank, 2, rank, "127.0.0.1", job["port"])):
        found = {case: outcome(rank, case) for case in cases}
        write_result(job, f"rank{rank}.json", found)


def main() -> None:
    """Fork the second rank, be the first."""
    job = json.loads(Path(sys.argv[1]).read_text())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            rank_main(1, job)
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    rank_main(0, job)
    assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    main()
