"""Processes and Megatron's parallel groups: plain python, torchrun or srun.

Owns the life of ``torch.distributed`` and of ``megatron.core.parallel_state``; training enters and
leaves it with one context manager, so several runs can follow each other in one process.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_mup import platform
from megatron_mup.config import RunConfig
from megatron_mup.errors import ConfigError
from megatron_mup.training.peers import prompt_farewell


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


@contextmanager
def parallel_processes(run: RunConfig, launch: Launch) -> Iterator[None]:
    """Set up the process group and Megatron's groups; tear both down at the end.

    A process group that exists already (made by a host script) is used and left alone.
    """
    owned = not dist.is_initialized()
    # Entered first: CUDA, NCCL and TransformerEngine read their variables when they start.
    with platform.deterministic() if run.precision.deterministic_mode else nullcontext():
        # An earlier run's groups wait in reference cycles, and each of their gloo threads wakes 100
        # times a second until they are collected.
        gc.collect()
        if owned:
            _init_process_group(launch, timedelta(minutes=run.parallel.distributed_timeout_minutes))
        try:
            _init_model_groups(run)
            yield
        except BaseException as error:
            with prompt_farewell(error) if launch.world_size > 1 else nullcontext():
                _leave(owned=owned)
            raise
        _leave(owned=owned)


_when_left: list[Callable[[], None]] = []


def when_left(release: Callable[[], None]) -> None:
    """Call a function when the current parallel state ends, before its groups are destroyed."""
    _when_left.append(release)


def _leave(*, owned: bool) -> None:
    while _when_left:
        _when_left.pop()()
    # Destroying the default group destroys all others in an order that suits NCCL.
    if owned:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        return
    # Upstream's own record of its groups (0.19.2): its destroy_model_parallel only forgets them,
    # and torch keeps each, with its threads, as long as the host's default group lives.
    for group in parallel_state._global_process_group_list or []:
        # None stands for the default group.
        if group is not None:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def _init_model_groups(run: RunConfig) -> None:
    parallel = run.parallel
    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_stages,
        context_parallel_size=parallel.context_parallel_size,
        # Upstream makes a timedelta of it, so a fraction does.
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(run.training.seed)


def _init_process_group(launch: Launch, timeout: timedelta) -> None:
    platform.bind_device(launch.local_rank)
    backend = platform.distributed_backend()
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


def is_log_rank() -> bool:
    """Whether this process writes logs and files: the first one."""
    return dist.get_rank() == 0


def sum_over_data_parallel(values: torch.Tensor) -> torch.Tensor:
    """Sum over data- and context-parallel ranks of the last stage, then give it to every stage.

    Args:
        values: any shape; stages other than the last may pass anything of that shape.

    Returns:
        The same tensor on every rank.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(values, group=group)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(values, last, group=parallel_state.get_pipeline_model_parallel_group())
    return values
