"""Processes and Megatron's parallel groups: plain python, torchrun or srun.

Owns the life of ``torch.distributed`` and of ``megatron.core.parallel_state``; training enters and
leaves it with one context manager, so several runs can follow each other in one process.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_mup import platform
from megatron_mup.config import RunConfig
from megatron_mup.training.failure_notes import note_failure
from megatron_mup.training.peers import prompt_farewell
from megatron_mup.training.ranks import Launch as Launch
from megatron_mup.training.ranks import check_layout as check_layout
from megatron_mup.training.ranks import detect_launch as detect_launch
from megatron_mup.training.ranks import join_process_group


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
            join_process_group(launch, timedelta(minutes=run.parallel.distributed_timeout_minutes))
        try:
            _init_model_groups(run)
            yield
        except BaseException as error:
            note_failure(launch.rank, error)
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
