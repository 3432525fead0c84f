"""One training step and one evaluation pass through Megatron's pipeline schedules.

Shape suffixes: B microbatch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_mup import platform
from megatron_mup.config import LossDenominator, RunConfig
from megatron_mup.model.gpt import build_model
from megatron_mup.optimizer.build import apply_schedule, build_optimizer
from megatron_mup.optimizer.schedule import run_factor
from megatron_mup.parameterization.table import ParameterTable
from megatron_mup.training.batches import Batch


@dataclass
class TrainState:
    """What a step changes: model, optimizer and counters.

    ``bare_model`` is the GPTModel, ``wrapped_model`` the same parameters in DDP.
    """

    run: RunConfig
    table: ParameterTable
    bare_model: torch.nn.Module
    wrapped_model: Any
    optimizer: Any
    iteration: int = 0
    consumed_samples: int = 0


def build_state(run: RunConfig) -> TrainState:
    """Build model, gradient buffers and optimizer of this process.

    Needs the parallel state of ``processes.parallel_processes``.
    """
    table = run.table
    bare = build_model(run, table)
    config: Any = bare.config
    wrapped = Float16Module(config, bare) if run.training.bf16 else bare
    buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    ddp = DistributedDataParallel(config, buffers, wrapped)
    optimizer = build_optimizer(run, table, bare_model=bare, wrapped_model=ddp)
    config.no_sync_func = ddp.no_sync
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return TrainState(run, table, bare, ddp, optimizer)


def loss_function(
    mask_BS: Tensor, denominator: LossDenominator, losses_BS: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the unmasked token losses, with what it will be divided by.

    Megatron sums the second value over microbatches and data-parallel ranks and divides the
    gradients by it, so the denominator is the batch's, never the microbatch's.

    Returns:
        Loss sum (scalar), count (int scalar), {"lm loss": [loss sum, unmasked tokens]}.
    """
    total = (losses_BS.float() * mask_BS).sum()
    tokens = mask_BS.sum()
    tokens_only = denominator is LossDenominator.TOKENS
    count = tokens if tokens_only else torch.tensor(mask_BS.numel(), device=mask_BS.device)
    return total, count.to(torch.int), {"lm loss": torch.stack([total.detach(), tokens])}


def _forward_step(
    denominator: LossDenominator, batches: Iterator[Batch], model: Any
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    batch = next(batches)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(loss_function, batch["loss_mask"], denominator)


def _run_schedule(
    state: TrainState, batches: Iterator[Batch], count: int, *, forward_only: bool
) -> Tensor:
    """Run Megatron's schedule over ``count`` microbatches.

    Returns:
        [loss sum, unmasked tokens] of this rank; zeros on stages without the loss.
    """
    run = state.run
    reports = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, run.training.loss_denominator),
        data_iterator=batches,
        model=[state.wrapped_model],
        num_microbatches=count,
        seq_length=run.model.seq_length,
        micro_batch_size=run.training.micro_batch_size,
        forward_only=forward_only,
    )
    if not parallel_state.is_pipeline_last_stage():
        return torch.zeros(2, device=platform.device())
    return torch.stack([report["lm loss"] for report in reports]).sum(dim=0)


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step says.

    Attributes:
        loss_sum_and_tokens: this rank's [loss sum, unmasked tokens].
        grad_norm: global gradient norm before clipping.
        factor: s(t) that the step used.
    """

    loss_sum_and_tokens: Tensor
    grad_norm: float
    factor: float


def train_step(state: TrainState, batches: Iterator[Batch], num_microbatches: int) -> StepReport:
    """One optimizer step; advances ``state.iteration`` but not the sample count.

    Args:
        state: model and optimizer, changed in place.
        batches: this rank's microbatches.
        num_microbatches: how many of them make the step.
    """
    factor = run_factor(state.run, state.iteration)
    apply_schedule(state.optimizer, factor, weight_decay=state.run.optimizer.weight_decay)
    state.wrapped_model.zero_grad_buffer()
    state.optimizer.zero_grad()
    report = _run_schedule(state, batches, num_microbatches, forward_only=False)
    _, grad_norm, _ = state.optimizer.step()
    state.iteration += 1
    return StepReport(report, float(grad_norm), factor)


@torch.no_grad()
def evaluate_batches(state: TrainState, batches: Iterator[Batch], num_microbatches: int) -> Tensor:
    """Loss of ``num_microbatches`` microbatches without training; this rank's [sum, tokens]."""
    state.wrapped_model.eval()
    report = _run_schedule(state, batches, num_microbatches, forward_only=True)
    state.wrapped_model.train()
    return report
