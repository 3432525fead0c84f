"""Build Megatron's optimizer from the table, and move its groups along the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_mup import platform
from megatron_mup.config import RunConfig
from megatron_mup.optimizer.groups import GroupNumbers, config_overrides
from megatron_mup.optimizer.upstream import correct_optimizer_factory
from megatron_mup.parameterization.table import ParameterTable


def optimizer_config(run: RunConfig) -> OptimizerConfig:
    """Megatron's optimizer configuration of a run; peak values."""
    section = run.optimizer
    return OptimizerConfig(
        optimizer=section.optimizer.value,
        lr=section.lr,
        min_lr=section.lr * run.schedule.min_lr_ratio,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_eps,
        lion_beta1=section.lion_beta1,
        lion_beta2=section.lion_beta2,
        clip_grad=section.clip_grad,
        bf16=run.precision.bf16,
        params_dtype=torch.bfloat16 if run.precision.bf16 else torch.float32,
    )


def build_optimizer(
    run: RunConfig,
    table: ParameterTable,
    *,
    model_chunks: Sequence[torch.nn.Module],
    wrapped_chunks: Sequence[torch.nn.Module],
) -> Any:
    """Megatron's optimizer with one group per distinct (LR, decay, eps).

    Args:
        run: the run's configuration.
        table: its resolved parameter table.
        model_chunks: GPTModel of each chunk before wrapping, for the names.
        wrapped_chunks: the same chunks in DDP, which hold the gradient buffers.

    Returns:
        A ``MegatronOptimizer``; its groups' LR and decay are set by ``apply_schedule``.
    """
    # First of all: upstream's factory looks Lion up while it builds the groups.
    correct_optimizer_factory()
    numbers = run.optimizer.numbers
    overrides = config_overrides(
        model_chunks,
        table,
        defaults=GroupNumbers(numbers.lr, numbers.weight_decay, numbers.eps),
        min_lr_ratio=run.schedule.min_lr_ratio,
    )
    return get_megatron_optimizer(
        optimizer_config(run),
        list(wrapped_chunks),
        config_overrides=overrides,
        use_gloo_process_groups=not platform.has_cuda(),
    )


def apply_schedule(optimizer: Any, factor: float, *, weight_decay: float) -> None:
    """Set every group's LR to factor * its peak, and its decay to its share of lambda.

    Args:
        optimizer: from ``build_optimizer``.
        factor: s(t).
        weight_decay: the configured lambda.
    """
    # From the peak each time, not from the last value: a resumed run cannot accumulate rounding.
    for group in optimizer.param_groups:
        group["lr"] = factor * group["max_lr"]
        group["weight_decay"] = weight_decay * group["wd_mult"]
