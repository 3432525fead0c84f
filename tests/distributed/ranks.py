"""What every process that ``spawn.run_ranks`` starts does first and last."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mup import platform
from megatron_mup.training.processes import Launch


@contextmanager
def joined() -> Iterator[tuple[dict[str, Any], Launch]]:
    """Read ``JOB RANK`` from the command line and be that rank, until the block ends.

    Yields:
        The job as ``run_ranks`` wrote it, and the place of this process.
    """
    job, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    torch.set_num_threads(1)
    launch = Launch(rank, job["world_size"], rank, "127.0.0.1", job["port"])
    with connected(launch):
        yield job, launch


@contextmanager
def connected(launch: Launch) -> Iterator[None]:
    """Have a device and the process group, until the block ends."""
    platform.bind_device(launch.local_rank)
    dist.init_process_group(
        platform.distributed_backend(),
        init_method=f"tcp://{launch.address}:{launch.port}",
        rank=launch.rank,
        world_size=launch.world_size,
    )
    yield
    # Not after an error: the other ranks would not come to the end.
    dist.destroy_process_group()


def write_result(job: dict[str, Any], name: str, result: object) -> None:
    """Write a result as JSON into the job's folder."""
    (Path(job["output"]) / name).write_text(json.dumps(result))
