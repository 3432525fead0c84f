"""Jobs in which something happens to one rank: what the ranks say, how they end, and how soon.

Started as ``python -m tests.training.faulty_ranks JOB RANK`` with one process of ``run_ranks``,
which forks the ranks of every case: importing takes longer than all the training here.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_mup.errors import DataError, MupError
from megatron_mup.os_processes import end_now
from megatron_mup.training.loop import TrainData, train
from megatron_mup.training.processes import Launch
from tests.configurations import tiny
from tests.distributed.spawn import free_port
from tests.random_samples import RandomSamples

HANG_MINUTES, LONG_MINUTES = 0.15, 5.0
"""parallel.distributed_timeout_minutes: for jobs with a rank that hangs, and for all others."""

DEADLINE_SECONDS = 60.0
_BATCH = 6


@dataclass(frozen=True)
class Case:
    """What happens to which rank.

    Attributes:
        victim: the rank.
        overrides: layout.
        world_size: number of ranks.
        kill: signal sent to it once training is under way.
        fails: it raises an error of its own at the third step.
    """

    victim: int
    overrides: tuple[str, ...] = ("global_batch_size=6",)
    world_size: int = 3
    kill: signal.Signals | None = None
    fails: bool = False


_PIPELINE = ("pipeline_model_parallel_size=2", "global_batch_size=6")
CASES = {
    "killed": Case(1, kill=signal.SIGKILL),
    "killed_store": Case(0, kill=signal.SIGKILL),
    "killed_stage": Case(1, _PIPELINE, 2, kill=signal.SIGKILL),
    "stopped": Case(1, kill=signal.SIGSTOP),
    "stopped_stage": Case(1, _PIPELINE, 2, kill=signal.SIGSTOP),
    "own_failure": Case(1, fails=True),
}


@dataclass
class Ending:
    """How one rank ended.

    Attributes:
        code: exit code; negative for a signal.
        seconds: from the fault to its end.
        output: what it wrote.
    """

    code: int
    seconds: float
    output: str = field(repr=False)


class _FailingSamples(RandomSamples):
    """Fails at the third step."""

    def __getitem__(self, index: int) -> Any:
        if index >= 2 * _BATCH:
            raise DataError("sample 12 is damaged; mend it")
        return super().__getitem__(index)


def write_line(line: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def rank_main(case: Case, rank: int, port: int) -> None:
    """Train until something happens; ends like the command line."""
    code = 0
    try:
        minutes = HANG_MINUTES if case.kill == signal.SIGSTOP else LONG_MINUTES
        run = tiny(
            "train_iters=1000000",
            f"distributed_timeout_minutes={minutes}",
            "micro_batch_size=1",
            *case.overrides,
        )
        kind = _FailingSamples if case.fails and rank == case.victim else RandomSamples
        samples = kind(run.model.vocab_size, run.model.seq_length)
        launch = Launch(rank, case.world_size, rank, "127.0.0.1", port)
        train(run, data=TrainData(samples), launch=launch, echo=write_line)
    except MupError as error:
        sys.stderr.write(f"error: {error}\n")
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = 1
    end_now(code)


def start_rank(case: Case, rank: int, port: int, log: Path) -> int:
    """Fork one rank whose output goes to a file; returns its pid."""
    pid = os.fork()
    if pid == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        rank_main(case, rank, port)
    return pid


def poll(done: Callable[[], bool], what: str) -> None:
    """Wait with a deadline."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not done():
        assert time.monotonic() < end, f"{what}: not within {DEADLINE_SECONDS} s"
        time.sleep(0.01)


def run_case(name: str, case: Case, folder: Path) -> list[Ending]:
    """Let the fault happen and wait for all ranks but one that cannot end by itself."""
    logs = [folder / f"{name}.rank{rank}.log" for rank in range(case.world_size)]
    port = free_port()
    pids = [start_rank(case, rank, port, log) for rank, log in enumerate(logs)]
    endings: dict[int, Ending] = {}
    waiting = set(range(case.world_size))
    try:
        if case.kill is not None:
            poll(lambda: "iteration       3/" in logs[0].read_text(), f"{name}: third step")
            os.kill(pids[case.victim], case.kill)
        fault = time.monotonic()
        waiting -= {case.victim} if case.kill == signal.SIGSTOP else set()

        def all_ended() -> bool:
            for rank in sorted(waiting - endings.keys()):
                pid, status = os.waitpid(pids[rank], os.WNOHANG)
                if pid:
                    code = os.waitstatus_to_exitcode(status)
                    endings[rank] = Ending(code, time.monotonic() - fault, logs[rank].read_text())
            return endings.keys() == waiting

        poll(all_ended, name)
    finally:
        for rank in set(range(case.world_size)) - endings.keys():
            os.kill(pids[rank], signal.SIGKILL)
            os.waitpid(pids[rank], 0)
    return [endings[rank] for rank in sorted(endings)]


def main() -> None:
    """Run all cases and write their endings."""
    job = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["output"])
    endings = {
        name: [asdict(ending) for ending in run_case(name, case, folder)]
        for name, case in CASES.items()
    }
    (folder / "endings.json").write_text(json.dumps(endings))


if __name__ == "__main__":
    main()
