"""Stock Megatron-Core training, built and stepped without this package's model or optimizer.

The counterpart against which the base shape is compared: upstream's GPTModel, local spec, core
attention, initialization, group overrides, scheduler, DDP and pipeline schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import (
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StockShape:
    """What distinguishes the stock models of the tests; sizes are elements."""

    hidden_size: int = 64
    num_attention_heads: int = 4
    num_query_groups: int = 4
    ffn_hidden_size: int = 256
    gated: bool = False
    biases: bool = False
    tied: bool = False
    num_layers: int = 2
    vocab_size: int = 96
    seq_length: int = 16


def stock_config(shape: StockShape) -> TransformerConfig:
    """Upstream's configuration with its own initialization and attention scale."""
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        ffn_hidden_size=shape.ffn_hidden_size,
        activation_func=functional.silu if shape.gated else functional.gelu,
        gated_linear_unit=shape.gated,
        add_bias_linear=shape.biases,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        init_method_std=0.02,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
    )


def stock_model(shape: StockShape, *, core_attention: type | None = None) -> Any:
    """Upstream's GPT, initialised by upstream; ``core_attention`` replaces its unfused one."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if core_attention is not None:
        spec.submodules.self_attention.submodules.core_attention = core_attention
    return GPTModel(
        stock_config(shape),
        spec,
        shape.vocab_size,
        shape.seq_length,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
    )


@dataclass
class StockTraining:
    """Stock model in DDP with its optimizer and scheduler."""

    model: Any
    wrapped: Any
    optimizer: Any
    scheduler: OptimizerParamScheduler


def stock_training(
    model: Any, *, lr: float, weight_decay: float, steps: int, clip_grad: float
) -> StockTraining:
    """AdamW with upstream's group overrides; linear decay to 0 over ``steps``, no warmup."""
    buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(model.config, buffers, model)
    config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=0.0,
        weight_decay=weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_eps=1e-8,
        clip_grad=clip_grad,
    )
    optimizer = get_megatron_optimizer(
        config, [wrapped], config_overrides=get_standard_config_overrides(config)
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=lr,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=steps,
        lr_decay_style="linear",
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    model.config.no_sync_func = wrapped.no_sync
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.grad_scale_func = optimizer.scale_loss
    return StockTraining(model, wrapped, optimizer, scheduler)


def _forward(batches: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Callable[..., Any]]:
    batch = next(batches)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss(losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = losses_BS.sum()
        return total, torch.tensor(losses_BS.numel(), dtype=torch.int), {"loss": total.detach()}

    return losses, loss


def stock_step(stock: StockTraining, batches: list[dict[str, Tensor]]) -> float:
    """One step of upstream's schedule, optimizer and scheduler; the summed loss."""
    stock.wrapped.zero_grad_buffer()
    stock.optimizer.zero_grad()
    rows, length = batches[0]["tokens"].shape
    reports = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=iter(batches),
        model=[stock.wrapped],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=False,
    )
    stock.optimizer.step()
    stock.scheduler.step(1)
    return float(torch.stack([report["loss"] for report in reports]).sum())
