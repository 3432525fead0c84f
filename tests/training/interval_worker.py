"""One rank of ``test_interval``: closes an interval in every layout and writes the metrics.

Started as ``python -m tests.training.interval_worker JOB RANK``.
"""

from __future__ import annotations

import torch

from megatron_mup.training.interval import Interval
from megatron_mup.training.processes import parallel_processes
from megatron_mup.training.step import StepReport
from tests.configurations import tiny
from tests.distributed.ranks import joined, write_result


def main() -> None:
    """Rank r adds a loss of 6 (r + 1)^2 nats over r + 1 tokens twice, and works r + 1 seconds."""
    with joined() as (job, launch):
        rank, rows = launch.rank, {}
        for name, overrides in job["cells"].items():
            run = tiny(*overrides)
            with parallel_processes(run, launch):
                ticks = iter([0.0, 10.0 + rank])
                interval = Interval(run, clock=ticks.__next__, flops_per_sample=1e12)
                loss_and_tokens = [6.0 * (rank + 1) ** 2, rank + 1.0]
                first_stage = name == "pipeline" and rank == 0
                own = torch.tensor([0.0, 0.0] if first_stage else loss_and_tokens)
                for _ in range(2):
                    interval.add(StepReport(own, 0.5, 1.0, True), batch_size=4)
                rows[name] = interval.close(consumed_samples=8, busy_seconds=rank + 1.0)
        write_result(job, f"rank{rank}.json", rows)


if __name__ == "__main__":
    main()
