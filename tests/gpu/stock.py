"""This package at width multiplier 1 beside stock Megatron-Core, from the same weights."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mup.benchmark.contestants import stock_model
from megatron_mup.config import RunConfig
from megatron_mup.model.gpt import build_model
from megatron_mup.training.processes import Launch, parallel_processes
from tests.gpu.comparison import LOGITS, batch_of, differentiate

AT_BASE = (
    "hidden_size=256",
    "num_attention_heads=4",
    "base_kv_channels=64",
    "base_hidden_size=256",
    "base_ffn_hidden_size=1024",
    "attention_scale=base_head_dim",
    "output_form=multiplier",
    "vocab_size=512",
    "seq_length=128",
)


def ours_and_stock(run: RunConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits and all gradients of both models, on their device and in their dtype."""
    with parallel_processes(run, Launch()):
        ours, stock = build_model(run, run.table), stock_model(run)
        values = dict(ours.named_parameters())
        with torch.no_grad():
            for name, parameter in stock.named_parameters():
                parameter.copy_(values[name])
        batch = batch_of(run)
        found = []
        for model in (ours, stock):
            logits = differentiate(model, batch)
            gradients = {
                name: parameter.grad
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
            found.append({LOGITS: logits, **gradients})
    return found[0], found[1]


def different(ours: dict[str, Tensor], stock: dict[str, Tensor]) -> list[str]:
    """Names of what is not equal bit for bit."""
    assert ours.keys() == stock.keys()
    return [name for name in ours if not torch.equal(ours[name], stock[name])]
