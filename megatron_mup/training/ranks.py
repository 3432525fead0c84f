"""How this process was started, and whether the ranks fill the layout.

Needs torch, but not megatron, which takes seconds to import: what looks at a run before it starts
has to be quick.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_mup import platform
from megatron_mup.config import RunConfig
from megatron_mup.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        rank: global rank.
        world_size: number of processes.
        local_rank: rank on this machine.
        address: host of rank 0; None for a single process, which needs no network.
        port: port of rank 0.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str | None = None
    port: int = 0


def detect_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read the launcher's variables: torchrun's, else those of a Slurm step, else one process.

    Args:
        environment: ``os.environ`` or a stand-in.

    Raises:
        ConfigError: an srun step without a known first host.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Launch(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            address=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=int(environment.get("MASTER_PORT", "29500")),
        )
    # SLURM_STEP_ID is set by srun, not in the batch script itself, which is one process.
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "SLURM_STEP_ID" in environment and tasks > 1:
        address = environment.get("MASTER_ADDR") or environment.get("SLURM_LAUNCH_NODE_IPADDR")
        if address is None:
            raise ConfigError(
                f"srun started {tasks} tasks but MASTER_ADDR is not set; export MASTER_ADDR with "
                "the first host of the job"
            )
        port = 10000 + int(environment.get("SLURM_JOB_ID", "0")) % 50000
        return Launch(
            rank=int(environment["SLURM_PROCID"]),
            world_size=tasks,
            local_rank=int(environment.get("SLURM_LOCALID", "0")),
            address=address,
            port=int(environment.get("MASTER_PORT", str(port))),
        )
    return Launch()


def check_layout(run: RunConfig, world_size: int) -> int:
    """Check that the ranks fill the layout and the batch divides over them.

    Args:
        run: the run's configuration.
        world_size: number of processes.

    Returns:
        Data-parallel size.

    Raises:
        ConfigError: with the numbers and the cure.
    """
    parallel = run.parallel
    model_ranks = parallel.model_parallel_size
    if world_size % model_ranks:
        context = parallel.context_parallel_size
        raise ConfigError(
            f"{world_size} process(es) cannot hold tensor_model_parallel_size "
            f"{parallel.tensor_model_parallel_size} x pipeline_model_parallel_size "
            f"{parallel.pipeline_model_parallel_size}"
            + (f" x context_parallel_size {context}" if context > 1 else "")
            + f"; start a multiple of {model_ranks}, "
            f"e.g. torchrun --nproc-per-node {model_ranks} -m megatron_mup train ..."
        )
    data = world_size // model_ranks
    rampup = run.training.rampup_batch_size
    for name, size in [
        ("global_batch_size", run.training.global_batch_size),
        *zip(("rampup start", "rampup increment"), rampup or [], strict=False),
    ]:
        _check_batch(run, name, size, data)
    return data


def _check_batch(run: RunConfig, name: str, size: int, data: int) -> None:
    """Check that a batch (or its growth) divides into microbatches on every rank."""
    per_step = run.training.micro_batch_size * data
    if size % per_step:
        raise ConfigError(
            f"{name} {size} is not divisible by micro_batch_size "
            f"{run.training.micro_batch_size} x data-parallel size {data} = {per_step}; "
            "change global_batch_size, micro_batch_size or the number of processes"
        )
    stages = run.parallel.pipeline_model_parallel_size
    # The interleaved schedule hands microbatches from chunk to chunk in groups of this size.
    if run.parallel.virtual_stages is not None and (size // per_step) % stages:
        raise ConfigError(
            f"{name} {size} makes {size // per_step} microbatches per rank, which is not "
            f"divisible by pipeline_model_parallel_size {stages} as "
            "virtual_pipeline_model_parallel_size asks; change global_batch_size or "
            "micro_batch_size, or leave virtual_pipeline_model_parallel_size out"
        )


def join_process_group(launch: Launch, timeout: timedelta, *, backend: str | None = None) -> None:
    """Bind this process's device and meet the other ranks.

    Args:
        launch: place of this process.
        timeout: longest wait for another rank, here and in collectives.
        backend: torch's name; unset means the device's.
    """
    platform.bind_device(launch.local_rank)
    backend = platform.distributed_backend() if backend is None else backend
    if launch.address is None:
        store: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    # torchrun's agent already serves the store at this address; env:// joins it.
    served = "TORCHELASTIC_RUN_ID" in os.environ
    address = "env://" if served else f"tcp://{launch.address}:{launch.port}"
    dist.init_process_group(
        backend,
        init_method=address,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
    )
