"""The training steps that are compared: muP, stock Megatron-Core and plain PyTorch.

Each contestant does one whole optimizer step: zeroing, forward, backward, clipping and AdamW. Stock
Megatron-Core has the package's layer spec with multipliers of 1 and nothing else of it: GPTModel,
DDP, schedule and optimizer are put together by hand from upstream's parts, with its standard group
overrides. All run in one process on the same batches, in the run's precision; plain PyTorch has no
FP8 and computes FP8 runs in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_mup import platform
from megatron_mup.benchmark.plain_gpt import PlainGPT
from megatron_mup.config import RunConfig, TransformerImpl
from megatron_mup.config_io import config_from_dict
from megatron_mup.model.gpt import freeze_unused_gains, transformer_config
from megatron_mup.model.layer_specs import block_spec
from megatron_mup.optimizer.build import optimizer_config
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.training.batches import Batch
from megatron_mup.training.processes import when_left
from megatron_mup.training.state import build_state, release_chunks
from megatron_mup.training.step import train_step

TrainStep = Callable[[Batch], float]
"""One optimizer step on a batch of [B, S] tensors; returns the mean token loss in nats."""


def benchmark_run(
    *, hidden_size: int, num_layers: int, seq_length: int = 256, batch_size: int = 8
) -> RunConfig:
    """A muP run at width multiplier 4 in which every multiplier differs from 1.

    Args:
        hidden_size: M, elements; heads have 64 elements (16 at the base).
        num_layers: depth.
        seq_length: tokens per sequence.
        batch_size: sequences per step, in one microbatch.
    """
    return config_from_dict(
        {
            "model": {
                "num_layers": num_layers,
                "hidden_size": hidden_size,
                "num_attention_heads": hidden_size // 64,
                "vocab_size": 512,
                "seq_length": seq_length,
            },
            "parameterization": costly_parameterization(hidden_size // 4, num_layers, head_dim=64),
            "optimizer": {"lr": 2.0**-8, "weight_decay": 0.1, "weight_decay_mode": "coupled"},
            **endless_training(batch_size),
        },
    )


def endless_training(batch_size: int) -> dict[str, Any]:
    """Sections of a run that takes any number of steps, each of one microbatch.

    Args:
        batch_size: sequences of a step.
    """
    return {
        "schedule": {"lr_decay_style": "constant"},
        "training": {
            "train_iters": 1_000_000,
            "global_batch_size": batch_size,
            "micro_batch_size": batch_size,
            "eval_iters": 0,
        },
    }


def costly_parameterization(
    base_hidden_size: int, num_layers: int, *, head_dim: int
) -> dict[str, Any]:
    """Options of a muP in which every multiplier differs from 1.

    Args:
        base_hidden_size: P, a quarter of the model's M, with as many heads.
        num_layers: depth of both.
        head_dim: of the model; the base has a quarter.
    """
    return {
        "base_hidden_size": base_hidden_size,
        "base_ffn_hidden_size": 4 * base_hidden_size,
        "base_kv_channels": head_dim // 4,
        "base_num_layers": num_layers,
        # Not folded, and not 1, on purpose: a multiplier of 1 adds no operation to be measured.
        "output_form": "multiplier",
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
    }


def random_batches(run: RunConfig, count: int, *, seed: int = 0) -> list[Batch]:
    """Batches of uniform random tokens, int64 [B, S], full loss mask, on this process's device."""
    rows, length = run.training.micro_batch_size, run.model.seq_length
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        tokens = torch.randint(run.model.vocab_size, (rows, length + 1), generator=generator)
        batch = {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(rows, length),
            "position_ids": torch.arange(length).expand(rows, -1),
        }
        batches.append({name: value.to(platform.device()) for name, value in batch.items()})
    return batches


def mup_contestant(run: RunConfig) -> TrainStep:
    """This package's training step; needs the parallel state."""
    state = build_state(run)

    def step(batch: Batch) -> float:
        # Reading the loss waits for the step, as the other contestants do.
        total, tokens = train_step(state, iter([batch]), 1).loss_sum_and_tokens.tolist()
        return float(total / tokens)

    return step


def stock_model(run: RunConfig) -> Any:
    """GPTModel with the package's layer spec, multipliers of 1 and upstream's initialization."""
    model = run.model
    ones = Multipliers(
        embedding=1.0, attention=1.0 / math.sqrt(model.head_dim), residual=1.0, logit=1.0
    )
    config = transformer_config(run, ones)
    # The package draws initial weights itself and therefore switches upstream's drawing off.
    config.perform_initialization = True
    gpt = GPTModel(
        config,
        block_spec(model, config, residual_multiplier=1.0),
        model.padded_vocab_size,
        model.seq_length,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
    )
    for parameter in gpt.parameters():
        # The CPU initialization path of 0.19.2 leaves replicated parameters without attributes.
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    if model.transformer_impl is TransformerImpl.TRANSFORMER_ENGINE:
        # Both are to train the same parameters; its norms always have a gain.
        freeze_unused_gains(gpt, model.norm_gain)
    return gpt.to(platform.device())


def stock_contestant(run: RunConfig) -> TrainStep:
    """Stock Megatron-Core's training step; needs the parallel state."""
    gpt = stock_model(run)
    module = Float16Module(gpt.config, gpt) if run.precision.bf16 else gpt
    ddp = DistributedDataParallel(
        gpt.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), module
    )
    when_left(partial(release_chunks, [ddp]))
    config = optimizer_config(run)
    optimizer = get_megatron_optimizer(
        config,
        [ddp],
        # No weight decay on biases and gains, as in Megatron's own training.
        config_overrides=get_standard_config_overrides(config),
        use_gloo_process_groups=not platform.has_cuda(),
    )
    # As upstream's training loop does; without them the schedule would reduce no gradient.
    gpt.config.no_sync_func = ddp.no_sync
    gpt.config.finalize_model_grads_func = finalize_model_grads
    gpt.config.grad_scale_func = optimizer.scale_loss
    schedule = partial(
        get_forward_backward_func(),
        forward_step_func=_stock_forward,
        model=[ddp],
        num_microbatches=1,
        seq_length=run.model.seq_length,
        micro_batch_size=run.training.micro_batch_size,
        forward_only=False,
    )

    def step(batch: Batch) -> float:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        (report,) = schedule(data_iterator=iter([batch]))
        optimizer.step()
        total, tokens = report["lm loss"].tolist()
        return float(total / tokens)

    return step


def _stock_forward(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
    """Upstream's forward step, as in its ``pretrain_gpt.py``."""
    batch = next(batches)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(_stock_loss, batch["loss_mask"])


def _stock_loss(mask_BS: Tensor, losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss sum, token count and report, as in upstream's ``pretrain_gpt.py``."""
    losses = losses_BS.view(-1).float()
    mask = mask_BS.view(-1).float()
    total = torch.sum(losses * mask)
    tokens = mask.sum().clone().detach().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.clone().detach(), tokens])}


def plain_contestant(run: RunConfig, *, compiled: bool = False) -> TrainStep:
    """The plain PyTorch GPT with ``torch.optim.AdamW`` and ``clip_grad_norm_``.

    Args:
        run: with bf16, products run in bf16 under autocast and weights stay fp32.
        compiled: let ``torch.compile`` fuse the model.
    """
    section = run.optimizer
    device = platform.device()
    model = PlainGPT(run.model).to(device)
    loss_of: Callable[..., Any] = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=section.lr,
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_eps,
        weight_decay=section.weight_decay,
        fused=platform.has_cuda(),
    )

    def step(batch: Batch) -> float:
        # PyTorch's default; upstream's DDP has to zero its gradient buffer instead.
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=run.precision.bf16):
            loss = loss_of(batch["tokens"], batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_grad)
        optimizer.step()
        return float(loss.item())

    return step
