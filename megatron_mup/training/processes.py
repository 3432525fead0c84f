"""Processes and Megatron's parallel groups: plain python, torchrun or srun.

Owns the life of ``torch.distributed`` and of ``megatron.core.parallel_state``; training enters and
leaves it with one context manager, so several runs can follow each other in one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

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
    tensor = run.parallel.tensor_model_parallel_size
    pipeline = run.parallel.pipeline_model_parallel_size
    if world_size % (tensor * pipeline):
        raise ConfigError(
            f"{world_size} process(es) cannot hold tensor_model_parallel_size {tensor} x "
            f"pipeline_model_parallel_size {pipeline}; start a multiple of {tensor * pipeline}, "
            f"e.g. torchrun --nproc-per-node {tensor * pipeline} -m megatron_mup train ..."
        )
    data = world_size // (tensor * pipeline)
    per_step = run.training.micro_batch_size * data
    rampup = run.training.rampup_batch_size
    for name, size in [
        ("global_batch_size", run.training.global_batch_size),
        *zip(("rampup start", "rampup increment"), rampup or [], strict=False),
    ]:
        if size % per_step:
            raise ConfigError(
                f"{name} {size} is not divisible by micro_batch_size "
                f"{run.training.micro_batch_size} x data-parallel size {data} = {per_step}; "
                "change global_batch_size, micro_batch_size or the number of processes"
            )
    return data


@contextmanager
def parallel_processes(run: RunConfig, launch: Launch) -> Iterator[None]:
    """Set up the process group and Megatron's groups; tear both down at the end.

    A process group that exists already (made by a host script) is used and left alone.
    """
    owned = not dist.is_initialized()
    if owned:
        _init_process_group(launch)
    try:
        parallel_state.initialize_model_parallel(
            run.parallel.tensor_model_parallel_size,
            run.parallel.pipeline_model_parallel_size,
            run.parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=run.parallel.context_parallel_size,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(run.training.seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if owned:
            dist.destroy_process_group()


def _init_process_group(launch: Launch) -> None:
    platform.bind_device(launch.local_rank)
    backend = platform.distributed_backend()
    if launch.address is None:
        store: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        return
    # torchrun's agent already serves the store at this address; env:// joins it.
    served = "TORCHELASTIC_RUN_ID" in os.environ
    address = "env://" if served else f"tcp://{launch.address}:{launch.port}"
    dist.init_process_group(
        backend, init_method=address, rank=launch.rank, world_size=launch.world_size
    )


def is_log_rank() -> bool:
    """Whether this process writes logs and files: the first one."""
    return dist.get_rank() == 0


def sum_over_data_parallel(values: torch.Tensor) -> torch.Tensor:
    """Sum over data-parallel ranks of the last pipeline stage, then give it to every stage.

    Args:
        values: any shape; stages other than the last may pass anything of that shape.

    Returns:
        The same tensor on every rank.
    """
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(values, last, group=parallel_state.get_pipeline_model_parallel_group())
    return values
