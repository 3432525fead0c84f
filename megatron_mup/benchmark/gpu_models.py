"""The models whose speed is measured on a GPU, their FLOPs, and what is demanded of one H200.

FLOPs per token are those of the tables that Megatron-LM publishes, 6 (12 L M^2 + V M) + 12 L S M,
attention in full (``flops.py``); megatron-core 0.19.2 itself counts half of the attention. MFU
divides by the dense bf16 peak in every precision. Tokens per second decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megatron_mup.benchmark.contestants import costly_parameterization, endless_training
from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict
from megatron_mup.errors import ConfigError
from megatron_mup.flops import model_flops_per_sequence, model_flops_per_token

VOCAB_SIZE = 32_000

HEAD_DIM = 128
"""The widest that fused attention has its fastest kernels for on Hopper."""

MICRO_BATCH_TOKENS = 32_768
"""Of a step, unless asked otherwise."""


class Precision(StrEnum):
    """What products are computed in."""

    BF16 = "bf16"
    FP8 = "fp8"


@dataclass(frozen=True, kw_only=True)
class SpeedModel:
    """Sizes of a measured GPT.

    Attributes:
        width: M.
        depth: L.
        seq_length: S, tokens.
        micro_batch_size: sequences of a step, in one microbatch.
    """

    width: int
    depth: int
    seq_length: int
    micro_batch_size: int

    def __post_init__(self) -> None:
        """Check sizes; raises ConfigError."""
        if min(self.width, self.depth, self.seq_length, self.micro_batch_size) < 1:
            raise ConfigError(
                f"--width {self.width}, --depth {self.depth}, --seq-length {self.seq_length} and "
                f"--micro-batch-size {self.micro_batch_size} must be positive"
            )
        if self.width % 4 or self.width % self.head_dim:
            raise ConfigError(
                f"--width is {self.width}; give a multiple of 4 and of the head dim {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """D; 16 in models too narrow for ``HEAD_DIM``, as tests have them."""
        return HEAD_DIM if self.width >= HEAD_DIM else 16

    @property
    def name(self) -> str:
        """Its sizes in words."""
        tokens = self.micro_batch_size * self.seq_length
        return f"width {self.width}, depth {self.depth}, seq {self.seq_length}, {tokens} tokens"


def default_micro_batch(seq_length: int) -> int:
    """Sequences that make ``MICRO_BATCH_TOKENS``, at least one."""
    return max(1, MICRO_BATCH_TOKENS // seq_length)


def speed_run(
    model: SpeedModel, precision: Precision, *, sp: bool = False, overrides: Sequence[str] = ()
) -> RunConfig:
    """A run of this package at a model's sizes.

    Args:
        model: sizes.
        precision: bf16, or FP8 (hybrid, current scaling).
        sp: the standard parameterization; else a muP in which every multiplier differs from 1.
        overrides: ``key=value``.

    Raises:
        MupError: the run cannot be configured so.
    """
    costly = costly_parameterization(model.width // 4, model.depth, head_dim=model.head_dim)
    fp8 = {"fp8_format": "hybrid", "fp8_recipe": "tensorwise"}
    sections: dict[str, Any] = {
        "model": {
            "num_layers": model.depth,
            "hidden_size": model.width,
            "num_attention_heads": model.width // model.head_dim,
            "vocab_size": VOCAB_SIZE,
            "seq_length": model.seq_length,
            "transformer_impl": "transformer_engine",
        },
        "parameterization": {"name": "sp"} if sp else {"name": "mup", **costly},
        "optimizer": {"lr": 2.0**-10, "weight_decay": 0.1, "weight_decay_mode": "coupled"},
        **endless_training(model.micro_batch_size),
        "precision": {"bf16": True, **(fp8 if precision is Precision.FP8 else {})},
    }
    return config_from_dict(sections, overrides)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Speed of one contestant.

    Attributes:
        tokens_per_second: of the whole step.
        tflops: model TFLOP/s, attention in full.
        megatron_tflops: the same by megatron-core's count, half of the attention.
    """

    tokens_per_second: float
    tflops: float
    megatron_tflops: float


def rate(run: RunConfig, seconds: float) -> Rate:
    """Speed from the time of a step."""
    tokens = run.training.global_batch_size * run.model.seq_length / seconds
    full = model_flops_per_token(run.model)
    halved = full - model_flops_per_sequence(run.model).attention_scores / run.model.seq_length / 2
    return Rate(
        tokens_per_second=tokens,
        tflops=tokens * full / 1e12,
        megatron_tflops=tokens * halved / 1e12,
    )


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What is asked of one H200, in model TFLOP/s.

    Attributes:
        accept: the least.
        good: better.
        excellent: best; None where nothing is stated.
        over_bf16: least tokens per second over bf16's own, in place of ``accept`` where known.
    """

    accept: float
    good: float
    excellent: float | None = None
    over_bf16: float | None = None


_BF16 = Demand(accept=450.0, good=500.0, excellent=540.0)

DEMANDS: dict[tuple[int, int, int, Precision], Demand] = {
    (2048, 24, 2048, Precision.BF16): _BF16,
    (2048, 24, 4096, Precision.BF16): _BF16,
    (2048, 24, 2048, Precision.FP8): Demand(
        accept=540.0, good=600.0, excellent=660.0, over_bf16=1.2
    ),
    (4096, 16, 4096, Precision.BF16): Demand(accept=500.0, good=550.0),
    (4096, 16, 4096, Precision.FP8): Demand(accept=650.0, good=744.0),
}
"""By width, depth, sequence and precision. Assumption (ours): the best published rates of such
models on an H100 (Megatron-LM 409, Megatron-Bridge 744 in FP8), and the rate of a plain product."""

STOCK_LIMIT = 1.01
"""Upper end of muP's time over stock Megatron-Core's and over SP's."""


def verdict(
    model: SpeedModel, precision: Precision, tflops: float, *, over_bf16: float | None = None
) -> str:
    """What a rate amounts to.

    Args:
        model: sizes.
        precision: of the products.
        tflops: measured.
        over_bf16: tokens per second over those of bf16 in the same call, if known.

    Returns:
        "excellent", "good", "accepted", "BELOW" with what is asked, or "nothing asked".
    """
    demand = DEMANDS.get((model.width, model.depth, model.seq_length, precision))
    if demand is None:
        return "nothing asked"
    if demand.excellent is not None and tflops >= demand.excellent:
        return "excellent"
    if tflops >= demand.good:
        return "good"
    if demand.over_bf16 is not None and over_bf16 is not None:
        met, asked = over_bf16 >= demand.over_bf16, f"{demand.over_bf16:g} x bf16"
    else:
        met, asked = tflops >= demand.accept, f"{demand.accept:g} TFLOP/s"
    return "accepted" if met else f"BELOW {asked}"
