"""Small configurations that several tests start from."""

from __future__ import annotations

from typing import Any

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict

TINY: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 96,
        "make_vocab_size_divisible_by": 32,
        "seq_length": 16,
    },
    "parameterization": {
        "base_hidden_size": 32,
        "base_ffn_hidden_size": 128,
        "base_kv_channels": 16,
        "base_num_layers": 2,
    },
    "optimizer": {"lr": 0.015625},
    "training": {
        "train_iters": 6,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "eval_iters": 0,
    },
    "logging": {"log_interval": 1},
}
"""A muP GPT of width 64 over a base of width 32."""


def tiny(*overrides: str) -> RunConfig:
    """The tiny run with ``key=value`` overrides."""
    return config_from_dict(TINY, overrides)
