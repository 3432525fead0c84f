"""One rank of ``test_interval``: closes an interval in every layout and writes the metrics.

Started as ``python -m tests.training.interval_worker JOB RANK``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_mup.training.interval import Interval
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.step import StepReport
from tests.configurations import tiny


def main() -> None:
    """Rank r adds a loss of 6 (r + 1)^2 nats over r + 1 tokens twice, and works r + 1 seconds."""
    job, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    launch = Launch(rank, job["world_size"], rank, "127.0.0.1", job["port"])
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{launch.address}:{launch.port}",
        rank=rank,
        world_size=launch.world_size,
    )
    rows = {}
    for name, overrides in job["cells"].items():
        run = tiny(*overrides)
        with parallel_processes(run, launch):
            ticks = iter([0.0, 10.0 + rank])
            interval = Interval(run, clock=ticks.__next__, flops_per_sample=1e12)
            first = name == "pipeline" and rank == 0
            own = torch.zeros(2) if first else torch.tensor([6.0 * (rank + 1) ** 2, rank + 1.0])
            for _ in range(2):
                interval.add(StepReport(own, 0.5, 1.0, True), batch_size=4)
            rows[name] = interval.close(consumed_samples=8, busy_seconds=rank + 1.0)
    (Path(job["output"]) / f"rank{rank}.json").write_text(json.dumps(rows))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
