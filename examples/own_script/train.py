"""A bare megatron.core training loop that takes its parameterization from megatron_mup.

Everything but the lines that name ``mup`` is what such a script has anyway.
"""

import argparse
import functools
import json
import os

# Before megatron.core: on a machine without a GPU it makes the CPU usable.
from megatron_mup import library
from megatron_mup.parameterization.options import ParameterizationConfig

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

CUDA = torch.cuda.is_available()
VOCAB, SEQ, MICRO_BATCH, MICRO_BATCHES, STEPS, WARMUP = 128, 32, 2, 2, 10, 3
BASE = {"base_hidden_size": 32, "base_ffn_hidden_size": 128, "base_kv_channels": 16}


def batches():
    """Random tokens; the same on every rank, because this script has no data parallelism."""
    ranks = np.random.default_rng(0).random((STEPS * MICRO_BATCHES, MICRO_BATCH, SEQ + 1)) ** 2
    for rows in torch.from_numpy((ranks * VOCAB).astype(np.int64)).to("cuda" if CUDA else "cpu"):
        yield {
            "tokens": rows[:, :-1],
            "labels": rows[:, 1:],
            "position_ids": torch.arange(SEQ, device=rows.device).expand(MICRO_BATCH, -1),
            "loss_mask": torch.ones(MICRO_BATCH, SEQ, device=rows.device),
        }


def sum_of_losses(mask, losses):
    """What calculate_per_token_loss asks for: sum, count, and what to report."""
    total = (losses.float() * mask).sum()
    return total, mask.sum().to(torch.int), {"lm loss": total.detach()}


def forward_step(iterator, model):
    """One microbatch."""
    batch = next(iterator)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, functools.partial(sum_of_losses, batch["loss_mask"])


def build(name):
    """Model, optimizer and schedule under the rule set ``name``."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=256,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        calculate_per_token_loss=True,
        use_cpu_initialization=not CUDA,
    )
    optimizer_config = OptimizerConfig(
        lr=2**-6, min_lr=2**-10, weight_decay=1e-4, adam_beta2=0.95, clip_grad=1.0
    )

    parameterization = ParameterizationConfig(name=name, base_num_layers=2, **BASE)
    extras = library.Extras(vocab_size=VOCAB, norm_gain="none")
    mup = library.resolve(config, optimizer_config, parameterization, extras)
    config.softmax_scale = mup.softmax_scale
    spec = mup.layer_spec(get_gpt_layer_local_spec(normalization="RMSNorm"))
    model = GPTModel(config, spec, VOCAB, SEQ, position_embedding_type="rope")
    mup.apply(model, seed=1234)

    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model.cuda()
    )
    optimizer = get_megatron_optimizer(
        optimizer_config,
        [wrapped],
        config_overrides=mup.config_overrides([model]),
        use_gloo_process_groups=not CUDA,
    )
    peak, floor, decay = optimizer_config.lr, optimizer_config.min_lr, optimizer_config.weight_decay
    steps = {"lr_warmup_steps": WARMUP, "lr_decay_steps": STEPS, "lr_decay_style": "cosine"}
    constant = {"start_wd": decay, "end_wd": decay, "wd_incr_steps": STEPS}
    scheduler = OptimizerParamScheduler(
        optimizer, 0.0, peak, floor, **steps, **constant, wd_incr_style="constant"
    )
    mup.check_training(optimizer, scheduler)
    config.no_sync_func = wrapped.no_sync
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped, optimizer, scheduler


def train(name):
    """Train ``STEPS`` steps; the mean loss of each. Needs Megatron's parallel state."""
    model, optimizer, scheduler = build(name)
    iterator, losses = batches(), []
    for _ in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterator,
            model=[model],
            num_microbatches=MICRO_BATCHES,
            seq_length=SEQ,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        optimizer.step()
        scheduler.step(1)
        total = sum(float(report["lm loss"]) for report in reports)
        losses.append(total / (MICRO_BATCHES * MICRO_BATCH * SEQ))
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameterization", default="mup", choices=["mup", "sp"])
    name = parser.parse_args().parameterization
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if CUDA:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    where = {} if world > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if CUDA else "gloo", **where)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    losses = train(name)
    if rank == 0:
        print(json.dumps(losses))  # noqa: T201  what this script is for
    dist.destroy_process_group()
