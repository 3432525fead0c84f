"""One training step and one evaluation pass through Megatron's pipeline schedules.

Shape suffixes: B microbatch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import tee
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_mup import platform
from megatron_mup.config import LossDenominator, RunConfig
from megatron_mup.errors import ConfigError
from megatron_mup.optimizer.build import apply_schedule
from megatron_mup.optimizer.guard import Veto
from megatron_mup.optimizer.schedule import ExtraFactor, extra_warmup, run_factor
from megatron_mup.training.batches import Batch, context_parts
from megatron_mup.training.state import TrainState


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
    # Filled on the device: a copy from the host would wait for the queue.
    count = tokens if tokens_only else tokens.new_full((), mask_BS.numel(), dtype=torch.int)
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
    chunks = state.wrapped_chunks
    # Each model chunk walks through all microbatches on its own.
    iterators = list(tee(context_parts(batches), len(chunks)))
    reports = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, run.training.loss_denominator),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
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
        updated: False if the update was vetoed.
        extra: the extra warmup that the step used, if there is one.
        observed: what an observer reports of it; empty unless it was due.
    """

    loss_sum_and_tokens: Tensor
    grad_norm: float
    factor: float
    updated: bool
    extra: ExtraFactor | None = None
    observed: dict[str, float] = field(default_factory=dict)


Judge = Callable[[Tensor, float], bool]
"""Given this rank's [loss sum, tokens] and the global gradient norm: leave the update out?"""


class StepObserver(Protocol):
    """Looks on at some steps, on every rank, without changing them."""

    def opened(self, state: TrainState) -> AbstractContextManager[None]:
        """Around the whole loop, with the model built and resumed."""
        ...

    def due(self, iteration: int) -> bool:
        """Whether to look on at the step that ends as number ``iteration``, counted from 1."""
        ...

    def forward(self, state: TrainState) -> AbstractContextManager[None]:
        """Around the forward and backward passes of such a step."""
        ...

    def update(self, state: TrainState) -> AbstractContextManager[None]:
        """Around its update, vetoed or not; on entry the groups' LR and decay are the step's."""
        ...

    def report(self, iteration: int) -> dict[str, float]:
        """Metrics of the update just made, the same on every rank."""
        ...


def check_observer(run: RunConfig, observer: StepObserver | None) -> None:
    """Refuse a run whose update dynamics nobody would measure.

    Raises:
        ConfigError: an interval is set and no observer is given.
    """
    interval = run.logging.diagnostics_interval
    if interval is not None and observer is None:
        raise ConfigError(
            f"logging.diagnostics_interval={interval} needs an observer; 'megatron-mup train' "
            "brings it, a script calls train(run, "
            "observer=megatron_mup.diagnostics.dynamics.observer_for(run))"
        )


def train_step(
    state: TrainState,
    batches: Iterator[Batch],
    num_microbatches: int,
    *,
    judge: Judge | None = None,
    observer: StepObserver | None = None,
) -> StepReport:
    """One optimizer step; advances ``state.iteration`` but not the sample count.

    Args:
        state: model and optimizer, changed in place.
        batches: this rank's microbatches.
        num_microbatches: how many of them make the step.
        judge: asked before the update; must answer alike on every rank.
        observer: looks on, if the step is one of those that it is due at.
    """
    factor = run_factor(state.run, state.iteration)
    extra = extra_warmup(state.run, state.iteration)
    decay = state.run.optimizer_numbers.weight_decay
    apply_schedule(state.optimizer, factor, weight_decay=decay, extra=extra)
    for chunk in state.wrapped_chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    if observer is not None and not observer.due(state.iteration + 1):
        observer = None
    with nullcontext() if observer is None else observer.forward(state):
        report = _run_schedule(state, batches, num_microbatches, forward_only=False)
    veto: Veto | None = None if judge is None else partial(judge, report)
    with nullcontext() if observer is None else observer.update(state):
        updated, grad_norm = state.guard.step(veto)
    state.iteration += 1
    observed = observer.report(state.iteration) if observer is not None and updated else {}
    return StepReport(report, grad_norm, factor, updated, extra, observed)


@torch.no_grad()
def evaluate_batches(state: TrainState, batches: Iterator[Batch], num_microbatches: int) -> Tensor:
    """Loss of ``num_microbatches`` microbatches without training; this rank's [sum, tokens]."""
    with gathered_parameters(state):
        for chunk in state.wrapped_chunks:
            chunk.eval()
        report = _run_schedule(state, batches, num_microbatches, forward_only=True)
        for chunk in state.wrapped_chunks:
            chunk.train()
    return report


@contextmanager
def gathered_parameters(state: TrainState) -> Iterator[None]:
    """Have all parameters up to date on this rank, for evaluation and saving.

    With ``overlap_param_gather`` they are otherwise gathered by the next training forward pass.
    """
    overlapped = state.run.parallel.overlap_param_gather
    for chunk in state.wrapped_chunks if overlapped else []:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in state.wrapped_chunks if overlapped else []:
            chunk.enable_forward_pre_hook()
