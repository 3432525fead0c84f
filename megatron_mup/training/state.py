"""What a training step changes, and how it is built for one rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.module import Float16Module

from megatron_mup.config import RunConfig
from megatron_mup.model.gpt import build_model
from megatron_mup.optimizer.build import build_optimizer
from megatron_mup.optimizer.guard import UpdateGuard
from megatron_mup.optimizer.layer_wise import buffer_layout
from megatron_mup.parameterization.table import ParameterTable
from megatron_mup.training.processes import when_left


@dataclass
class TrainState:
    """Model, optimizer and counters of one rank.

    Attributes:
        run: the run's configuration.
        table: its resolved parameter table.
        model_chunks: GPTModel of each chunk on this rank; one, unless the pipeline is virtual.
        wrapped_chunks: the same parameters in DDP.
        optimizer: Megatron's; its update goes through ``guard``.
        guard: may veto an update.
        iteration: finished iterations, skipped ones included.
        consumed_samples: sequences read, those of skipped iterations included.
        skipped_iterations: iterations whose update was left out.
        health: what the judge of bad steps remembers, plain data; carried by checkpoints.
    """

    run: RunConfig
    table: ParameterTable
    model_chunks: list[torch.nn.Module]
    wrapped_chunks: list[Any]
    optimizer: Any
    guard: UpdateGuard
    iteration: int = 0
    consumed_samples: int = 0
    skipped_iterations: int = 0
    health: dict[str, Any] = field(default_factory=dict)


def build_state(run: RunConfig) -> TrainState:
    """Build model, gradient buffers and optimizer of this process.

    Needs the parallel state of ``processes.parallel_processes``.
    """
    table = run.table
    chunks = [build_model(run, table, chunk=chunk) for chunk in range(run.parallel.model_chunks)]
    wrapped = [wrap_chunk(run, chunk, first=index == 0) for index, chunk in enumerate(chunks)]
    optimizer = build_optimizer(run, table, model_chunks=chunks, wrapped_chunks=wrapped)
    when_left(partial(release_chunks, wrapped))
    # The schedules read these from the first chunk's configuration.
    config: Any = chunks[0].config
    config.no_sync_func = _one_or_list([chunk.no_sync for chunk in wrapped])
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if run.parallel.overlap_grad_reduce:
        # All stages reduce at the same point of the schedule, so none slows another one's transfer.
        config.grad_sync_func = _one_or_list([chunk.start_grad_sync for chunk in wrapped])
    return TrainState(run, table, chunks, wrapped, optimizer, UpdateGuard(optimizer))


def release_chunks(wrapped: list[Any]) -> None:
    """Let a finished run's memory and groups go; happens by itself when its processes are left.

    With the fp32 distributed optimizer (0.19.2) parameter, gradient hook, DDP and optimizer hold
    each other through autograd's C++ nodes, which Python's collector does not see.
    """
    for chunk in wrapped:
        vars(chunk).clear()


def _one_or_list(functions: list[Any]) -> Any:
    """What the schedules take: a function, or one per chunk for the interleaved schedule."""
    return functions if len(functions) > 1 else functions[0]


def wrap_chunk(run: RunConfig, chunk: torch.nn.Module, *, first: bool) -> DistributedDataParallel:
    """Give one chunk its gradient buffers; needs the parallel state.

    Args:
        run: the run's configuration.
        chunk: GPTModel.
        first: whether it is the rank's first chunk, whose reduction is cut into buckets.
    """
    config: Any = chunk.config
    module = Float16Module(config, chunk) if run.precision.bf16 else chunk
    parallel = run.parallel
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_param_gather=run.precision.fp8_param_gather,
    )
    # Later chunks' reductions are hidden behind other chunks' work whole: no need for buckets.
    return DistributedDataParallel(
        config,
        buffers,
        module,
        disable_bucketing=not first,
        full_param_layout=buffer_layout(run, chunk, buffers, bucketed=first),
    )
