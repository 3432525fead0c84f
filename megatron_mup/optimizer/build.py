"""Build Megatron's optimizer from the table, and move its groups along the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_mup import platform
from megatron_mup.config import OptimizerName, RunConfig
from megatron_mup.optimizer.groups import WARMUP_RATIO, GroupNumbers, config_overrides
from megatron_mup.optimizer.schedule import ExtraFactor, warmup_ratio
from megatron_mup.optimizer.upstream import correct_optimizer_factory, train_with_lion
from megatron_mup.parameterization.table import ParameterTable


def optimizer_config(run: RunConfig) -> OptimizerConfig:
    """Megatron's optimizer configuration of a run; peak values."""
    section, precision, numbers = run.optimizer, run.precision, run.optimizer_numbers
    muon = section.optimizer is OptimizerName.MUON
    distributed = run.parallel.use_distributed_optimizer
    return OptimizerConfig(
        # Lion takes the place of an AdamW that was built for it, see train_with_lion.
        optimizer="muon" if muon else "adam",
        lr=numbers.lr,
        min_lr=numbers.lr * run.schedule.min_lr_ratio,
        weight_decay=numbers.weight_decay,
        adam_beta1=numbers.betas[0],
        adam_beta2=numbers.betas[1],
        adam_eps=section.adam_eps if numbers.eps is None else numbers.eps,
        clip_grad=section.clip_grad,
        bf16=precision.bf16,
        params_dtype=torch.bfloat16 if precision.bf16 else torch.float32,
        fp8_recipe=precision.fp8_recipe.value if precision.fp8_format is not None else None,
        use_distributed_optimizer=distributed and not muon,
        use_layer_wise_distributed_optimizer=distributed and muon,
        overlap_param_gather=run.parallel.overlap_param_gather,
        muon_momentum=section.muon_momentum,
        muon_nesterov=True,
        muon_split_qkv=True,
        # The rule table's learning rates for Muon hold for this scale and no other.
        muon_scale_mode="unit_rms_norm",
        muon_num_ns_steps=section.muon_num_ns_steps,
        muon_tp_mode=section.muon_tp_mode.value,
        # Newton-Schulz in bf16, as usual, would make an fp32 run depend on its layout.
        muon_fp32_matmul_prec="medium" if precision.bf16 else "highest",
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
    correct_optimizer_factory()
    numbers = run.optimizer_numbers
    overrides = config_overrides(
        model_chunks,
        table,
        defaults=GroupNumbers(numbers.lr, numbers.weight_decay, numbers.eps),
        min_lr_ratio=run.schedule.min_lr_ratio,
        warmup_ratio=partial(warmup_ratio, run),
    )
    optimizer = get_megatron_optimizer(
        optimizer_config(run),
        list(wrapped_chunks),
        config_overrides=overrides,
        use_gloo_process_groups=not platform.has_cuda(),
    )
    if run.optimizer.optimizer is OptimizerName.LION:
        train_with_lion(optimizer, numbers.betas)
    return optimizer


def apply_schedule(
    optimizer: Any, factor: float, *, weight_decay: float, extra: ExtraFactor | None = None
) -> None:
    """Set every group's LR to factor * its peak, and its decay to its share of lambda.

    Args:
        optimizer: from ``build_optimizer``.
        factor: s(t).
        weight_decay: the optimizer's lambda.
        extra: a second factor of each group's LR, from ``extra_warmup``.
    """
    # From the peak each time, not from the last value: a resumed run cannot accumulate rounding.
    for group in optimizer.param_groups:
        group["lr"] = factor * group["max_lr"]
        group["weight_decay"] = weight_decay * group["wd_mult"]
        if extra is not None:
            decay_per_step = group["max_lr"] * group["weight_decay"]
            group["lr"] *= extra(group.get(WARMUP_RATIO, 1.0), decay_per_step)
